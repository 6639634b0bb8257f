//! Doing the same for many things, in a few threads.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use std::{
    panic::resume_unwind,
    thread::{self, Builder},
};

/// The most threads: what is done here is as much the kernel's work, which gets no faster with more.
const THREADS_MAX: usize = 4;

/// For fewer things than this, one more thread takes longer to make than it spares: about 0.1 ms, as twenty things take.
const EACH_MIN: usize = 100;

const THIS_THREAD: Pid = Pid::from_raw(0);

/// What `work` makes of all of them, in their order, in parts; it is given some at a time. The caller's thread works as well, and does what others cannot
/// be made for; none of them is left afterwards.
pub(super) fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&[T]) -> Vec<R> + Sync) -> Vec<Vec<R>> {
    let most = items.len().checked_div(EACH_MIN).unwrap_or_default().min(THREADS_MAX);
    if most < 2 {
        return vec![work(items)];
    }
    let mut processors = Processors::allowed();
    let threads = most.min(processors.count());
    let work = &work;
    thread::scope(|scope| {
        let mut parts = items.chunks(items.len().div_ceil(threads).max(1));
        let own = parts.next().unwrap_or_default();
        let others: Vec<_> = parts
            .map(|part| {
                let thread = Builder::new().name("index".into()).spawn_scoped(scope, move || work(part));
                processors.leave_this();
                (part, thread)
            })
            .collect();
        let mut results = vec![work(own)];
        for (part, thread) in others {
            match thread.map(|thread| thread.join()) {
                Ok(Ok(more)) => results.push(more),
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_) => results.push(work(part)),
            }
        }
        results
    })
}

/// The processors that this thread may run on.
struct Processors {
    all: Option<CpuSet>,
    /// Those of them that were left to other threads.
    left: CpuSet,
}

impl Processors {
    fn allowed() -> Self {
        Self { all: sched_getaffinity(THIS_THREAD).ok(), left: CpuSet::new() }
    }

    /// How many, at least one.
    fn count(&self) -> usize {
        self.all.map_or(1, |all| numbers(&all).count()).max(1)
    }

    /// Goes to another processor than this one and those that were left before, and leaves this one to the thread that was made last: Linux may
    /// put it where its maker is, and have it wait there until the maker's turn is over, for milliseconds.
    fn leave_this(&mut self) {
        let (Some(all), Ok(here)) = (self.all, sched_getcpu()) else { return };
        let mut free = CpuSet::new();
        let left = self.left.set(here);
        let others = numbers(&all).filter(|&number| self.left.is_set(number) == Ok(false));
        if left.is_ok() && others.map(|number| free.set(number)).filter(Result::is_ok).count() > 0 {
            // Where it cannot be had, all is done a little later.
            let _ = sched_setaffinity(THIS_THREAD, &free);
            let _ = sched_setaffinity(THIS_THREAD, &all);
        }
    }
}

fn numbers(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|&number| set.is_set(number) == Ok(true))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;
    use std::{collections::HashSet, panic::catch_unwind, sync::Mutex, thread::ThreadId};

    #[test]
    fn all_come_in_order_however_many_there_are() {
        for count in [0, 1, 2, EACH_MIN, 2 * EACH_MIN + 1, 5 * EACH_MIN + 3] {
            let items: Vec<usize> = (0..count).collect();
            let more = |part: &[usize]| part.iter().map(|item| item + 1).collect();
            assert_eq!(map(&items, more).concat(), (1..=count).collect::<Vec<_>>(), "{count}");
        }
    }

    #[test]
    fn few_take_no_other_thread_and_many_as_many_as_there_are_processors() {
        let used = |count| {
            let threads = Mutex::new(HashSet::<ThreadId>::new());
            map(&vec![0; count], |part| {
                threads.lock().unwrap().insert(thread::current().id());
                part.to_vec()
            });
            threads.into_inner().unwrap()
        };
        assert_eq!(used(2 * EACH_MIN - 1), HashSet::from([thread::current().id()]));
        let before = Processors::allowed();
        assert_eq!(used(100 * EACH_MIN).len(), before.count().min(THREADS_MAX));
        assert_eq!(Processors::allowed().all, before.all, "the caller may run elsewhere than before");
    }

    #[test]
    fn a_panic_is_the_callers() {
        let items = vec![0; 4 * EACH_MIN];
        assert!(catch_unwind(|| map(&items, |_| -> Vec<u8> { panic!("as it may be") })).is_err());
    }
}
