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

/// The most fast requests that are waited for before polling is tried again.
const DOUBT_MAX: u16 = 1024;

/// What is known about one queue's pace.
///
/// Requests that come fast are no proof that polling finds them: where the guest has to share this CPU, it cannot send the next one
/// as long as this thread polls. So each time that polling was tried again in vain, twice as many fast requests must come before
/// the next try.
#[derive(Debug)]
pub(super) struct Pace {
    misses: u8,
    asleep: Option<Instant>,
    /// Fast requests since polling was given up, and how many it takes to try again.
    fast: u16,
    doubt: u16,
}

impl Default for Pace {
    fn default() -> Self {
        Self { misses: 0, asleep: None, fast: 0, doubt: 1 }
    }
}

impl Pace {
    /// Whether to poll now.
    pub(super) fn polls(&self) -> bool {
        self.misses < MISSES
    }

    /// Polling found a request.
    pub(super) fn hit(&mut self) {
        (self.misses, self.doubt) = (0, 1);
    }

    /// Polling that took `spent` found nothing.
    pub(super) fn miss(&mut self, spent: Duration) {
        // Where others want the CPU, polling takes it from those who would send the next request.
        self.misses = if spent > CROWDED { MISSES } else { self.misses.saturating_add(1).min(MISSES) };
        if !self.polls() {
            self.fast = 0;
            self.doubt = self.doubt.saturating_mul(2).min(DOUBT_MAX);
        }
    }

    /// The thread goes to sleep.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.asleep = Some(now);
    }

    /// A request woke the thread.
    pub(super) fn wakes(&mut self, now: Instant) {
        let Some(since) = self.asleep.take() else { return };
        if self.polls() || now.saturating_duration_since(since) >= FAST {
            return;
        }
        self.fast = self.fast.saturating_add(1);
        if self.fast >= self.doubt {
            // One try.
            self.misses = MISSES.saturating_sub(1);
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;

    fn wake(pace: &mut Pace, after: Duration) {
        let now = Instant::now();
        pace.sleeps(now);
        pace.wakes(now + after);
    }

    #[test]
    fn polls_while_it_pays() {
        let mut pace = Pace::default();
        assert!(pace.polls());
        pace.miss(WINDOW);
        assert!(pace.polls());
        pace.hit();
        pace.miss(WINDOW);
        pace.miss(WINDOW);
        assert!(!pace.polls());
        // A request now and then does not make it poll again, requests in quick succession do.
        (0..100).for_each(|_| wake(&mut pace, FAST * 10));
        assert!(!pace.polls());
        (0..2).for_each(|_| wake(&mut pace, FAST / 2));
        assert!(pace.polls());
    }

    #[test]
    fn polling_in_vain_becomes_rare_however_fast_requests_come() {
        let mut pace = Pace::default();
        let mut polled = 0;
        for _ in 0..10_000 {
            while pace.polls() {
                pace.miss(WINDOW);
                polled += 1;
            }
            wake(&mut pace, FAST / 2);
        }
        assert!(polled < 25, "{polled}");
        // As soon as it finds something, it polls as ever.
        (0..DOUBT_MAX).for_each(|_| wake(&mut pace, FAST / 2));
        assert!(pace.polls());
        pace.hit();
        pace.miss(WINDOW);
        assert!(pace.polls());
    }

    #[test]
    fn gives_up_at_once_on_a_crowded_host() {
        let mut pace = Pace::default();
        pace.miss(CROWDED * 2);
        assert!(!pace.polls());
    }
}
