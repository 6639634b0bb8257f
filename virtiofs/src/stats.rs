//! Counters, and how they are told.

use crate::{fuse::Opcode, vhost::Service};
use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter to which one thread at a time adds, which is cheaper. Anybody may read it.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// Adds `n`. If two threads do so at once, one of them may be lost.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations from 256 ns to 2.1 s are told apart, by powers of two.
const BUCKETS: usize = 24;
const SHORTEST: u32 = 8;

/// How long requests took.
#[derive(Debug, Default)]
pub struct Histogram {
    /// How many took up to 2^(8 + index) ns, but longer than the bucket before allows. The last has all that took longer.
    buckets: [Tally; BUCKETS + 1],
    nanoseconds: Tally,
}

impl Histogram {
    /// Adds one that took so long and stands for so many.
    pub fn add(&self, took: Duration, stands_for: u8) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(Self::bucket(nanoseconds)) {
            bucket.add(stands_for.into());
        }
        self.nanoseconds.add(nanoseconds.saturating_mul(stands_for.into()));
    }

    fn bucket(nanoseconds: u64) -> usize {
        // The exponent of the power of two that is not below it.
        let exponent = u64::BITS.saturating_sub(nanoseconds.saturating_sub(1).leading_zeros());
        usize::try_from(exponent.saturating_sub(SHORTEST)).unwrap_or(BUCKETS).min(BUCKETS)
    }
}

/// What is counted for each operation.
#[derive(Debug, Default)]
pub struct OpcodeStats {
    /// Requests received.
    pub requests: Tally,
    /// Requests answered with an error.
    pub errors: Tally,
    /// Bytes of replies without an error, headers included.
    pub bytes: Tally,
    /// From taking a request to having its reply.
    pub latency: Histogram,
}

/// One more than the largest number of an operation.
const OPCODES: usize = 64;

/// What is counted for the requests of one queue. One thread at a time adds to it: the one that holds the queue's lock.
#[derive(Debug)]
pub struct Requests {
    opcodes: Box<[OpcodeStats; OPCODES]>,
    unknown: OpcodeStats,
    /// Requests whose header is too short or tells another length than the request has.
    pub malformed: Tally,
    /// Descriptor chains that break the rules of virtio.
    pub bad_chains: Tally,
    /// Reads that failed on the host.
    pub read_failures: Tally,
    /// Reads that had to wait for a disk.
    pub cold_reads: Tally,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            opcodes: Box::new(std::array::from_fn(|_| OpcodeStats::default())),
            unknown: OpcodeStats::default(),
            malformed: Tally::default(),
            bad_chains: Tally::default(),
            read_failures: Tally::default(),
            cold_reads: Tally::default(),
        }
    }
}

impl Requests {
    /// The counters of one operation; `None` for all that FUSE does not define.
    pub fn of(&self, opcode: Option<Opcode>) -> &OpcodeStats {
        opcode.and_then(|opcode| self.opcodes.get(opcode as usize)).unwrap_or(&self.unknown)
    }
}

/// What is counted for the connections.
#[derive(Debug, Default)]
pub struct Events {
    /// Virtqueues given up because the guest broke them.
    pub broken_queues: Counter,
    /// Connections of a hypervisor.
    pub connections: Counter,
    /// Connections refused because one was being served.
    pub refused: Counter,
}

