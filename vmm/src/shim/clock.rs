//! The guest's clock beside the host's: how far it is off, and when the guest is to be told. Pure.
//!
//! A guest that was paused goes on where it stopped: its clock is behind by the pause. It is told at once. A clock that is off without
//! a pause may follow a time server that the host does not; it is told again only after [`RETRY_MS`], so that the two do not fight.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::state::unix_ms;
use crate::vm::trace;

/// A clock that is off by more is to be set.
const TOLERANCE_MS: u64 = 1000;

/// A guest whose own clock ran so much less than the host's between two answers was paused.
const PAUSE_MS: u64 = 1000;

/// How long a guest that was told is left alone, in milliseconds.
const RETRY_MS: u64 = 600_000;

/// What the host's clocks say at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostClocks {
    /// CLOCK_BOOTTIME in milliseconds.
    pub(super) boot_ms: u64,
    /// Milliseconds since 1970.
    pub(super) unix_ms: u64,
}

impl HostClocks {
    pub(super) fn now() -> Self {
        Self { boot_ms: trace::now_ms(), unix_ms: unix_ms() }
    }
}

/// What the guest's clocks said, and the host's in the middle of the exchange.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    host: HostClocks,
    guest_boot_ms: u64,
    guest_unix_ms: u64,
    /// From the question to the answer. What is said of the guest's clocks is right to half of it.
    pub(super) round_trip_ms: u64,
}

impl Sample {
    /// A sample from an exchange that began at `asked` and ended at `answered`.
    pub(super) fn new(
        asked: HostClocks,
        answered: HostClocks,
        guest_boot_ms: u64,
        guest_unix_ms: u64,
    ) -> Self {
        let round_trip_ms = answered.boot_ms.saturating_sub(asked.boot_ms);
        let half = half(round_trip_ms);
        let host = HostClocks {
            boot_ms: asked.boot_ms.saturating_add(half),
            // Counted back from the end: the host's clock may have been set in between.
            unix_ms: answered.unix_ms.saturating_sub(half),
        };
        Self { host, guest_boot_ms, guest_unix_ms, round_trip_ms }
    }

    /// The host's clock minus the guest's.
    pub(super) fn skew_ms(&self) -> i64 {
        let off = i64::try_from(self.host.unix_ms.abs_diff(self.guest_unix_ms)).unwrap_or(i64::MAX);
        if self.host.unix_ms >= self.guest_unix_ms { off } else { off.saturating_neg() }
    }

    /// When the guest's kernel started, by the host's CLOCK_BOOTTIME.
    pub(super) fn guest_start_ms(&self) -> u64 {
        self.host.boot_ms.saturating_sub(self.guest_boot_ms)
    }

    /// How far the guest's clock is off beyond what may be the exchange's own doing.
    fn off_ms(&self) -> u64 {
        self.skew_ms().unsigned_abs().saturating_sub(half(self.round_trip_ms))
    }
}

fn half(ms: u64) -> u64 {
    ms >> 1
}

/// Why a guest's clock is to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The guest did not run for so many milliseconds.
    Pause(u64),
    /// It is wrong, and nobody knows why.
    Off,
}

/// Follows one guest's clock through one boot.
#[derive(Debug, Default)]
pub(super) struct ClockWatch {
    last: Option<Sample>,
    /// When the guest was told last, by the host's CLOCK_BOOTTIME.
    told_ms: Option<u64>,
}

impl ClockWatch {
    /// Whether the guest's clock is to be set now. The answer counts as followed.
    pub(super) fn judge(&mut self, sample: Sample) -> Option<Cause> {
        let pause = self.last.replace(sample).map_or(0, |last| {
            let host = sample.host.boot_ms.saturating_sub(last.host.boot_ms);
            let guest = sample.guest_boot_ms.saturating_sub(last.guest_boot_ms);
            let uncertain = half(last.round_trip_ms).saturating_add(half(sample.round_trip_ms));
            host.saturating_sub(guest).saturating_sub(uncertain)
        });
        if sample.off_ms() <= TOLERANCE_MS {
            return None;
        }
        let told = self.told_ms.is_some_and(|told| sample.host.boot_ms.saturating_sub(told) < RETRY_MS);
        let cause = match (pause > PAUSE_MS, told) {
            (true, _) => Cause::Pause(pause),
            (false, true) => return None,
            (false, false) => Cause::Off,
        };
        self.told_ms = Some(sample.host.boot_ms);
        Some(cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIX: u64 = 1_700_000_000_000;

    #[allow(clippy::arithmetic_side_effects, reason = "the tests choose the numbers")]
    /// A sample at `at` of the host's time, whose guest has run for `ran` and is behind by `behind`.
    fn sample(at: u64, ran: u64, behind: u64, round_trip: u64) -> Sample {
        let asked = HostClocks { boot_ms: at, unix_ms: UNIX + at };
        let answered = HostClocks { boot_ms: at + round_trip, unix_ms: UNIX + at + round_trip };
        Sample::new(asked, answered, ran, UNIX + at + round_trip / 2 - behind)
    }

    #[test]
    fn the_middle_of_the_exchange_is_compared() {
        let late = sample(50_000, 4_000, 300, 2_000);
        assert_eq!((late.skew_ms(), late.round_trip_ms, late.guest_start_ms()), (300, 2_000, 47_000));
        let answered = HostClocks { boot_ms: 10, unix_ms: 0 };
        let ahead = Sample::new(answered, answered, u64::MAX, u64::MAX);
        assert_eq!((ahead.skew_ms(), ahead.guest_start_ms()), (-i64::MAX, 0));
    }

    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        let mut watch = ClockWatch::default();
        for second in 0..1000 {
            assert_eq!(watch.judge(sample(second * 1000, second * 1000, 900, 2)), None);
        }
        // Two seconds may be the fault of a slow answer.
        assert_eq!(watch.judge(sample(1_000_000, 1_000_000, 2_000, 4_000)), None);
    }

    #[test]
    fn a_pause_is_followed_at_once_each_time() {
        let mut watch = ClockWatch::default();
        assert_eq!(watch.judge(sample(5_000, 5_000, 0, 2)), None);
        assert_eq!(watch.judge(sample(70_000, 10_000, 60_000, 2)), Some(Cause::Pause(59_998)));
        assert_eq!(watch.judge(sample(75_000, 15_000, 0, 2)), None);
        assert_eq!(watch.judge(sample(90_000, 20_000, 10_000, 2)), Some(Cause::Pause(9_998)));
    }

    #[test]
    fn a_clock_that_follows_another_is_not_fought() {
        let mut watch = ClockWatch::default();
        let told = |at| sample(at, at, 5_000, 2);
        assert_eq!(watch.judge(told(0)), Some(Cause::Off));
        let causes: Vec<_> = (1..120).filter_map(|n| watch.judge(told(n * 5_000))).collect();
        assert_eq!(causes, []);
        assert_eq!(watch.judge(told(600_000)), Some(Cause::Off));
    }
}
