//! Performing what the machine says, in tasks of which there is one at a time.

use super::{Actor, LET_GO, LOST, Work, plug::Plugging};
use crate::{
    error::chain,
    host::facts::Engine,
    vm::{
        machine::{Action, Input, Patience, Stage, Step},
        running::Running,
        steps::Job,
    },
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

impl Actor {
    pub(super) async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Perform(step) => {
                    if step == Step::FIRST
                        && let Err(refusal) = self.admit()
                    {
                        self.inputs.push_back(Input::NotAdmitted(refusal.to_string()));
                        continue;
                    }
                    let lost = Input::StepFailed(step, LOST.into());
                    self.work(Some(lost), move |job| async move {
                        match job.perform(step).await {
                            Ok(()) => Some(Input::StepDone(step)),
                            Err(error) => Some(Input::StepFailed(step, chain(&error))),
                        }
                    });
                }
                Action::End(stage) => {
                    self.work(None, move |job| async move {
                        let name = job.context.name.clone();
                        let error = job.end(stage).await.err()?;
                        tracing::warn!(
                            vm = name,
                            ?stage,
                            error = chain(&error),
                            "cannot ask the guest to end"
                        );
                        Some(Input::EndFailed(stage))
                    });
                }
                Action::Probe => {
                    self.work(None, |job| async move { job.is_silent().await.then_some(Input::Silent) });
                }
                Action::Expect(patience) => self.deadline = Some(Instant::now() + self.duration(patience)),
                Action::Relax => self.deadline = None,
                Action::CleanUp => self.clean_up(),
            }
        }
    }

    pub(super) fn job(&self, cancel: watch::Receiver<bool>) -> Job {
        Job {
            context: self.context.clone(),
            fleet: Arc::clone(&self.fleet.borrow()),
            running: self.running.clone(),
            started: Arc::clone(&self.started),
            cancel,
        }
    }

    /// Performs an effect in a task of its own. The one before it is not wanted any more.
    fn work<F: Future<Output = Option<Input>> + Send + 'static>(
        &mut self,
        lost: Option<Input>,
        effect: impl FnOnce(Job) -> F,
    ) {
        let (cancel, cancelled) = watch::channel(false);
        let task = tokio::spawn(effect(self.job(cancelled)));
        if let Some(before) = self.work.replace(Work { cancel, task, lost }) {
            before.task.abort();
        }
    }

    fn clean_up(&mut self) {
        if let Some(shim) = self.shim.take() {
            shim.abort();
        }
        if let Some((_, reloading)) = self.reloading.take() {
            reloading.abort();
        }
        let plugging = self.plugging.end();
        self.heard = None;
        self.shim_status = None;
        let before = self.work.take();
        let (running, dirs, cgroup) = (self.running.clone(), self.dirs(), self.context.cgroup());
        let (devices, name) = (Arc::clone(&self.context.host.devices), self.context.name.clone());
        self.work(Some(Input::NotCleaned(LOST.into())), |_| async move {
            if let Some(Work { cancel, task, .. }) = before {
                cancel.send_replace(true);
                let _ = timeout(LET_GO, task).await;
            }
            if let Some(task) = plugging {
                let _ = timeout(LET_GO, task).await;
            }
            let Ok(dirs) = dirs else { return Some(Input::Cleaned) };
            match running.clean_up(&dirs, cgroup).await {
                Ok(()) => {
                    // Nothing of it runs: its devices can be reset. One that cannot keeps no VM from ending.
                    devices.release(&name).await;
                    Some(Input::Cleaned)
                }
                Err(reason) => Some(Input::NotCleaned(reason)),
            }
        });
    }

    /// How long something may take. Emulation is many times slower, and this host may be busy with other guests.
    fn duration(&self, patience: Patience) -> Duration {
        let plan = self.running.plan();
        let engine = plan.as_ref().map_or(self.context.host.engine, |plan| plan.machine.engine);
        let pinning = plan.map_or(Duration::ZERO, |plan| self.context.pinning(&plan));
        duration(patience, engine, standstill(&self.running, &self.plugging, pinning))
    }
}

/// How long a guest may stand still: only while its memory may be being pinned. At all other times one that is silent hangs.
fn standstill(running: &Running, plugging: &Plugging, pinning: Duration) -> Duration {
    if plugging.is_under_way() || running.may_pin() { pinning } else { Duration::ZERO }
}

fn duration(patience: Patience, engine: Engine, standstill: Duration) -> Duration {
    match (patience, engine) {
        // The agent of one that stands still is not heard.
        (Patience::Boot, Engine::Kvm) => Duration::from_secs(60) + standstill,
        (Patience::Boot, Engine::Tcg) => Duration::from_secs(300) + standstill,
        (Patience::Stop(Stage::Agent), _) => Duration::from_secs(20),
        (Patience::Stop(Stage::PowerButton), _) => Duration::from_secs(5),
        (Patience::Stop(Stage::Terminate | Stage::Kill), _) => Duration::from_secs(10),
        (Patience::Pause(seconds), _) => Duration::from_secs(seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{plan, trace::Start};
    use std::collections::BTreeMap;
    use tokio::sync::broadcast;

    #[tokio::test]
    async fn hv4_a_guest_that_hangs_is_found_as_soon_as_others_once_its_devices_are_there() {
        let pinning = Duration::from_secs(1024);
        let running = Running::adopted(plan::example("a"), BTreeMap::new(), Start::default());
        let mut plugging = Plugging::new(broadcast::channel(1).1);
        // An earlier laird may have been about to plug one in.
        assert_eq!(standstill(&running, &plugging, pinning), pinning);
        running.has_pinned();
        assert_eq!(standstill(&running, &plugging, pinning), Duration::ZERO);
        plugging.begin(std::future::pending());
        assert_eq!(standstill(&running, &plugging, pinning), pinning);
        plugging.end();
        assert_eq!(standstill(&running, &plugging, pinning), Duration::ZERO);
        assert_eq!(standstill(&Running::default(), &plugging, pinning), pinning, "it is being started");
    }

    #[test]
    fn hv4_a_guest_may_be_silent_for_as_long_as_its_memory_is_pinned() {
        let pinning = Duration::from_secs(1024);
        let boot = |pinning| duration(Patience::Boot, Engine::Kvm, pinning);
        assert_eq!(boot(pinning), boot(Duration::ZERO) + pinning);
        let stop = Patience::Stop(Stage::Agent);
        assert_eq!(duration(stop, Engine::Kvm, pinning), duration(stop, Engine::Kvm, Duration::ZERO));
    }
}
