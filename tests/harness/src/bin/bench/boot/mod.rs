//! The start of a VM by `laird` beside the same programs started by hand, and what `laird` takes of the host with many VMs.

mod by_hand;
mod fleets;
mod pairs;
mod report;
pub(crate) mod stand_in;
mod usage;

use crate::{
    gates::Gate,
    note,
    results::HostFacts,
    statistics::{Spread, median},
};
use anyhow::{Context, Result};
use fleets::FleetRow;
use lair_harness::testbed::Testbed;
use pairs::Pair;
use serde::Serialize;
use std::{collections::BTreeMap, fs, path::PathBuf};

/// Milliseconds that `laird` may add to a start.
const OVERHEAD_MAX_MS: f64 = 50.0;
/// Bytes that `laird` may have in memory with [`MANY`] VMs.
const RESIDENT_MAX: u64 = 20 << 20;
/// The most VMs.
const MANY: usize = 100;
/// How often an idle `laird` may wake up in a second, however many VMs it has.
const WAKES_MAX: f64 = 1.0;
/// Milliseconds of CPU time in a second for an idle `laird`.
const IDLE_CPU_MAX_MS: f64 = 1.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// Less of everything: for a glance, not for publishing
    #[arg(long)]
    quick: bool,
    /// Boot no guest: only what laird takes with 1, 10 and 100 VMs
    #[arg(long)]
    no_guest: bool,
    /// Only what is measured with a guest
    #[arg(long, conflicts_with = "no_guest")]
    only_guest: bool,
    /// Also write boot.json into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The document. Its names stay.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    bench: &'static str,
    schema: u32,
    host: HostFacts,
    /// Unless it was left out.
    start: Option<Starts>,
    fleets: Vec<FleetRow>,
    gates: Vec<Gate>,
}

/// Starts of a guest.
#[derive(Debug, Serialize)]
struct Starts {
    engine: &'static str,
    /// Starts that hung, by `laird` or by hand, and were repeated.
    hung: usize,
    pairs: Vec<Pair>,
    /// From the start to the agent's being ready, in milliseconds.
    ready_ms: Compared,
    /// From the start until the guest's processors run, in milliseconds.
    runs_ms: Compared,
    /// `laird`'s own work in a start, in milliseconds.
    own_ms: Spread,
    /// Each step of `laird`'s: medians.
    steps: Vec<StepRow>,
}

/// The same by `laird` and by hand.
#[derive(Debug, Serialize)]
struct Compared {
    laird: Spread,
    by_hand: Spread,
    /// By `laird` minus by hand, pair by pair.
    difference: Spread,
}

/// A step of `laird`'s.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct StepRow {
    step: String,
    worked_us: u64,
    waited_us: u64,
}

/// Measures, and tells.
pub(crate) fn boot(arguments: &Arguments) -> Result<()> {
    let testbed = Testbed::find()?.context("The bench needs the test bed")?;
    let mut results = Results {
        bench: "boot",
        schema: 2,
        host: HostFacts::here(),
        start: None,
        fleets: vec![],
        gates: vec![],
    };
    if !arguments.only_guest {
        let seconds = if arguments.quick { 3 } else { 10 };
        for vms in [1, 10, MANY] {
            note(&format!("laird with {vms} stand-ins of VMs"));
            results.fleets.push(fleets::measure(&testbed, vms, seconds)?);
        }
    }
    if !arguments.no_guest {
        let (pairs, hung) = pairs::measure(&testbed, if arguments.quick { 3 } else { 20 })?;
        results.start = Some(Starts::of(pairs, hung)?);
    }
    results.gates = gates(&results);
    if let Some(out) = &arguments.out {
        fs::create_dir_all(out).with_context(|| format!("Cannot make {}", out.display()))?;
        fs::write(out.join("boot.json"), serde_json::to_string_pretty(&results)? + "\n")?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        for line in report::tables(&results).lines() {
            println!("{}", line.trim_end());
        }
    }
    Ok(())
}

impl Starts {
    fn of(pairs: Vec<Pair>, hung: usize) -> Result<Self> {
        use lair_vmm::{
            fleet::schema::Accel,
            host::facts::{Engine, engine},
        };
        let compared = |figure: fn(&pairs::Start) -> f64| Compared {
            laird: Spread::of(pairs.iter().map(|pair| figure(&pair.laird)).collect()),
            by_hand: Spread::of(pairs.iter().map(|pair| figure(&pair.by_hand)).collect()),
            difference: Spread::of(
                pairs.iter().map(|pair| figure(&pair.laird) - figure(&pair.by_hand)).collect(),
            ),
        };
        let own = |pair: &Pair| pair.steps.iter().map(|step| step.worked_us as f64 / 1e3).sum();
        Ok(Self {
            engine: match engine(Accel::Auto)? {
                Engine::Kvm => "kvm",
                Engine::Tcg => "tcg",
            },
            ready_ms: compared(|start| start.ready_ms),
            runs_ms: compared(|start| start.runs_ms),
            own_ms: Spread::of(pairs.iter().map(own).collect()),
            steps: steps(&pairs),
            hung,
            pairs,
        })
    }
}

