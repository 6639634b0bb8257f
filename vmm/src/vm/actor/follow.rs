//! Following what goes on outside: processes, the hypervisor's words, the fleet file.

use super::Actor;
use crate::{
    error::chain,
    hypervisor::Heard,
    vm::{
        handle::Snapshot,
        machine::{Input, Part, Stage},
        plan::{self, Plan},
        steps::reload_links,
        watch,
    },
};
use std::sync::Arc;

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
        if more > 0 {
            self.publish();
        }
    }

    pub(super) fn watch_process(&mut self, part: Part) {
        let Some(process) = self.running.process(part) else { return };
        let heard = self.running.heard().filter(|_| part == Part::Hypervisor);
        tokio::spawn(watch::process(part, process, heard, self.queue.clone()));
        if part == Part::Shim
            && let Some(plan) = self.running.plan()
        {
            let control = plan.shim.sockets.control.clone();
            if let Some(before) = self.shim.replace(tokio::spawn(watch::shim(control, self.queue.clone()))) {
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
        let fleet = Arc::clone(&self.fleet.borrow_and_update());
        if !fleet.vms.contains_key(&self.context.name) {
            self.withdraw();
        }
        let Some(plan) = self.running.plan() else { return };
        let shim = match plan::shim(&plan.name, &plan.vm, &fleet, &self.context.dirs, &plan.dirs) {
            Ok(shim) => shim,
            Err(error) => return tracing::warn!(vm = plan.name, %error, "its links stay as they are"),
        };
        if shim == plan.shim {
            return;
        }
        let plan = Arc::new(Plan { shim, ..(*plan).clone() });
        self.running.set_plan(Arc::clone(&plan));
        self.publish();
        if self.running.process(Part::Shim).is_some() {
            tokio::spawn(async move {
                if let Err(error) = reload_links(&plan).await {
                    tracing::warn!(
                        vm = plan.name,
                        error = chain(&error),
                        "its shim did not take the new links"
                    );
                }
            });
        }
    }

    pub(super) fn publish(&self) {
        self.snapshot.send_replace(Snapshot {
            adoption: self.verdict,
            reboots: self.reboots.total(),
            shim: self.shim_status.clone(),
            ..Snapshot::of(&self.life, self.since, &self.running)
        });
    }
}
