//! Following the fleet file with the devices of a VM that runs.

use super::Actor;
use crate::{
    error::chain,
    fleet::gpus::Gpu,
    passthrough::{DevicesError, Told, What},
    vm::{handle::Mail, machine::State, plan::Plan, steps::StepError},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::broadcast,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// How long after a fault it is tried again; twice as long after each more, up to the other.
const RETRY: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(3600)];

/// What is known of the devices of a VM that runs.
#[derive(Debug)]
pub(super) struct Plugging {
    /// The task that changes them.
    task: Option<JoinHandle<()>>,
    /// What the fleet file said when they were last brought to that. Where it is not known, an earlier `laird` may have been cut short.
    follows: Option<Vec<Gpu>>,
    /// Why they are not as the fleet file says.
    fault: Option<Fault>,
    /// When it is tried again where there is a fault, and how long that was after the last time.
    again: (Instant, Duration),
    /// What happens to all devices.
    told: broadcast::Receiver<Told>,
}

/// Why devices do not follow the fleet file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vm) struct Fault {
    /// For people.
    reason: String,
    /// Somebody else has them, and may give them back.
    waits: bool,
}

impl Plugging {
    pub(super) fn new(told: broadcast::Receiver<Told>) -> Self {
        Self { task: None, follows: None, fault: None, again: (Instant::now(), Duration::ZERO), told }
    }

    /// It is being started with what the fleet file says now.
    pub(super) fn given(&mut self, gpus: &[Gpu]) {
        self.follows = Some(gpus.to_vec());
    }

    /// Changes them.
    pub(super) fn begin(&mut self, change: impl Future<Output = ()> + Send + 'static) {
        self.task = Some(tokio::spawn(change));
    }

    /// Whether they are being changed.
    pub(super) fn is_under_way(&self) -> bool {
        self.task.is_some()
    }

    /// Forgets all of it, as the VM is ending. The task is to be waited for.
    pub(super) fn end(&mut self) -> Option<JoinHandle<()>> {
        (self.follows, self.fault) = (None, None);
        let task = self.task.take();
        task.inspect(|task| task.abort())
    }

    /// What an operator has to know.
    pub(super) fn fault(&self) -> Option<String> {
        let fault = self.fault.as_ref()?;
        Some(format!("its devices are not what the fleet file says: {}", fault.reason))
    }

    /// Waits until it may come about: a device that is waited for may be free, or some time has gone by. A guest may have let go of a card too
    /// late, or a disk have been full.
    pub(super) async fn may_come_about(&mut self) {
        let Some(fault) = self.fault.as_ref().filter(|_| !self.is_under_way()) else {
            return std::future::pending().await;
        };
        tokio::select! {
            () = freed(&mut self.told), if fault.waits => {}
            () = sleep_until(self.again.0) => {}
        }
    }

    /// Notes why it has not come about.
    fn failed(&mut self, fault: Fault) {
        let [first, longest] = RETRY;
        let pause = self.again.1.saturating_mul(2).clamp(first, longest);
        (self.fault, self.again) = (Some(fault), (Instant::now() + pause, pause));
    }
}

/// Waits until any device is free.
async fn freed(told: &mut broadcast::Receiver<Told>) {
    loop {
        match told.recv().await {
            Ok(Told { what: What::State { state: "free" | "host", .. }, .. })
            | Err(broadcast::error::RecvError::Lagged(_)) => return,
            Ok(_) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

impl Drop for Plugging {
    fn drop(&mut self) {
        self.end();
    }
}

impl Actor {
    /// Has the VM's devices follow the fleet file, once its guest is up.
    pub(super) fn follow_devices(&mut self) {
        // Its end looks again.
        if self.plugging.is_under_way() || self.life.state != State::Ready {
            return;
        }
        let fleet = Arc::clone(&self.fleet.borrow());
        let (Some(plan), Some(vm)) = (self.running.plan(), fleet.vms.get(&self.context.name)) else { return };
        let never_any = plan.vm.gpus.is_empty() && !self.context.host.devices.has_any(&plan.name);
        let follows = self.plugging.follows.as_ref() == Some(&vm.gpus);
        if self.plugging.fault.is_none() && (follows || (never_any && vm.gpus.is_empty())) {
            return;
        }
        let (job, queue) = (self.job(tokio::sync::watch::channel(false).1), self.queue.clone());
        let wants = vm.gpus.clone();
        self.plugging.told = self.context.host.devices.subscribe();
        self.plugging.begin(async move {
            let outcome = job.follow_devices(&wants).await.map_err(|error| Fault {
                reason: chain(&error),
                waits: matches!(error, StepError::Devices(DevicesError::Unmet(_))),
            });
            let _ = queue.send(Mail::Plugged(wants, outcome.map(Box::new))).await;
        });
    }

    /// The VM has the devices of `wants`, or has not.
    pub(super) async fn plugged(&mut self, wants: Vec<Gpu>, outcome: Result<Box<Plan>, Fault>) {
        // The VM may have been cleaned up meanwhile.
        let (Some(_), Some(now)) = (self.plugging.task.take(), self.running.plan()) else { return };
        match outcome {
            Ok(plan) => {
                tracing::info!(
                    vm = now.name,
                    cards = plan.machine.cards.len(),
                    "its devices follow the fleet file"
                );
                let mut after = Plan::clone(&now);
                (after.machine.cards, after.vm.gpus) = (plan.machine.cards, wants.clone());
                self.running.set_plan(Arc::new(after));
                (self.plugging.follows, self.plugging.fault) = (Some(wants), None);
                self.plugging.again.1 = Duration::ZERO;
                self.record_or_warn().await;
                self.publish();
                self.follow_devices();
            }
            // Time tries again, and the next apply; where another VM has the device, so does its end.
            Err(fault) => {
                tracing::warn!(
                    vm = now.name,
                    reason = fault.reason,
                    "its devices do not follow the fleet file"
                );
                self.plugging.failed(fault);
                self.publish();
                let wanted = self.fleet.borrow().vms.get(&self.context.name).map(|vm| vm.gpus.clone());
                if wanted.is_some_and(|wanted| wanted != wants) {
                    self.follow_devices();
                }
            }
        }
    }
}
