//! Devices for a VM that runs: what it has stays its own, more can come, and some can go.

use super::{Devices, DevicesError, Given, Holding, State, lock};
use crate::{fleet::gpus::Gpu, host::pci::Address, hypervisor::ports::Place};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

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

    /// Notes where the guest of `vm` sees functions that it has: those of `there` as it was noted before, `coming` as is told here, and no others.
    /// Before it sees them: what it says of one is held against no other.
    pub async fn place(
        self: &Arc<Self>,
        vm: &str,
        there: &BTreeSet<Address>,
        coming: &BTreeMap<Address, Place>,
    ) -> Result<(), DevicesError> {
        let is_its = |holding: &Holding| holding.life.state == State::Leased { vm: vm.into() };
        for key in self.keys(is_its) {
            let before = {
                let mut held = lock(&self.held);
                let Some(holding) = held.get_mut(&key).filter(|holding| is_its(holding)) else { continue };
                let mut places = holding.places.clone();
                places.retain(|address, _| there.contains(address));
                places.extend(coming.iter().filter(|(address, _)| holding.has(**address)));
                if places == holding.places {
                    continue;
                }
                // What was said meanwhile is said of what was there before, which may have been in the same port.
                let comes = places.keys().any(|address| !holding.places.contains_key(address));
                if let (true, Some(lease), Some(sums)) =
                    (comes, &mut holding.lease, lock(&self.heard).get(vm).cloned())
                {
                    lease.earlier = Some(sums);
                }
                std::mem::replace(&mut holding.places, places)
            };
            if let Err(error) = self.keep(key).await {
                // A later `laird` would not know it, so whoever tries again writes it.
                if let Some(holding) = lock(&self.held).get_mut(&key).filter(|holding| is_its(holding)) {
                    holding.places = before;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether a VM has any device, or is getting one.
    pub fn has_any(&self, vm: &str) -> bool {
        lock(&self.held).values().any(|holding| holding.life.state.vm() == Some(vm))
    }
}
