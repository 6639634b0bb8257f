//! Two readings become rates, and rates become rows. Pure.

use super::sample::Sample;
use serde::Serialize;
use std::{cmp::Ordering, collections::BTreeMap};

/// One VM. What is not known yet, or not of a VM that is down, is none. Field names are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) detail: Option<String>,
    /// Since when it is in that state.
    pub(super) since: jiff::Timestamp,
    /// Of one processor.
    pub(super) cpu_percent: Option<f64>,
    /// Of the hypervisor, with what the guest has touched.
    pub(super) memory_used_bytes: Option<f64>,
    /// What the guest is given.
    pub(super) memory_bytes: u64,
    pub(super) store_requests_per_second: Option<f64>,
    /// By links, whoever opened them.
    pub(super) received_bytes_per_second: Option<f64>,
    /// By links, whoever opened them.
    pub(super) sent_bytes_per_second: Option<f64>,
}

/// All VMs together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Totals {
    pub(super) cpu_percent: Option<f64>,
    pub(super) memory_used_bytes: f64,
    pub(super) store_requests_per_second: Option<f64>,
    pub(super) received_bytes_per_second: Option<f64>,
    pub(super) sent_bytes_per_second: Option<f64>,
}

/// What rows are sorted by; numbers from the greatest down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Name,
    State,
    Cpu,
    Memory,
    Store,
    Received,
    Sent,
    Since,
}

impl Sort {
    pub(super) const ALL: [Self; 8] = [
        Self::Name,
        Self::State,
        Self::Cpu,
        Self::Memory,
        Self::Store,
        Self::Received,
        Self::Sent,
        Self::Since,
    ];

    pub(super) fn next(self) -> Self {
        let mut all = Self::ALL.into_iter().skip_while(|sort| *sort != self).skip(1);
        all.next().unwrap_or_default()
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        let greatest = |of: fn(&Row) -> Option<f64>| {
            // What is not known comes last.
            let value = |row| of(row).unwrap_or(-1.0);
            value(b).total_cmp(&value(a))
        };
        let by = match self {
            Self::Name => Ordering::Equal,
            Self::State => a.state.cmp(&b.state),
            Self::Cpu => greatest(|row| row.cpu_percent),
            Self::Memory => greatest(|row| row.memory_used_bytes),
            Self::Store => greatest(|row| row.store_requests_per_second),
            Self::Received => greatest(|row| row.received_bytes_per_second),
            Self::Sent => greatest(|row| row.sent_bytes_per_second),
            Self::Since => a.since.cmp(&b.since),
        };
        by.then_with(|| a.name.cmp(&b.name))
    }
}

/// How much a counter grew. One that is smaller than before began again with its process, so all of it is new.
fn growth(before: f64, now: f64) -> f64 {
    if now >= before { now - before } else { now.max(0.0) }
}

/// How much each counter grew that was there before; of one that was not, it is not known since when it counts.
fn growths<'a, K: Ord>(before: &BTreeMap<K, f64>, now: &'a BTreeMap<K, f64>) -> Vec<(&'a K, f64)> {
    now.iter().filter_map(|(key, value)| Some((key, growth(*before.get(key)?, *value)))).collect()
}

/// What happened between two readings.
#[derive(Debug, Default)]
struct Rates {
    cpu: BTreeMap<String, f64>,
    store: BTreeMap<String, f64>,
    received: BTreeMap<String, f64>,
    sent: BTreeMap<String, f64>,
}

fn rates(before: &Sample, now: &Sample) -> Rates {
    let seconds = now.at - before.at;
    let mut rates = Rates::default();
    // The clock does not go back, but it may stand.
    if seconds <= 0.0 {
        return rates;
    }
    let add = |of: &mut BTreeMap<String, f64>, vm: &str, growth: f64| {
        *of.entry(vm.into()).or_default() += growth / seconds;
    };
    for ((vm, _), growth) in growths(&before.cpu, &now.cpu) {
        add(&mut rates.cpu, vm, growth * 100.0);
    }
    for (vm, growth) in growths(&before.store, &now.store) {
        add(&mut rates.store, vm, growth);
    }
    for (key, (out, back)) in &now.links {
        let Some((out_before, back_before)) = before.links.get(key) else { continue };
        let (out, back) = (growth(*out_before, *out), growth(*back_before, *back));
        let (_, from, to) = key;
        add(&mut rates.sent, from, out);
        add(&mut rates.received, from, back);
        add(&mut rates.received, to, out);
        add(&mut rates.sent, to, back);
    }
    rates
}

/// The VMs at the moment of the second reading, sorted, and all of them together.
pub(super) fn rows(before: Option<&Sample>, now: &Sample, sort: Sort) -> (Vec<Row>, Totals) {
    let rates = before.map(|before| rates(before, now)).unwrap_or_default();
    let row = |vm: &super::sample::Vm| Row {
        name: vm.name.clone(),
        state: vm.state.clone(),
        detail: vm.detail.clone(),
        since: vm.since,
        cpu_percent: rates.cpu.get(&vm.name).copied(),
        memory_used_bytes: now.resident.get(&vm.name).copied(),
        memory_bytes: vm.memory,
        store_requests_per_second: rates.store.get(&vm.name).copied(),
        received_bytes_per_second: rates.received.get(&vm.name).copied(),
        sent_bytes_per_second: rates.sent.get(&vm.name).copied(),
    };
    let mut rows: Vec<_> = now.vms.iter().map(row).collect();
    rows.sort_by(|a, b| sort.compare(a, b));
    let totals = totals(&rows, &rates);
    (rows, totals)
}

fn totals(rows: &[Row], rates: &Rates) -> Totals {
    let sum = |of: fn(&Row) -> Option<f64>| rows.iter().filter_map(of).reduce(|a, b| a + b);
    Totals {
        // With laird's own.
        cpu_percent: rates.cpu.values().copied().reduce(|a, b| a + b),
        memory_used_bytes: sum(|row| row.memory_used_bytes).unwrap_or_default(),
        store_requests_per_second: sum(|row| row.store_requests_per_second),
        received_bytes_per_second: sum(|row| row.received_bytes_per_second),
        sent_bytes_per_second: sum(|row| row.sent_bytes_per_second),
    }
}
