//! When to look for the next request by polling, before sleeping.
//!
//! A guest that works through files sends its next request a few microseconds after the last reply, and waking a sleeping thread
//! costs more than that. So a queue that has just been busy polls for a short time. Whether that pays is seen: polling that found
//! nothing is given up, until requests come fast again.

use std::time::{Duration, Instant};

/// How long to poll. A guest's virtual CPU takes up to about this to wake up, look at a reply and send the next request; the
/// figures are in the module's bench (`tests/bench virtiofs`).
pub(super) const WINDOW: Duration = Duration::from_micros(50);

/// A request that comes this soon after the last one would have been worth polling for.
const FAST: Duration = Duration::from_micros(100);

/// How often polling may fail in a row before it is given up.
const MISSES: u8 = 2;

/// A window that took this much longer than it should was interrupted by other work for the CPU.
const CROWDED: Duration = Duration::from_micros(500);

/// What is known about one queue's pace.
#[derive(Debug, Default)]
pub(super) struct Pace {
    misses: u8,
    asleep: Option<Instant>,
}

impl Pace {
    /// Whether to poll now.
    pub(super) fn polls(&self) -> bool {
        self.misses < MISSES
    }

    /// Polling found a request.
    pub(super) fn hit(&mut self) {
        self.misses = 0;
    }

    /// Polling that took `spent` found nothing.
    pub(super) fn miss(&mut self, spent: Duration) {
        // Where others want the CPU, polling takes it from those who would send the next request.
        self.misses = if spent > CROWDED { MISSES } else { self.misses.saturating_add(1).min(MISSES) };
    }

    /// The thread goes to sleep.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.asleep = Some(now);
    }

    /// A request woke the thread.
    pub(super) fn wakes(&mut self, now: Instant) {
        if let Some(since) = self.asleep.take()
            && now.saturating_duration_since(since) < FAST
        {
            self.misses = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_while_it_pays() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert!(pace.polls());
        pace.miss(WINDOW);
        assert!(pace.polls());
        pace.hit();
        pace.miss(WINDOW);
        pace.miss(WINDOW);
        assert!(!pace.polls());
        // A request now and then does not make it poll again, requests in quick succession do.
        pace.sleeps(start);
        pace.wakes(start + FAST * 10);
        assert!(!pace.polls());
        pace.sleeps(start);
        pace.wakes(start + FAST / 2);
        assert!(pace.polls());
    }

    #[test]
    fn gives_up_at_once_on_a_crowded_host() {
        let mut pace = Pace::default();
        pace.miss(CROWDED * 2);
        assert!(!pace.polls());
    }
}
