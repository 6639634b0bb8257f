//! Which requests are timed: looking at the clock twice is a tenth of the time that a request takes.
//!
//! Not each eighth: of requests for two files in turn, it would always be the same file's. What that one takes would pass for what both
//! take, and that the other one has come to be read from a disk would never be seen.

/// One in so many is, in the long run.
pub(super) const TIMED: u8 = 8;

/// Chooses them.
#[derive(Debug, Default)]
pub(super) struct Sample {
    /// How many come before the next one that is timed.
    before: u8,
    /// The last number of a linear congruential generator. No secret: a guest that knows which are timed only deceives itself.
    random: u32,
}

impl Sample {
    /// Whether the next request is timed.
    #[inline]
    pub(super) fn is_timed(&mut self) -> bool {
        match self.before.checked_sub(1) {
            Some(before) => self.before = before,
            None => {
                // The factors are Knuth's and Lewis's; the upper bits are the ones that are good (Numerical Recipes, 7.1).
                self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // 0 to 14, each as often: with the one that is timed, 8 in the mean.
                let spread = u64::from(TIMED).wrapping_mul(2).wrapping_sub(1);
                let chosen = u64::from(self.random).wrapping_mul(spread) >> 32;
                self.before = u8::try_from(chosen).unwrap_or(TIMED);
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;

    #[test]
    fn one_in_eight_is_timed_in_the_long_run() {
        let mut sample = Sample::default();
        let timed = (0..80_000).filter(|_| sample.is_timed()).count();
        assert!((9_800..10_200).contains(&timed), "{timed}");
    }

    /// However many take turns, each of them is timed soon.
    #[test]
    fn requests_that_come_in_turn_are_all_timed() {
        for turns in 1..=128 {
            let mut sample = Sample::default();
            let mut timed = vec![0; turns];
            (0..turns * 200).filter(|_| sample.is_timed()).for_each(|number| timed[number % turns] += 1);
            assert!(timed.iter().all(|&count| (5..60).contains(&count)), "{turns}: {timed:?}");
        }
    }
}
