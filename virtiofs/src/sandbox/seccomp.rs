//! The filters of system calls, made of the lists in [`calls`].
//!
//! Filters stack: of all that a thread has, the strictest answer counts. Each thread has one that gives some calls an errno and one
//! that ends the process for what is on no list; workers have a third, with a shorter list.

use super::{
    SandboxError,
    calls::{Argument, CLONE3, Call, FUTILE, OTHERS, REFUSED, WORKER},
};
use nix::libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};
use std::{cell::Cell, collections::BTreeMap, env::consts::ARCH, io, sync::OnceLock};
use tracing::error;

/// The workers' filter, once the process is confined.
static WORKERS: OnceLock<BpfProgram> = OnceLock::new();

thread_local! {
    static RESTRICTED: Cell<bool> = const { Cell::new(false) };
}

/// Compiled filters.
#[derive(Debug)]
pub(super) struct Filters {
    errno: BpfProgram,
    process: BpfProgram,
    worker: BpfProgram,
}

impl Filters {
    pub(super) fn compile() -> Result<Self, BackendError> {
        let futile = || FUTILE.iter().map(|number| (*number, vec![]));
        let clone3 = || [(CLONE3, vec![])].into_iter();
        let worker = rules(&[WORKER])?;
        let all = rules(&[WORKER, OTHERS])?;
        let refuse = SeccompAction::Errno(REFUSED.unsigned_abs());
        Ok(Self {
            errno: program(futile().chain(clone3()).collect(), SeccompAction::Allow, refuse)?,
            process: allow_only(all.into_iter().chain(futile()).chain(clone3()))?,
            worker: allow_only(worker.into_iter().chain(futile()))?,
        })
    }

    /// Confines all threads of the process, and all that they will make.
    pub(super) fn apply(self) -> io::Result<()> {
        seccompiler::apply_filter_all_threads(&self.errno).map_err(cause)?;
        seccompiler::apply_filter_all_threads(&self.process).map_err(cause)?;
        // Nobody else sets it.
        let _ = WORKERS.set(self.worker);
        Ok(())
    }
}

/// Confines the calling thread to what a worker needs, for good. Does nothing if it is already, or if the process is not. To be
/// called at the start of each thread that touches what a guest wrote, or again and again.
pub fn restrict_worker() {
    if RESTRICTED.get() {
        return;
    }
    let Some(filter) = WORKERS.get() else { return };
    if let Err(error) = seccompiler::apply_filter(filter).map_err(cause) {
        error!(%error, "Cannot confine a worker; this ends the backend");
        std::process::exit(1);
    }
    RESTRICTED.set(true);
}

/// Confines the calling thread as workers of a confined process are, for good, and leaves all others as they are. For benches: what the filters
/// cost is part of what no backend can be faster than.
pub fn restrict_like_worker() -> Result<(), SandboxError> {
    let Filters { errno, process, worker } = Filters::compile().map_err(SandboxError::Filters)?;
    [errno, process, worker]
        .iter()
        .try_for_each(|filter| seccompiler::apply_filter(filter).map_err(cause))
        .map_err(SandboxError::Seccomp)
}

/// The system's own error, where it is one.
fn cause(error: Error) -> io::Error {
    match error {
        Error::Prctl(error) | Error::Seccomp(error) => error,
        other => io::Error::other(other),
    }
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn allow_only(rules: impl Iterator<Item = (c_long, Vec<SeccompRule>)>) -> Result<BpfProgram, BackendError> {
    program(rules.collect(), SeccompAction::KillProcess, SeccompAction::Allow)
}

fn program(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, these, ARCH.try_into()?)?.try_into()
}

/// A call that is on several lists may do what each of them says.
fn rules(lists: &[&[Call]]) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    for (number, arguments) in lists.iter().copied().flatten() {
        let chain = arguments.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
        rules.entry(*number).or_default().extend(chain);
    }
    Ok(rules)
}

fn rule(arguments: &&[Argument]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(arguments.iter().map(condition).collect::<Result<_, _>>()?)
}

fn condition(argument: &Argument) -> Result<SeccompCondition, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq};
    match *argument {
        Argument::Is(number, value) => SeccompCondition::new(number, Dword, Eq, value.into()),
        Argument::Lacks(number, bits) => SeccompCondition::new(number, Dword, MaskedEq(bits.into()), 0),
        Argument::IsBut(number, value, mask) => SeccompCondition::new(number, Qword, MaskedEq(!mask), value),
        Argument::IsOwnPid(number) => SeccompCondition::new(number, Dword, Eq, std::process::id().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_call_is_allowed_with_any_arguments_or_with_some_but_not_both() {
        let mut any = HashSet::new();
        let mut some = HashSet::new();
        for (number, arguments) in WORKER.iter().chain(OTHERS) {
            if arguments.is_empty() {
                assert!(any.insert(*number), "{number} is there twice");
            } else {
                some.insert(*number);
            }
        }
        assert!(any.is_disjoint(&some));
        for number in FUTILE.iter().chain([&CLONE3]) {
            assert!(!any.contains(number) && !some.contains(number), "{number} would be refused");
        }
    }

    #[test]
    fn filters_compile() {
        let filters = Filters::compile().unwrap();
        // The kernel takes 4096 instructions.
        for filter in [filters.errno, filters.process, filters.worker] {
            assert!(filter.len() < 1000, "{}", filter.len());
        }
    }
}