/// The medians of each step, in the order of the first start.
fn steps(pairs: &[Pair]) -> Vec<StepRow> {
    let mut of: BTreeMap<&str, (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    for step in pairs.iter().flat_map(|pair| &pair.steps) {
        let (worked, waited) = of.entry(&step.step).or_default();
        worked.push(step.worked_us);
        waited.push(step.waited_us);
    }
    let order = pairs.first().into_iter().flat_map(|pair| &pair.steps);
    let row = |step: &StepRow| {
        let (worked, waited) = of.get(step.step.as_str()).cloned().unwrap_or_default();
        StepRow { step: step.step.clone(), worked_us: median(worked), waited_us: median(waited) }
    };
    order.map(row).collect()
}

/// What `laird` is held to.
fn gates(results: &Results) -> Vec<Gate> {
    let mut gates = Vec::new();
    if let Some(start) = &results.start {
        let own = &start.own_ms;
        gates.push(Gate {
            name: format!("laird's own work in a start: at most {OVERHEAD_MAX_MS} ms"),
            verdict: (own.median <= OVERHEAD_MAX_MS && !start.steps.is_empty()).into(),
            figures: format!("median {own}"),
        });
        let difference = &start.ready_ms.difference;
        gates.push(Gate {
            name: format!("start to ready: at most {OVERHEAD_MAX_MS} ms more than by hand"),
            verdict: (difference.median <= OVERHEAD_MAX_MS).into(),
            figures: format!("median {difference}"),
        });
    }
    if let Some(row) = results.fleets.iter().find(|row| row.vms == MANY) {
        gates.push(Gate {
            name: format!("laird resident with {MANY} VMs: at most 20 MiB"),
            verdict: (row.resident() <= RESIDENT_MAX).into(),
            figures: format!("{:.1} MiB", row.resident() as f64 / f64::from(1 << 20)),
        });
        let (wakes, cpu) = (row.wakes as f64 / row.seconds, row.idle_cpu_us as f64 / 1e3 / row.seconds);
        gates.push(Gate {
            name: format!("laird idle with {MANY} VMs: no polling"),
            verdict: (wakes <= WAKES_MAX && cpu <= IDLE_CPU_MAX_MS).into(),
            figures: format!(
                "woke up {} times, {:.2} ms of CPU in {} s",
                row.wakes,
                row.idle_cpu_us as f64 / 1e3,
                row.seconds
            ),
        });
    }
    gates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::Verdict;
    use pairs::Start;
    use usage::Usage;

    /// 20 pairs of which the difference and the work are as told, in milliseconds.
    pub(super) fn sample(difference: f64, work_us: u64) -> Results {
        let step = |step: &str, worked_us, waited_us| StepRow { step: step.into(), worked_us, waited_us };
        let pair = |number: usize| Pair {
            laird: Start { runs_ms: 400.0 + difference, ready_ms: 6_000.0 + difference + number as f64 },
            by_hand: Start { runs_ms: 400.0, ready_ms: 6_000.0 + number as f64 },
            steps: vec![step("view", work_us, 0), step("hypervisor", 0, 300_000)],
        };
        let used = Usage {
            rss_bytes: 12 << 20,
            rss_anon_bytes: 5 << 20,
            rss_file_bytes: 7 << 20,
            threads: 1,
            ..Usage::default()
        };
        let fleet = |vms| FleetRow {
            vms,
            start_ms: 900,
            status_ms: 30,
            at_ready: used,
            at_rest: used,
            seconds: 10.0,
            idle_cpu_us: 0,
            wakes: 0,
        };
        let mut results = Results {
            bench: "boot",
            schema: 2,
            host: HostFacts { processor: "a processor".into(), processors: 2, kernel: "6.1".into() },
            start: Some(Starts::of((0..20).map(pair).collect(), 1).unwrap()),
            fleets: [1, 10, MANY].map(fleet).into(),
            gates: vec![],
        };
        if let Some(start) = &mut results.start {
            start.engine = "tcg";
        }
        results.gates = gates(&results);
        results
    }

    #[test]
    fn each_gate_opens_and_shuts() {
        let met = |results: &Results| {
            gates(results).iter().map(|gate| gate.verdict == Verdict::Met).collect::<Vec<_>>()
        };
        assert_eq!(met(&sample(30.0, 20_000)), [true; 4]);
        assert_eq!(met(&sample(30.0, 50_001)), [false, true, true, true]);
        assert_eq!(met(&sample(50.1, 20_000)), [true, false, true, true]);
        let mut results = sample(-3.0, 0);
        results.fleets[2].at_ready.rss_bytes = RESIDENT_MAX + 1;
        assert_eq!(met(&results), [true, true, false, true]);
        // Those of fewer VMs do not count, more waking does.
        results.fleets[2].at_ready.rss_bytes = RESIDENT_MAX;
        results.fleets[1].wakes = 1_000;
        assert_eq!(met(&results), [true; 4]);
        results.fleets[2].wakes = 11;
        assert!(!met(&results)[3]);
        results.fleets[2].wakes = 10;
        results.fleets[2].idle_cpu_us = 10_001;
        assert!(!met(&results)[3]);
        // Without any spans nothing is shown.
        for pair in &mut results.start.as_mut().unwrap().pairs {
            pair.steps.clear();
        }
        let pairs = std::mem::take(&mut results.start.as_mut().unwrap().pairs);
        results.start = Some(Starts::of(pairs, 0).unwrap());
        assert!(!met(&results)[0]);
    }

    #[test]
    fn steps_are_medians_in_their_order() {
        let mut pairs = sample(0.0, 7).start.unwrap().pairs;
        pairs.truncate(3);
        pairs[1].steps[0].worked_us = 9;
        pairs[2].steps[0].worked_us = 8;
        let rows = steps(&pairs);
        assert_eq!((rows[0].step.as_str(), rows[0].worked_us), ("view", 8));
        assert_eq!((rows[1].step.as_str(), rows[1].waited_us), ("hypervisor", 300_000));
    }
}
