//! Following what goes on outside: processes, the hypervisor's words, the fleet file.

use super::Actor;
use crate::{
    error::chain,
    hypervisor::Heard,
    vm::{
        handle::{Mail, Snapshot},
        machine::{Input, Part, Stage, State, Step},
        plan::{self, Plan},
        steps::reload_links,
        watch,
    },
};
use std::{sync::Arc, time::Duration};
use tokio::time::sleep;

/// The pause before a hypervisor is connected again that closed its control socket and runs on.
const RECONNECT: Duration = Duration::from_secs(10);

/// What is known of the links that a shim has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Those of the plan.
    AsPlanned,
    /// Perhaps others: an earlier `laird` may have been killed before it wrote down what it had told.
    Unknown,
}

impl Actor {
    /// Listens to a hypervisor that has been connected.
    pub(super) fn attend(&mut self) {
        let heard = self.running.heard();
        let same = match (&self.heard, &heard) {
            (Some(before), Some(now)) => before.same_channel(now),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.heard = heard;
            self.known = Heard::default();
            self.hear();
            self.publish();
        }
    }

    /// Takes what the hypervisor has said since.
    pub(super) fn hear(&mut self) {
        let Some(heard) = &mut self.heard else { return };
        let heard = *heard.borrow_and_update();
        let before = std::mem::replace(&mut self.known, heard);
        let more = heard.reboots.saturating_sub(before.reboots);
        if let Some(count) = self.reboots.more(more, std::time::Instant::now()) {
            tracing::info!(vm = self.context.name, count, "the guest rebooted");
        }
        // Before the other: a guest that panicked is powered off.
        if heard.panic && !before.panic {
            self.inputs.push_back(Input::GuestPanic);
        }
        if heard.power_off && !before.power_off {
            self.inputs.push_back(Input::GuestPowerOff);
        }
        let lost = heard.lost && !before.lost;
        if lost {
            self.connect_again();
        }
        if more > 0 || lost {
            self.publish();
        }
    }

    /// Connects the hypervisor again, should it run on without its control socket: without one neither a panic nor a power-off is heard,
    /// and no power button can be pressed.
    fn connect_again(&self) {
        let Some(process) = self.running.process(Part::Hypervisor) else { return };
        let (job, queue) = (self.job(tokio::sync::watch::channel(false).1), self.queue.clone());
        tokio::spawn(async move {
            tokio::select! {
                // As it always is: the connection ends with it.
                _ = process.ended() => return,
                () = sleep(RECONNECT) => {}
            }
            let name = &job.context.name;
            match job.connect_qmp().await {
                Ok(()) => tracing::warn!(
                    vm = name,
                    "its hypervisor had closed its control socket; it is connected again"
                ),
                Err(error) => tracing::error!(
                    vm = name,
                    error = chain(&error),
                    "its hypervisor has closed its control socket and cannot be connected again"
                ),
            }
            let _ = queue.send(Mail::Connected).await;
        });
    }

    pub(super) fn watch_process(&mut self, part: Part) {
        let Some(process) = self.running.process(part) else { return };
        let id = process.id();
        tokio::spawn(watch::process(part, process, self.running.clone(), self.queue.clone()));
        if part == Part::Shim
            && let Some(plan) = self.running.plan()
        {
            let control = plan.shim.sockets.control.clone();
            let watching = tokio::spawn(watch::shim(id, control, self.queue.clone()));
            if let Some(before) = self.shim.replace(watching) {
                before.abort();
            }
        }
    }

    /// Ends the VM, because the fleet has it no more, or had it no more for a moment.
    pub(super) fn withdraw(&mut self) {
        if !self.withdrawn {
            self.withdrawn = true;
            self.inputs.push_back(Input::Withdraw(Stage::Agent));
        }
    }

    /// Follows the fleet file: out of the fleet, and with the links.
    pub(super) fn follow_fleet(&mut self) {
        let present = self.fleet.borrow_and_update().vms.contains_key(&self.context.name);
        if !present {
            self.withdraw();
        }
        self.follow_links(Told::AsPlanned);
        self.follow_devices();
    }

    /// Has the shim's links follow the fleet. The plan says what the shim was told, so that it changes once the shim has taken them.
    pub(super) fn follow_links(&mut self, told: Told) {
        // Its end looks again.
        if self.reloading.is_some() {
            return;
        }
        let Some(before) = self.running.plan() else { return };
        let fleet = Arc::clone(&self.fleet.borrow());
        let shim = match plan::shim(&before.name, &before.vm, &fleet, &self.context.dirs, &before.dirs) {
            Ok(shim) => shim,
            Err(error) => return tracing::warn!(vm = before.name, %error, "its links stay as they are"),
        };
        if shim == before.shim && told == Told::AsPlanned {
            return;
        }
        let after = Arc::new(Plan { shim, ..(*before).clone() });
        if self.running.process(Part::Shim).is_some() {
            let (queue, plans) = (self.queue.clone(), [Arc::clone(&before), Arc::clone(&after)]);
            let task = tokio::spawn(async move {
                let outcome = reload_links(&after).await.map_err(|error| chain(&error));
                let _ = queue.send(Mail::Reloaded(plans, outcome)).await;
            });
            self.reloading = Some((before, task));
        } else if self.life.state != State::Starting(Step::Shim) {
            self.running.set_plan(after);
            self.publish();
        }
        // A shim that is being started was told what the plan said; the end of that step looks again.
    }

    /// The shim has taken its links, or has not.
    pub(super) async fn reloaded(&mut self, [before, plan]: [Arc<Plan>; 2], outcome: Result<(), String>) {
        // The VM may have been cleaned up meanwhile, and even started anew.
        let is_it = self.reloading.take_if(|(under_way, _)| Arc::ptr_eq(under_way, &before)).is_some();
        let Some(now) = self.running.plan().filter(|_| is_it) else { return };
        match outcome {
            Ok(()) => {
                // Its devices may have changed meanwhile.
                self.running.set_plan(Arc::new(Plan { shim: plan.shim.clone(), ..Plan::clone(&now) }));
                self.record_or_warn().await;
                self.publish();
                self.follow_links(Told::AsPlanned);
            }
            // The next change of the fleet tries again.
            Err(error) => tracing::warn!(vm = before.name, error, "its shim did not take the new links"),
        }
    }

    pub(super) fn publish(&self) {
        let mut snapshot = Snapshot::of(&self.life, self.since, &self.running);
        snapshot.degraded.extend(self.plugging.fault());
        self.snapshot.send_replace(Snapshot {
            adoption: self.verdict,
            reboots: self.reboots.total(),
            shim: self.shim_status.clone(),
            ..snapshot
        });
    }
}
