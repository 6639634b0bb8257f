//! Log lines that a guest can cause: at most one a second, the others counted.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The least time between two lines.
const PAUSE: Duration = Duration::from_secs(1);

/// Lets one line a second through.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    skipped: u64,
}

impl Throttle {
    /// A throttle that lets the first line through.
    pub const fn new() -> Self {
        Self(Mutex::new(State { last: None, skipped: 0 }))
    }

    /// Whether to write a line now, and if so, how many were left out since the one before.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            state.skipped = state.skipped.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_a_count() {
        let throttle = Throttle::new();
        let start = Instant::now();
        let at = |ms| throttle.admit_at(start + Duration::from_millis(ms));
        assert_eq!(at(0), Some(0));
        assert_eq!(at(1), None);
        assert_eq!(at(999), None);
        assert_eq!(at(1000), Some(2));
        assert_eq!(at(2000), Some(0));
    }
}
