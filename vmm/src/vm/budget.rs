//! The memory of this host, and which VMs have taken how much of it: those that run or are being started.

use crate::fleet::{
    limits::{HostFacts, Need, OverBudget},
    units::Size,
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Who has how much of the host's memory. A VM holds its share from the decision to start it until nothing of it is left.
#[derive(Debug)]
pub struct Budget {
    host: HostFacts,
    taken: Mutex<BTreeMap<String, Size>>,
}

impl Budget {
    /// The budget of `host`, of which nothing is taken.
    pub fn new(host: HostFacts) -> Self {
        Self { host, taken: Mutex::default() }
    }

    /// Takes memory for a VM that is to start, or says why there is not enough.
    ///
    /// Looking and taking are one step, so of two VMs for which there is room once, one starts.
    pub fn admit(&self, vm: &str, wanted: Need) -> Result<(), OverBudget> {
        let mut taken = self.taken();
        let others = taken.iter().filter(|(name, _)| *name != vm);
        let others = others.fold(0_u64, |sum, (_, size)| sum.saturating_add(size.0));
        self.host.admit(wanted, Size(others))?;
        taken.insert(vm.into(), wanted.sum());
        Ok(())
    }

    /// Takes memory for a VM that has it already.
    pub fn adopt(&self, vm: &str, has: Need) {
        self.taken().insert(vm.into(), has.sum());
    }

    /// Gives back what a VM has taken, if anything.
    pub fn release(&self, vm: &str) {
        self.taken().remove(vm);
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<String, Size>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A gibibyte of it is not the guest's: that counts like the rest.
    fn need(sum: u64) -> Need {
        let overhead = sum.min(GIB);
        Need { guest: Size(sum - overhead), overhead: Size(overhead) }
    }

    /// 14 GiB for VMs.
    fn budget() -> Budget {
        let budget = Budget::new(HostFacts { cpus: 4, memory: Size(15 * GIB) });
        assert_eq!(budget.host.budget(), Size(15 * GIB - (960 << 20)));
        budget
    }

    #[test]
    fn cf5_what_runs_counts_until_it_has_ended() {
        let budget = budget();
        budget.admit("a", need(8 * GIB)).unwrap();
        let refused = budget.admit("b", need(7 * GIB)).unwrap_err();
        assert_eq!(
            (refused.wanted, refused.taken, refused.sum),
            (need(7 * GIB), Size(8 * GIB), Size(15 * GIB))
        );
        budget.admit("c", need(6 * GIB)).unwrap();
        budget.release("a");
        budget.admit("b", need(7 * GIB)).unwrap();
        assert!(budget.admit("a", need(2 * GIB)).is_err());
    }

    #[test]
    fn cf5_a_refusal_takes_nothing_and_a_vm_does_not_stand_in_its_own_way() {
        let budget = budget();
        budget.admit("a", need(8 * GIB)).unwrap();
        assert!(budget.admit("b", need(10 * GIB)).is_err());
        budget.admit("a", need(14 * GIB)).unwrap();
        budget.release("a");
        budget.release("never seen");
        budget.admit("b", need(14 * GIB)).unwrap();
    }

    #[test]
    fn cf5_a_vm_that_runs_already_is_not_asked_but_counts() {
        let budget = budget();
        budget.adopt("a", need(20 * GIB));
        assert!(budget.admit("b", need(64 << 20)).is_err());
    }
}
