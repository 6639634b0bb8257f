//! A limit on how often something is recorded, that counts what it leaves out. Pure: the caller brings the time.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(1);

/// Lets a number of things pass in each second and counts the others.
#[derive(Debug)]
pub(crate) struct Rate {
    each_second: u32,
    since: Option<Instant>,
    passed: u32,
    /// Left out in this second.
    suppressed: u64,
    /// Left out in seconds that are over, and not told yet.
    due: u64,
}

impl Rate {
    pub(crate) fn new(each_second: u32) -> Self {
        Self { each_second, since: None, passed: 0, suppressed: 0, due: 0 }
    }

    /// Whether one more passes now.
    pub(crate) fn admit(&mut self, now: Instant) -> bool {
        if self.is_due(now) {
            self.since = Some(now);
            self.passed = 0;
        }
        let pass = self.passed < self.each_second;
        if pass {
            self.passed = self.passed.saturating_add(1);
        } else {
            self.suppressed = self.suppressed.saturating_add(1);
        }
        pass
    }

    /// Whether its second is over. What was left out in it is due then, also if the next one begins before that is asked for.
    fn is_due(&mut self, now: Instant) -> bool {
        let over = self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW);
        if over {
            self.due = self.due.saturating_add(std::mem::take(&mut self.suppressed));
        }
        over
    }

    /// How many were left out, once their second is over; then it counts from zero.
    pub(crate) fn suppressed(&mut self, now: Instant) -> Option<u64> {
        self.is_due(now);
        Some(std::mem::take(&mut self.due)).filter(|n| *n > 0)
    }

    /// Whether its second is over, and nothing is left to tell of it.
    pub(crate) fn is_over(&mut self, now: Instant) -> bool {
        self.is_due(now) && self.due == 0
    }

    /// How many were left out, now.
    pub(crate) fn rest(&mut self) -> Option<u64> {
        let all = std::mem::take(&mut self.due).saturating_add(std::mem::take(&mut self.suppressed));
        Some(all).filter(|n| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_the_rate_is_counted() {
        let mut rate = Rate::new(2);
        let start = Instant::now();
        let admitted = (0..100).filter(|_| rate.admit(start)).count();
        assert_eq!(admitted, 2);
        assert_eq!(rate.suppressed(start), None, "Its second is not over");
        let later = start + WINDOW;
        assert!(rate.admit(later));
        assert_eq!(rate.rest(), Some(98));
        assert_eq!(rate.suppressed(later + WINDOW), None);
    }

    #[test]
    fn a_lasting_flood_is_told_each_second() {
        let mut rate = Rate::new(20);
        let start = Instant::now();
        let (mut passed, mut told) = (0, Vec::new());
        // Asked only when something was admitted, as a writer does that wakes with a line.
        for step in 0..500 {
            let now = start + Duration::from_millis(10) * step;
            if rate.admit(now) {
                passed += 1;
                told.extend(rate.suppressed(now));
            }
        }
        assert_eq!((passed, told), (100, vec![80; 4]));
        assert_eq!(rate.rest(), Some(80));
    }

    #[test]
    fn a_burst_is_told_after_its_second() {
        let mut rate = Rate::new(1);
        let start = Instant::now();
        assert!(rate.admit(start) && !rate.admit(start));
        assert_eq!(rate.suppressed(start + WINDOW), Some(1));
        assert_eq!(rate.suppressed(start + WINDOW), None);
    }
}