/// All counters in Prometheus' text format. Operations that never occurred are left out.
pub fn prometheus(service: &Service) -> String {
    let mut text = Text::default();
    operations(service, &mut text);
    let queues = |of: fn(&Requests) -> &Tally| service.requests.iter().map(|queue| of(queue).get()).sum();
    let events = &service.events;
    for (name, help, value) in [
        ("malformed_requests", "Requests with a wrong FUSE header", queues(|q| &q.malformed)),
        ("bad_chains", "Descriptor chains against the rules", queues(|q| &q.bad_chains)),
        ("broken_queues", "Virtqueues given up because the guest broke them", events.broken_queues.get()),
        ("connections", "Connections of a hypervisor", events.connections.get()),
        ("refused_connections", "Connections refused because one was served", events.refused.get()),
        ("read_failures", "Reads that failed on the host", queues(|q| &q.read_failures)),
        ("opens", "Files opened on the host", service.files.opens().get()),
        ("cold_reads", "Reads that had to wait for a disk", queues(|q| &q.cold_reads)),
    ] {
        text.family(&format!("{name}_total"), help, "counter");
        text.sample(&format!("{name}_total"), "", value);
    }
    let tree = service.server.tree();
    for (name, help, value) in [
        ("index_inodes", "Inodes in the index", tree.inodes()),
        ("view_paths", "Store paths in the view", tree.entries().len() as u64),
    ] {
        text.family(name, help, "gauge");
        text.sample(name, "", value);
    }
    text.0
}

fn operations(service: &Service, text: &mut Text) {
    let sum = |opcode, of: &dyn Fn(&OpcodeStats) -> &Tally| -> u64 {
        service.requests.iter().map(|queue| of(queue.of(opcode)).get()).sum()
    };
    let known = Opcode::ALL.iter().map(|&opcode| (opcode.name(), Some(opcode))).chain([("unknown", None)]);
    let occurred: Vec<_> = known
        .filter(|&(_, opcode)| sum(opcode, &|o| &o.requests) > 0)
        .map(|(name, opcode)| (format!("opcode=\"{}\"", name.to_lowercase()), opcode))
        .collect();
    type Field = fn(&OpcodeStats) -> &Tally;
    let fields: [(&str, &str, Field); 3] = [
        ("requests_total", "FUSE requests received", |s| &s.requests),
        ("errors_total", "FUSE requests answered with an error", |s| &s.errors),
        ("reply_bytes_total", "Bytes of FUSE replies without an error", |s| &s.bytes),
    ];
    for (name, help, field) in fields {
        text.family(name, help, "counter");
        for (labels, opcode) in &occurred {
            text.sample(name, labels, sum(*opcode, &field));
        }
    }
    let name = "request_duration_seconds";
    text.family(name, "From taking a FUSE request to having its reply: one in 8 is timed, by chance, and counted as 8, but each that waits for a disk", "histogram");
    for (labels, opcode) in &occurred {
        let mut count: u64 = 0;
        for bucket in 0..=BUCKETS {
            let of = |stats: &OpcodeStats| stats.latency.buckets.get(bucket).map_or(0, Tally::get);
            count =
                service.requests.iter().map(|queue| of(queue.of(*opcode))).sum::<u64>().saturating_add(count);
            let limit = u32::try_from(bucket).unwrap_or_default().saturating_add(SHORTEST);
            let limit = 1u64.checked_shl(limit).filter(|_| bucket < BUCKETS).map_or_else(
                || "+Inf".to_owned(),
                |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64().to_string(),
            );
            text.sample(&format!("{name}_bucket"), &format!("{labels},le=\"{limit}\""), count);
        }
        let seconds = Duration::from_nanos(sum(*opcode, &|s| &s.latency.nanoseconds)).as_secs_f64();
        text.sample(&format!("{name}_sum"), labels, seconds);
        text.sample(&format!("{name}_count"), labels, count);
    }
}

/// Text in Prometheus' format. Writing to a string cannot fail, so results are not looked at.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.0, "# HELP lair_virtiofs_{name} {help}.\n# TYPE lair_virtiofs_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let (open, close) = if labels.is_empty() { ("", "") } else { ("{", "}") };
        let _ = writeln!(self.0, "lair_virtiofs_{name}{open}{labels}{close} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        for (nanoseconds, bucket) in [
            (0, 0),
            (1, 0),
            (256, 0),
            (257, 1),
            (512, 1),
            (513, 2),
            (1 << 31, 23),
            ((1 << 31) + 1, 24),
            (u64::MAX, 24),
        ] {
            assert_eq!(Histogram::bucket(nanoseconds), bucket, "{nanoseconds}");
        }
    }
}
