//! Which attempts have a line of their own. Pure: the caller brings the time.

use super::{Verdict, limits};
use crate::shim::rate::Rate;
use std::{collections::BTreeMap, time::Instant};

/// Whose attempts at what, and what came of them: a flood of one thing hides no other. Without a uid and a verb it stands for all
/// beyond the number that is kept apart.
type Whose = (Option<(u32, &'static str)>, Verdict);

/// The rates of all uids.
#[derive(Debug, Default)]
pub(super) struct Rates {
    rates: BTreeMap<Whose, Rate>,
}

impl Rates {
    /// Whether one more attempt has a line of its own.
    pub(super) fn admit(&mut self, uid: u32, verb: &'static str, verdict: Verdict, now: Instant) -> bool {
        let mut whose = (Some((uid, verb)), verdict);
        if self.rates.len() >= limits::AUDIT_UIDS && !self.rates.contains_key(&whose) {
            whose.0 = None;
        }
        self.rates.entry(whose).or_insert_with(|| Rate::new(limits::AUDIT_EACH_SECOND)).admit(now)
    }

    /// How many were left out in seconds that are over. Rates that have nothing to tell any more are forgotten.
    pub(super) fn suppressed(&mut self, now: Instant) -> Vec<(Whose, u64)> {
        let counted =
            self.rates.iter_mut().filter_map(|(whose, rate)| Some((*whose, rate.suppressed(now)?))).collect();
        self.rates.retain(|_, rate| !rate.is_over(now));
        counted
    }

    /// Whether no second goes on, and nothing is left to tell.
    pub(super) fn is_empty(&self) -> bool {
        self.rates.is_empty()
    }

    /// How many were left out.
    pub(super) fn rest(&mut self) -> Vec<(Whose, u64)> {
        self.rates.iter_mut().filter_map(|(whose, rate)| Some((*whose, rate.rest()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn uids_without_number_take_no_memory_without_bound() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        let told = (0..10_000).filter(|uid| rates.admit(*uid, "start", Verdict::Refused, now)).count();
        assert_eq!(told, limits::AUDIT_UIDS + 20);
        assert_eq!(rates.rates.len(), limits::AUDIT_UIDS + 1);
        let later = now + Duration::from_secs(1);
        let counted = rates.suppressed(later);
        assert_eq!(counted, [((None, Verdict::Refused), 10_000 - 276)]);
        assert!(rates.rates.is_empty());
    }
}
