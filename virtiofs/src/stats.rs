//! Counters of requests, as Prometheus text.

use crate::fuse::opcode::OPCODES;
use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Counters by opcode; the last place is for unknown ones.
#[derive(Debug)]
pub struct Stats {
    requests: Vec<AtomicU64>,
    errors: Vec<AtomicU64>,
    bytes: AtomicU64,
    broken: AtomicU64,
}

impl Default for Stats {
    fn default() -> Self {
        let counters = || (0..=OPCODES.len()).map(|_| AtomicU64::new(0)).collect();
        Self { requests: counters(), errors: counters(), bytes: AtomicU64::new(0), broken: AtomicU64::new(0) }
    }
}

impl Stats {
    /// Counts a request by its place in the table of opcodes.
    pub fn request(&self, opcode: Option<usize>, error: bool) {
        let place = opcode.unwrap_or(OPCODES.len());
        let count = |counters: &[AtomicU64]| counters.get(place).map(|counter| counter.fetch_add(1, Relaxed));
        count(&self.requests);
        if error {
            count(&self.errors);
        }
    }

    /// Counts bytes of files' contents that were sent.
    pub fn contents(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts a queue that was given up.
    pub fn broken(&self) {
        self.broken.fetch_add(1, Relaxed);
    }

    /// All counters that are not zero, in the Prometheus text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let names = OPCODES.iter().map(|row| row.name).chain(["unknown"]);
        for (metric, counters) in
            [("lair_virtiofs_requests_total", &self.requests), ("lair_virtiofs_errors_total", &self.errors)]
        {
            let _ = writeln!(text, "# TYPE {metric} counter");
            for (name, counter) in names.clone().zip(counters) {
                let count = counter.load(Relaxed);
                if count > 0 {
                    let _ = writeln!(text, "{metric}{{opcode=\"{name}\"}} {count}");
                }
            }
        }
        for (metric, counter) in [
            ("lair_virtiofs_contents_bytes_total", &self.bytes),
            ("lair_virtiofs_broken_queues_total", &self.broken),
        ] {
            let _ = writeln!(text, "# TYPE {metric} counter\n{metric} {}", counter.load(Relaxed));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_by_name() {
        let stats = Stats::default();
        stats.request(crate::fuse::opcode::find(1), false);
        stats.request(crate::fuse::opcode::find(16), true);
        stats.request(None, true);
        stats.contents(4096);
        insta::assert_snapshot!(stats.text(), @r#"
        # TYPE lair_virtiofs_requests_total counter
        lair_virtiofs_requests_total{opcode="lookup"} 1
        lair_virtiofs_requests_total{opcode="write"} 1
        lair_virtiofs_requests_total{opcode="unknown"} 1
        # TYPE lair_virtiofs_errors_total counter
        lair_virtiofs_errors_total{opcode="write"} 1
        lair_virtiofs_errors_total{opcode="unknown"} 1
        # TYPE lair_virtiofs_contents_bytes_total counter
        lair_virtiofs_contents_bytes_total 4096
        # TYPE lair_virtiofs_broken_queues_total counter
        lair_virtiofs_broken_queues_total 0
        "#);
    }
}
