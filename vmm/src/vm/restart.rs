//! Whether and when a VM that failed is started again (pure).

use crate::fleet::schema::Restart;
use serde::{Deserialize, Serialize};

/// Milliseconds on the host's monotonic clock, which neither a change of the date nor a restart of `laird` moves. It begins anew with
/// each boot of the host.
pub type Moment = u64;

/// How many starts may happen within [`WINDOW`].
pub const STARTS_MAX: usize = 5;

/// Ten minutes: the window in which starts are counted, and how long a VM has to be ready for them to be forgotten.
pub const WINDOW: Moment = 10 * 60 * 1000;

/// The longest pause before a start, in seconds; the shortest is one.
const PAUSE_MAX: u64 = 300;

/// The starts since an operator last started the VM, or since it was last ready for long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// When, of the last [`STARTS_MAX`].
    starts: Vec<Moment>,
    /// How many.
    count: u32,
}

/// What comes after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It has been started too often.
    GiveUp,
    /// It is started after so many seconds.
    Wait(u64),
}

impl History {
    /// Notes a start.
    pub fn started(&mut self, now: Moment) {
        if self.starts.len() >= STARTS_MAX {
            self.starts.remove(0);
        }
        self.starts.push(now);
        self.count = self.count.saturating_add(1);
    }

    /// How often it was started without an operator's word.
    pub fn restarts(&self) -> u32 {
        self.count.saturating_sub(1)
    }

    /// What comes after a failure.
    pub fn next(&self, now: Moment) -> Next {
        let recent = self.starts.iter().filter(|start| now.saturating_sub(**start) < WINDOW).count();
        if recent >= STARTS_MAX {
            return Next::GiveUp;
        }
        Next::Wait(1_u64.checked_shl(self.restarts()).map_or(PAUSE_MAX, |pause| pause.clamp(1, PAUSE_MAX)))
    }
}

/// Whether a VM under `policy` is started again after it failed, or after its guest powered off.
pub fn provides(policy: Restart, powered_off: bool) -> bool {
    match policy {
        Restart::Never => false,
        Restart::OnFailure => !powered_off,
        Restart::Always => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pauses_double_up_to_five_minutes() {
        let mut history = History::default();
        let pauses: Vec<_> = (0..12)
            .map(|index| {
                history.started(index * WINDOW);
                history.next(index * WINDOW)
            })
            .collect();
        let expected = [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300].map(Next::Wait);
        assert_eq!(pauses, expected);
        for _ in 0..100 {
            history.started(20 * WINDOW);
        }
        assert_eq!(history.starts.len(), STARTS_MAX);
        assert_eq!(history.next(40 * WINDOW), Next::Wait(300));
    }

    proptest! {
        /// However long each run lasts: no ten minutes have more starts than allowed.
        #[test]
        fn hv3_starts_are_bounded(runs in prop::collection::vec(0..WINDOW, 1..60)) {
            let (mut history, mut now, mut starts) = (History::default(), 0, vec![]);
            for run in runs {
                history.started(now);
                starts.push(now);
                now += run;
                match history.next(now) {
                    Next::Wait(seconds) => now += seconds * 1000,
                    _ => break,
                }
            }
            for start in &starts {
                let within = starts.iter().filter(|other| (*start..*start + WINDOW).contains(other)).count();
                prop_assert!(within <= STARTS_MAX);
            }
        }
    }
}
