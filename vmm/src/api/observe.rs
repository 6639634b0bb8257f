//! What is told of VMs as it happens: each change of state becomes an event, and is counted.

use super::{
    events::Events,
    metrics::Stats,
    types::{EventKind, detail},
};
use crate::{
    cgroup::Event,
    passthrough::{Told, What},
    vm::{handle::Snapshot, limits::Happened, machine::State},
};
use std::{sync::Arc, time::Instant};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    watch,
};

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

    /// Tells what happens to the cgroups of VMs.
    pub fn listen(&self, mut happened: broadcast::Receiver<Happened>) {
        let events = Arc::clone(&self.events);
        tokio::spawn(async move {
            loop {
                match happened.recv().await {
                    Ok(happened) => events.publish(told(happened)),
                    Err(RecvError::Lagged(count)) => events.publish(EventKind::Dropped { count }),
                    Err(RecvError::Closed) => return,
                }
            }
        });
    }

    /// Tells what happens to devices.
    pub fn listen_to_devices(&self, mut told: broadcast::Receiver<Told>) {
        let events = Arc::clone(&self.events);
        tokio::spawn(async move {
            loop {
                match told.recv().await {
                    Ok(told) => events.publish(of_device(told)),
                    Err(RecvError::Lagged(count)) => events.publish(EventKind::Dropped { count }),
                    Err(RecvError::Closed) => return,
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

fn of_device(Told { device, vm, what }: Told) -> EventKind {
    match what {
        What::State { state, detail } => EventKind::Device { device, vm, state: state.into(), detail },
        What::Fault(device, fault) => {
            EventKind::DeviceFault { device, vm: vm.unwrap_or_default(), fault: fault.to_string() }
        }
        What::LeaseEnded(lease) => {
            EventKind::LeaseEnded { device, vm: lease.vm.clone(), summary: lease.summary() }
        }
    }
}

fn told(Happened { vm, event }: Happened) -> EventKind {
    match event {
        Event::Oom { killed } => EventKind::Oom { vm, killed },
        Event::Pressure(pressure) => {
            EventKind::Pressure { vm, percent: u64::from(pressure.full.avg10) / 100 }
        }
        Event::Empty => {
            EventKind::Unlimited { vm, reason: "there is no process in its cgroup any more".into() }
        }
        Event::Gone => EventKind::Unlimited { vm, reason: "its cgroup was removed by somebody else".into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_happens_to_a_cgroup_is_an_event_with_the_vm_s_name() {
        let (observed, happened) = (Observed::default(), crate::host::happenings());
        observed.listen(happened.subscribe());
        let mut reader = observed.events.reader(None);
        for event in [Event::Oom { killed: 3 }, Event::Gone] {
            happened.send(Happened { vm: "builder".into(), event }).unwrap();
        }
        let vm = || "builder".to_owned();
        assert_eq!(reader.next().await.kind, EventKind::Oom { vm: vm(), killed: 3 });
        let reason = "its cgroup was removed by somebody else".to_owned();
        assert_eq!(reader.next().await.kind, EventKind::Unlimited { vm: vm(), reason });
    }
}
