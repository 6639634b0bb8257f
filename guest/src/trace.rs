//! The boot trace: what happened when, from the kernel's start on.
//!
//! A file in `/run` to which init, the agent and `lair-guest reached` append a line each: it outlives the change of the root and an agent
//! that is started again. Nothing here fails a boot: a moment that cannot be noted is missing.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::clock;
use lair_guest::wire::message::Moment;
use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

/// The longest file, in bytes. An agent that is started again and again notes its start each time.
const MAX_BYTES: u64 = 16 << 10;

/// The most moments that are told.
const MAX_MOMENTS: usize = 64;

/// The longest name.
const MAX_NAME: usize = 80;

/// The trace of this boot.
#[derive(Debug)]
pub(crate) struct Trace {
    path: PathBuf,
}

impl Trace {
    /// The trace in this file, which is made with the first moment.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Notes that `name` has happened now.
    pub(crate) fn mark(&self, name: &str) {
        self.mark_at(name, clock::uptime_ms());
    }

    /// Notes that `name` happened so many milliseconds after the kernel's start.
    pub(crate) fn mark_at(&self, name: &str, at_ms: u64) {
        if !is_name(name) {
            return;
        }
        let file = File::options().append(true).create(true).mode(0o600).open(&self.path);
        let Ok(mut file) = file else { return };
        if file.metadata().is_ok_and(|metadata| metadata.len() < MAX_BYTES) {
            // One write: the lines of several processes do not mix.
            let _ = file.write_all(format!("{at_ms} {name}\n").as_bytes());
        }
    }

    /// Everything that happened, in order; of what happened more than once the first time.
    pub(crate) fn read(&self) -> Vec<Moment> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let mut known = HashSet::new();
        let mut moments = vec![Moment { name: "kernel".into(), at_ms: 0 }];
        for line in text.lines() {
            if let Some((at_ms, name)) = line.split_once(' ')
                && let Ok(at_ms) = at_ms.parse()
                && is_name(name)
                && known.insert(name)
                && moments.len() < MAX_MOMENTS
            {
                moments.push(Moment { name: name.into(), at_ms });
            }
        }
        moments.sort_by_key(|moment| moment.at_ms);
        moments
    }
}

/// Whether a moment can have this name.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@:".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let trace = Trace::new(dir.path().join("trace"));
        trace.mark_at("agent", 900);
        trace.mark_at("init", 300);
        // An agent that was started again.
        trace.mark_at("agent", 5000);
        trace.mark("no name");
        trace.mark("");
        let told: Vec<_> = trace.read().into_iter().map(|moment| (moment.name, moment.at_ms)).collect();
        assert_eq!(told, [("kernel".into(), 0), ("init".into(), 300), ("agent".into(), 900)]);
        trace.mark("now");
        assert!(trace.read().last().unwrap().at_ms > 900);
    }

    #[test]
    fn vs5_the_trace_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let trace = Trace::new(&path);
        for n in 0..10_000 {
            trace.mark(&format!("moment-{n}"));
        }
        assert!(fs::metadata(&path).unwrap().len() <= MAX_BYTES + 100);
        assert_eq!(trace.read().len(), MAX_MOMENTS);
        fs::write(&path, "x y\n-1 early\n7\n\n8 \x1b[2J\n9 fine\n").unwrap();
        assert_eq!(trace.read().last().unwrap().name, "fine");
        assert_eq!(trace.read().len(), 2);
    }

    #[test]
    fn a_trace_that_cannot_be_kept_is_empty() {
        let trace = Trace::new("/nonexistent/trace");
        trace.mark("init");
        assert_eq!(trace.read(), [Moment { name: "kernel".into(), at_ms: 0 }]);
    }
}
