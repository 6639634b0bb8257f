//! Asking a VM for a change, and telling how far it is.

use super::{
    server::Lines,
    types::{Outcome, Progress, detail},
};
use crate::{
    supervisor::{Supervisor, SupervisorError},
    vm::{
        handle::Snapshot,
        machine::{Part, Request, State},
    },
};
use std::time::{Duration, Instant};
use tokio::{
    sync::watch,
    time::{Instant as Deadline, sleep_until},
};

/// What an operator may ask of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Start,
    Stop,
    Restart,
    Kill,
}

/// A change that a VM has agreed to.
#[derive(Debug)]
pub(super) struct Change {
    vm: String,
    wish: Wish,
    began: Instant,
    changes: watch::Receiver<Snapshot>,
    /// Its processes before.
    before: Vec<(Part, i32)>,
}

impl Change {
    /// Asks a VM for a change.
    pub(super) async fn ask(supervisor: &Supervisor, vm: &str, wish: Wish) -> Result<Self, SupervisorError> {
        let mut changes = supervisor.vm(vm)?.watch();
        // What is seen from now on comes after the request.
        let before = changes.borrow_and_update().processes.clone();
        let request = match wish {
            Wish::Start => Request::Start,
            Wish::Stop => Request::Stop,
            Wish::Restart => Request::Restart,
            Wish::Kill => Request::Kill,
        };
        supervisor.request(vm, request).await?;
        Ok(Self { vm: vm.into(), wish, began: Instant::now(), changes, before })
    }

    fn progress(&self, state: &State, outcome: Option<Outcome>) -> Progress {
        Progress {
            vm: self.vm.clone(),
            state: state.word().into(),
            detail: detail(state),
            elapsed_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            outcome,
        }
    }

    /// Says that it has begun, and nothing more.
    pub(super) async fn accepted(self, mut lines: Lines) {
        let state = self.changes.borrow().state.clone();
        lines.send(&self.progress(&state, Some(Outcome::Accepted))).await;
    }

    /// Tells each state until the VM is where it should be, has failed, or has taken longer than `patience`; or until the client is gone.
    pub(super) async fn follow(mut self, mut lines: Lines, patience: Option<Duration>) {
        let deadline = patience.and_then(|patience| Deadline::now().checked_add(patience));
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(late);
        // Stopped is where a restart comes by, and where a start does not.
        let mut up = self.wish != Wish::Restart;
        let mut told = None;
        loop {
            let (state, processes) = {
                let now = self.changes.borrow_and_update();
                (now.state.clone(), now.processes.clone())
            };
            // Whoever looks seldom may see nothing of the start but what came of it.
            let others = matches!(state, State::Booting | State::Ready) && processes != self.before;
            up |= others || matches!(state, State::Starting(_));
            let outcome = reached(self.wish, &state, up);
            let progress = self.progress(&state, outcome);
            if told.as_ref() != Some(&state) || outcome.is_some() {
                if !lines.send(&progress).await || outcome.is_some() {
                    return;
                }
                told = Some(state);
            }
            tokio::select! {
                biased;
                () = &mut late => {
                    let state = self.changes.borrow().state.clone();
                    lines.send(&self.progress(&state, Some(Outcome::TimedOut))).await;
                    return;
                }
                changed = self.changes.changed() => if changed.is_err() { return },
                () = lines.closed() => return,
            }
        }
    }
}

/// Whether `state` is the end of a change. `up` says that it was on its way up already.
fn reached(wish: Wish, state: &State, up: bool) -> Option<Outcome> {
    match (wish, state) {
        (Wish::Start | Wish::Restart, State::Ready) if up => Some(Outcome::Done),
        (Wish::Stop | Wish::Kill, State::Stopped) => Some(Outcome::Done),
        // Somebody else stopped it.
        (Wish::Start | Wish::Restart, State::Stopped) if up => Some(Outcome::Failed),
        (_, State::Failed(_) | State::Quarantined(_)) => Some(Outcome::Failed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{
        failure::Failure,
        machine::{Stage, Step},
    };

    #[test]
    fn where_a_change_ends() {
        let failed = State::Failed(Failure::GuestPanic);
        for (wish, state, up, outcome) in [
            (Wish::Start, State::Ready, true, Some(Outcome::Done)),
            (Wish::Start, State::Starting(Step::View), true, None),
            (Wish::Start, State::Booting, true, None),
            (Wish::Start, State::Stopped, true, Some(Outcome::Failed)),
            (Wish::Start, failed.clone(), true, Some(Outcome::Failed)),
            (Wish::Stop, State::Stopping(Stage::Agent), true, None),
            (Wish::Stop, State::Stopped, true, Some(Outcome::Done)),
            (Wish::Kill, State::Stopped, true, Some(Outcome::Done)),
            (Wish::Kill, State::Ready, true, None),
            (Wish::Restart, State::Ready, false, None),
            (Wish::Restart, State::Stopped, false, None),
            (Wish::Restart, failed, false, Some(Outcome::Failed)),
            (Wish::Restart, State::Ready, true, Some(Outcome::Done)),
        ] {
            assert_eq!(reached(wish, &state, up), outcome, "{wish:?} {state:?} {up}");
        }
    }
}
