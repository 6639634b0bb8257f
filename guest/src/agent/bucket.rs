//! A token bucket: how much may be said, and how much was not.

use std::time::{Duration, Instant};

/// Lets `burst` things pass at once and one in every `interval` after that.
#[derive(Debug)]
pub(super) struct Bucket {
    interval: Duration,
    burst: u32,
    tokens: u32,
    refilled: Instant,
    dropped: u64,
}

impl Bucket {
    pub(super) fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Self { interval, burst, tokens: burst, refilled: now, dropped: 0 }
    }

    /// Whether one more thing may pass; if so, how many have been dropped since the last that did.
    pub(super) fn take(&mut self, now: Instant) -> Option<u64> {
        while self.tokens < self.burst && now.saturating_duration_since(self.refilled) >= self.interval {
            self.tokens = self.tokens.saturating_add(1);
            self.refilled = self.refilled.checked_add(self.interval).unwrap_or(now);
        }
        if self.tokens == self.burst {
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.tokens = self.tokens.saturating_sub(1);
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs5_a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut bucket = Bucket::new(2, second, start);
        assert_eq!([bucket.take(start), bucket.take(start), bucket.take(start)], [Some(0), Some(0), None]);
        assert_eq!(bucket.take(start), None);
        assert_eq!(bucket.take(start + second), Some(2));
        assert_eq!(bucket.take(start + second), None);
        // A long silence gives a burst, not more.
        let later = start + 1000 * second;
        assert_eq!([bucket.take(later), bucket.take(later), bucket.take(later)], [Some(1), Some(0), None]);
    }
}
