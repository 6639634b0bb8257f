//! Lines on standard error, for whoever looks after the shim: few, whatever a guest does.

use super::{
    limits,
    rate::Rate,
    worker::{Work, Worker},
};
use std::{
    io::Write,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The writer of standard error.
pub(super) struct Notes {
    worker: Worker<String>,
    rate: Mutex<Rate>,
}

impl Notes {
    pub(super) fn start() -> std::io::Result<Self> {
        let worker = Worker::start("notes", 16, |work| {
            if let Work::Item(line) = work {
                // Not eprintln: it panics where standard error is a closed pipe.
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        })?;
        Ok(Self { worker, rate: Mutex::new(Rate::new(limits::NOTES)) })
    }

    /// Writes one line, if there was none in this second.
    pub(super) fn say(&self, text: &str) {
        let now = Instant::now();
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let before = rate.suppressed(now);
        if rate.admit(now) {
            let more = before.map(|n| format!(" ({n} lines were left out before)")).unwrap_or_default();
            self.worker.send(format!("{text}{more}"));
        }
    }

    pub(super) fn finish(&self, limit: Duration) {
        self.worker.finish(limit);
    }
}

/// An error and its sources in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text = format!("{text}: {next}");
        source = next.source();
    }
    text
}

/// Text of a guest or another peer, cut and escaped so that it can stand in a log.
pub(super) fn foreign(text: &str) -> String {
    const LONGEST: usize = 200;
    let cut: String = text.chars().take(LONGEST).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("{}{more}", cut.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cl14_foreign_text_is_cut_and_escaped() {
        assert_eq!(foreign("no\n\u{1b}[2J"), "no\\n\\u{1b}[2J");
        assert!(foreign(&"ä".repeat(10_000)).chars().count() <= 201);
    }
}
