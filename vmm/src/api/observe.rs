//! What is told of VMs as it happens: each change of state becomes an event, and is counted.

use super::{
    events::Events,
    metrics::Stats,
    types::{EventKind, detail},
};
use crate::vm::{handle::Snapshot, machine::State};
use std::{sync::Arc, time::Instant};
use tokio::sync::watch;

/// What is told, and what is counted, of all VMs.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The events.
    pub events: Arc<Events>,
    /// The counters.
    pub stats: Arc<Stats>,
}

impl Observed {
    /// Tells of a VM from now on. A state that lasts too short to be seen is left out.
    pub fn follow(&self, vm: &str, mut changes: watch::Receiver<Snapshot>) {
        let (observed, vm) = (self.clone(), vm.to_owned());
        self.stats.known(&vm);
        let (mut last, adopted) = {
            let snapshot = changes.borrow_and_update();
            (snapshot.state.clone(), !snapshot.processes.is_empty())
        };
        let (state, detail) = (last.word().into(), detail(&last));
        self.events.publish(EventKind::Known { vm: vm.clone(), state, detail, adopted });
        tokio::spawn(async move {
            let mut started = None;
            // It ends with the VM's task.
            while changes.changed().await.is_ok() {
                let state = changes.borrow_and_update().state.clone();
                if state != last {
                    observed.count(&vm, &last, &state, &mut started);
                    let kind = EventKind::State {
                        vm: vm.clone(),
                        from: last.word().into(),
                        state: state.word().into(),
                        detail: self::detail(&state),
                    };
                    observed.events.publish(kind);
                    last = state;
                }
            }
        });
    }

    fn count(&self, vm: &str, from: &State, to: &State, started: &mut Option<Instant>) {
        match (from, to) {
            (State::Starting(_), State::Starting(_)) => {}
            (_, State::Starting(_)) => {
                self.stats.started(vm);
                *started = Some(Instant::now());
            }
            (_, State::Ready) => {
                // Only the first time of a start: after that the guest has rebooted.
                if let Some(began) = started.take() {
                    self.stats.ready(began.elapsed().as_secs_f64());
                }
            }
            (_, State::Failed(_) | State::Waiting { .. }) => self.stats.failed(vm),
            _ => {}
        }
    }

    /// A VM is no longer known.
    pub fn forget(&self, vm: &str) {
        self.stats.forget(vm);
        self.events.publish(EventKind::Forgotten { vm: vm.to_owned() });
    }
}
