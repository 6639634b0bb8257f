//! The devices of a VM that runs, as the fleet file asks for them now.

use super::{Job, StepError, guest, write_limits};
use crate::{
    fleet::{gpus::Gpu, limits::Need, schema::Vm},
    host::{confine, pci::Address},
    hypervisor::{
        Card,
        ports::{self, Port, Ports},
        qemu::qmp::Qmp,
    },
    passthrough::{DevicesError, Given, window},
    vm::{
        checkpoint,
        machine::Part,
        plan::Plan,
        users::{self, Users},
    },
};
use std::{collections::BTreeSet, time::Duration};

/// How long a guest may take to let go of a card: its driver finishes what it does, and a slot's button is waited for 5 s.
const LET_GO: Duration = Duration::from_secs(30);

/// How long the hypervisor may take to open a device, besides the time for pinning memory.
const OPEN: Duration = Duration::from_secs(20);

impl Job {
    /// Gives the VM the devices that it is to have, and takes those away that it is not to have. What it runs with then.
    ///
    /// Whoever was cut short anywhere in this, or failed, does it again: whose a device is was written down before, and what the VM has its
    /// hypervisor says. Whatever comes of it, the VM's own are those that its hypervisor has, and the others are free.
    pub async fn follow_devices(&self, wants: &[Gpu]) -> Result<Plan, StepError> {
        let plan = self.running.plan().ok_or(StepError::Lost)?;
        let vm = Vm { gpus: wants.to_vec(), ..plan.vm.clone() };
        let (before, after) = (Need::of(&plan.vm), Need::of(&vm));
        self.connect_qmp().await?;
        let qmp = self.running.qmp().ok_or(StepError::Lost)?;
        if after.sum() > before.sum() {
            self.context.budget.admit(&plan.name, after)?;
        }
        let outcome = match self.change_devices(&qmp, &plan, &vm).await {
            // Somebody may wait for what it is to have no more, and have what it waits for.
            Err(error @ StepError::Devices(DevicesError::Unmet(_))) => {
                self.let_go(&qmp, &plan.name, wants).await.and(Err(error))
            }
            outcome => outcome,
        };
        // One without ports was started by a `laird` that gave its devices other names.
        let ports = qmp.ports().await.unwrap_or_default();
        if ports != Ports::default() {
            checkpoint::reach("devices: before those are released that went");
            self.context.host.devices.release_all_but(&plan.name, &ports.functions()).await;
        }
        // Of what did not come about, a part may have.
        let half = Plan { vm: vm.clone(), ..Plan::clone(&plan) };
        let now = match &outcome {
            Ok(now) => now,
            Err(_) if after.sum() > before.sum() && !ports.functions().is_empty() => &half,
            Err(_) => &plan,
        };
        self.context.budget.adopt(&plan.name, Need::of(&now.vm));
        let limited = self.limit_again(now);
        let now = outcome?;
        limited.map(|()| now)
    }

    async fn change_devices(&self, qmp: &Qmp, plan: &Plan, vm: &Vm) -> Result<Plan, StepError> {
        let given = self.context.host.devices.adjust(&plan.name, &vm.gpus).await?;
        checkpoint::reach("devices: its own");
        let windows: Vec<_> = given.iter().flat_map(|given| given.windows.clone()).collect();
        window::suffices(&windows, &guest(&self.context.host, vm), plan.machine.hole)?;
        let after = Plan { vm: vm.clone(), ..plan.with_devices(&given, plan.machine.hole) };
        let there = qmp.ports().await?;
        let change = there.change(&after.machine.cards)?;
        let vacated = |port| change.unplug.iter().any(|(other, _)| *other == port);
        let (later, now): (Vec<_>, Vec<_>) = change.plug.iter().partition(|(port, _)| vacated(*port));
        let (count, mut seen) = (there.0.len(), there.functions());
        self.place(plan, count, &seen, &now).await?;
        self.permit(&after, given).await?;
        let patience = OPEN + self.context.pinning(&after);
        for (port, card) in now {
            qmp.plug(*port, card, patience).await?;
            seen.extend(&card.functions);
            checkpoint::reach("devices: one is plugged in");
        }
        for (port, card) in &change.unplug {
            qmp.unplug(*port, card, LET_GO).await?;
            seen.retain(|address| !card.contains(address));
            checkpoint::reach("devices: one is unplugged");
            self.place(plan, count, &seen, &[]).await?;
        }
        // Their ports were others' until now, and of two that are alike one only is in a port.
        for coming in later {
            let (port, card) = coming;
            self.place(plan, count, &seen, &[coming]).await?;
            qmp.plug(*port, card, patience).await?;
            seen.extend(&card.functions);
        }
        Ok(after)
    }

    /// Notes where the guest, which has so many ports, sees its devices: those that are `there`, and those that come next, where that is known.
    async fn place(
        &self,
        plan: &Plan,
        ports: usize,
        there: &BTreeSet<Address>,
        coming: &[&(Port, Card)],
    ) -> Result<(), StepError> {
        let coming = coming.iter().filter(|_| plan.machine.known_slots);
        let places = ports::places(ports, coming.map(|(port, card)| (*port, card)));
        Ok(self.context.host.devices.place(&plan.name, there, &places).await?)
    }

    /// Takes out what the VM is not to have any more.
    async fn let_go(&self, qmp: &Qmp, vm: &str, wants: &[Gpu]) -> Result<(), StepError> {
        let unwanted = self.context.host.devices.unwanted(vm, wants).await?;
        for (port, card) in qmp.ports().await?.0 {
            if !card.is_empty() && card.is_subset(&unwanted) {
                qmp.unplug(port, &card, LET_GO).await?;
            }
        }
        Ok(())
    }

    /// Lets the hypervisor open the devices, lock the guest's memory, and have what the IOMMU needs.
    async fn permit(&self, plan: &Plan, given: Vec<Given>) -> Result<(), StepError> {
        let users = Users::of(self.context.host.ids.as_deref(), &self.context.name)?;
        let nodes: Vec<_> = given.into_iter().flat_map(|given| given.nodes).collect();
        self.blocking(move || Ok(users.own_nodes(&nodes)?)).await?;
        let hypervisor = self.running.process(Part::Hypervisor).ok_or(StepError::Lost)?;
        if let Some(bytes) = users::locked(plan) {
            let pid = hypervisor.id().pid;
            confine::let_lock(pid, bytes).map_err(|source| StepError::Lock { pid, bytes, source })?;
        }
        self.limit_again(plan)
    }

    /// Sets the limits of the VM's cgroup, in which it runs, anew.
    fn limit_again(&self, plan: &Plan) -> Result<(), StepError> {
        self.context.cgroup().map_or(Ok(()), |cgroup| write_limits(&cgroup, plan))
    }
}
