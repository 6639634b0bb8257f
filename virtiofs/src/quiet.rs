//! A log that a guest cannot flood: at most one line a second, the rest is counted.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The shortest time between two lines.
const PAUSE: Duration = Duration::from_secs(1);

/// Limits the lines about one kind of trouble.
#[derive(Debug, Default)]
pub struct Quiet(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    unsaid: u64,
}

impl Quiet {
    /// Logs, or counts; `line` gets how many were not said before this one.
    pub fn say(&self, line: impl FnOnce(u64)) {
        if let Some(unsaid) = self.admit(Instant::now()) {
            line(unsaid);
        }
    }

    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            state.unsaid = state.unsaid.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_within_a_second_is_counted() {
        let (quiet, start) = (Quiet::default(), Instant::now());
        assert_eq!(quiet.admit(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(quiet.admit(start), None);
        }
        assert_eq!(quiet.admit(start + PAUSE), Some(1000));
    }
}
