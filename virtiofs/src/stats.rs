//! Counters, and how they are told.

use crate::fuse::{Opcode, Server};
use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
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

/// What is counted for each operation.
#[derive(Debug, Default)]
pub struct OpcodeStats {
    /// Requests received.
    pub requests: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
    /// Bytes of replies without an error, headers included.
    pub bytes: Counter,
}

/// One more than the largest number of an operation.
const OPCODES: usize = 64;

/// All counters of a server.
#[derive(Debug)]
pub struct Stats {
    opcodes: [OpcodeStats; OPCODES],
    unknown: OpcodeStats,
    /// Requests whose header is too short or tells another length than the request has.
    pub malformed: Counter,
    /// Descriptor chains that break the rules of virtio.
    pub bad_chains: Counter,
    /// Virtqueues given up because the guest broke them.
    pub broken_queues: Counter,
    /// Connections of a hypervisor.
    pub connections: Counter,
    /// Connections refused because one was being served.
    pub refused: Counter,
    /// Reads that failed on the host.
    pub read_failures: Counter,
    /// Files opened on the host.
    pub opens: Counter,
    /// Reads that had to wait for a disk.
    pub cold_reads: Counter,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            opcodes: std::array::from_fn(|_| OpcodeStats::default()),
            unknown: OpcodeStats::default(),
            malformed: Counter::default(),
            bad_chains: Counter::default(),
            broken_queues: Counter::default(),
            connections: Counter::default(),
            refused: Counter::default(),
            read_failures: Counter::default(),
            opens: Counter::default(),
            cold_reads: Counter::default(),
        }
    }
}

impl Stats {
    /// The counters of one operation; `None` for all that FUSE does not define.
    pub fn of(&self, opcode: Option<Opcode>) -> &OpcodeStats {
        opcode.and_then(|opcode| self.opcodes.get(opcode as usize)).unwrap_or(&self.unknown)
    }
}

/// All counters in Prometheus' text format.
pub fn prometheus(server: &Server) -> String {
    let mut text = String::new();
    let stats = server.stats();
    let opcodes =
        || Opcode::ALL.iter().map(|&o| (o.name(), stats.of(Some(o)))).chain([("unknown", stats.of(None))]);
    type Field = fn(&OpcodeStats) -> &Counter;
    let fields: [(&str, &str, Field); 3] = [
        ("requests", "FUSE requests received", |s| &s.requests),
        ("errors", "FUSE requests answered with an error", |s| &s.errors),
        ("reply_bytes", "Bytes of FUSE replies without an error", |s| &s.bytes),
    ];
    // Writing to a string cannot fail, so results are not looked at here.
    for (name, help, field) in fields {
        let _ = writeln!(text, "# HELP lair_virtiofs_{name}_total {help}.");
        let _ = writeln!(text, "# TYPE lair_virtiofs_{name}_total counter");
        for (opcode, counters) in opcodes().filter(|(_, c)| c.requests.get() > 0) {
            let opcode = opcode.to_lowercase();
            let value = field(counters).get();
            let _ = writeln!(text, "lair_virtiofs_{name}_total{{opcode=\"{opcode}\"}} {value}");
        }
    }
    for (name, help, counter) in [
        ("malformed_requests", "Requests with a wrong FUSE header", &stats.malformed),
        ("bad_chains", "Descriptor chains against the rules", &stats.bad_chains),
        ("broken_queues", "Virtqueues given up because the guest broke them", &stats.broken_queues),
        ("connections", "Connections of a hypervisor", &stats.connections),
        ("refused_connections", "Connections refused because one was served", &stats.refused),
        ("read_failures", "Reads that failed on the host", &stats.read_failures),
        ("opens", "Files opened on the host", &stats.opens),
        ("cold_reads", "Reads that had to wait for a disk", &stats.cold_reads),
    ] {
        let value = counter.get();
        let _ = writeln!(text, "# HELP lair_virtiofs_{name}_total {help}.");
        let _ =
            writeln!(text, "# TYPE lair_virtiofs_{name}_total counter\nlair_virtiofs_{name}_total {value}");
    }
    for (name, help, value) in [
        ("index_inodes", "Inodes in the index", server.tree().inodes()),
        ("view_paths", "Store paths in the view", server.tree().entries().len() as u64),
    ] {
        let _ = writeln!(text, "# HELP lair_virtiofs_{name} {help}.");
        let _ = writeln!(text, "# TYPE lair_virtiofs_{name} gauge\nlair_virtiofs_{name} {value}");
    }
    text
}
