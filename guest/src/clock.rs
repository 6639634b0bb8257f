//! The guest's clocks: what they say, and following the host's.
//!
//! A clock that is wrong is stepped, not slewed: a guest that was paused for an hour would slew for weeks (the kernel slews by 0.5 ms a
//! second), and until then its certificates and timestamps are wrong. What is below [`TOLERANCE_MS`] is left to the guest's time
//! server, if it has one: the host's word is itself some milliseconds old when it arrives.

use nix::{
    errno::Errno,
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A clock that is off by no more is left alone.
const TOLERANCE_MS: u64 = 500;

/// Before 2001 or beyond 2200 the host is wrong, not the guest.
const SENSIBLE: std::ops::Range<u64> = 1_000_000_000_000..7_258_118_400_000;

/// What a clock needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Correction {
    /// Nothing.
    None,
    /// A step forward by so many milliseconds.
    Forward(u64),
    /// A step back: programs see a time again that has been.
    Back(u64),
    /// The host's own clock makes no sense.
    Senseless,
}

/// What the guest's clock needs to follow the host's; both in milliseconds since 1970.
pub(crate) fn judge(host: u64, guest: u64) -> Correction {
    let off = host.abs_diff(guest);
    if !SENSIBLE.contains(&host) {
        Correction::Senseless
    } else if off <= TOLERANCE_MS {
        Correction::None
    } else if host > guest {
        Correction::Forward(off)
    } else {
        Correction::Back(off)
    }
}

/// Makes the clock follow the host's; what was done.
pub(crate) fn follow(host: u64) -> Result<Correction, Errno> {
    let correction = judge(host, unix_ms());
    if matches!(correction, Correction::Forward(_) | Correction::Back(_)) {
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_millis(host)))?;
    }
    Ok(correction)
}

impl Correction {
    /// For the log; `None` where nothing happened.
    pub(crate) fn in_words(self) -> Option<String> {
        let (by, how) = match self {
            Self::None => return None,
            Self::Senseless => {
                return Some("the host's clock makes no sense; this one is left as it is".into());
            }
            Self::Forward(by) => (by, "behind the host's: set forward"),
            Self::Back(by) => (by, "ahead of the host's: set back"),
        };
        Some(format!("the clock was {by} ms {how}"))
    }
}

/// The guest's clock, milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since the kernel's start, by a clock that nobody can set.
pub(crate) fn uptime_ms() -> u64 {
    // Linux has had this clock since 2.6.39, and no privilege is needed to read it.
    let since = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000;

    #[test]
    fn a_clock_is_stepped_when_it_is_off_by_more_than_a_little() {
        assert_eq!(judge(NOW, NOW), Correction::None);
        assert_eq!(judge(NOW + TOLERANCE_MS, NOW), Correction::None);
        assert_eq!(judge(NOW, NOW + TOLERANCE_MS), Correction::None);
        // A pause of an hour.
        assert_eq!(judge(NOW + 3_600_000, NOW), Correction::Forward(3_600_000));
        assert_eq!(judge(NOW, 0), Correction::Forward(NOW));
        assert_eq!(judge(NOW, NOW + 501), Correction::Back(501));
        assert_eq!(judge(NOW, u64::MAX), Correction::Back(u64::MAX - NOW));
    }

    #[test]
    fn a_senseless_clock_is_not_taken_over() {
        for host in [0, 999_999_999_999, 7_258_118_400_000, u64::MAX] {
            assert_eq!(judge(host, NOW), Correction::Senseless);
            assert_eq!(follow(host).unwrap(), Correction::Senseless);
        }
    }

    #[test]
    fn every_step_has_a_line() {
        assert_eq!(Correction::None.in_words(), None);
        assert_eq!(
            Correction::Back(700).in_words().unwrap(),
            "the clock was 700 ms ahead of the host's: set back"
        );
        assert!(Correction::Forward(700).in_words().unwrap().contains("set forward"));
        assert!(Correction::Senseless.in_words().is_some());
    }

    #[test]
    fn uptime_only_grows() {
        let before = uptime_ms();
        assert!(before > 0 && uptime_ms() >= before);
    }
}
