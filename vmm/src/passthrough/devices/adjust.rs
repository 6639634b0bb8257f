//! Devices for a VM that runs: what it has stays its own, more can come, and some can go.

use super::{Devices, DevicesError, Given, State, lock};
use crate::{fleet::gpus::Gpu, host::pci::Address};
use std::{collections::BTreeSet, sync::Arc};

impl Devices {
    /// Gives a VM that runs what it asks for now: what it has of that already, and what it lacks, bound to VFIO, reset and verified. What it has
    /// and does not ask for any more stays its own until [`Self::release_all_but`]. Where it cannot have all of it, it gets nothing new.
    pub async fn adjust(self: &Arc<Self>, vm: &str, wants: &[Gpu]) -> Result<Vec<Given>, DevicesError> {
        // Somebody was cut short in taking it, so no hypervisor has it.
        let leased = State::Leased { vm: vm.into() };
        self.end(vm, self.keys(|h| h.life.state.vm() == Some(vm) && h.life.state != leased)).await;
        let before = self.keys(|holding| holding.life.state == leased);
        let given = self.give(vm, wants).await;
        if given.is_err() {
            let mut news = self.keys(|holding| holding.life.state.vm() == Some(vm));
            news.retain(|key| !before.contains(key));
            self.end(vm, news).await;
            self.settle().await;
        }
        given
    }

    /// Takes back what a VM has, but for these functions and what goes with them: no hypervisor has it any more.
    pub async fn release_all_but(self: &Arc<Self>, vm: &str, kept: &BTreeSet<Address>) {
        let gone = self.keys(|holding| {
            holding.life.state.vm() == Some(vm) && !kept.iter().any(|address| holding.has(*address))
        });
        if !gone.is_empty() {
            self.end(vm, gone).await;
            self.settle().await;
        }
    }

    /// What a VM has and nothing that it asks for means.
    pub async fn unwanted(&self, vm: &str, wants: &[Gpu]) -> Result<BTreeSet<Address>, DevicesError> {
        let inventory = self.inventory().await?;
        let mut held = self.held();
        held.retain(|_, holding| {
            let mut devices = holding.functions.iter().filter_map(|f| inventory.devices.get(&f.address));
            let wanted = devices.any(|device| wants.iter().any(|want| want.means(device)));
            holding.life.state == (State::Leased { vm: vm.into() }) && !wanted
        });
        Ok(held.values().flat_map(|holding| &holding.functions).map(|function| function.address).collect())
    }

    /// Whether a VM has any device, or is getting one.
    pub fn has_any(&self, vm: &str) -> bool {
        lock(&self.held).values().any(|holding| holding.life.state.vm() == Some(vm))
    }
}
