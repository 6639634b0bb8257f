//! What guests say of their devices, and what follows from it.
//!
//! **A guest is not trusted.** What it says counts for devices that it has itself, and for no others; each is known to it by an address of its
//! own, so `laird` looks which of the VM's devices may be meant (by vendor, device and number), and where two of a VM's are alike, both are.
//! A message that is fatal for a device ([`Fault::is_fatal`]) quarantines it once the VM has ended. So a hostile builder can deny the card to itself
//! and to those who come after it until an operator has looked at it (`vmctl gpu release`); it can do no more than that, and it could as well
//! break the card itself. The other choice, to believe only what the host sees, would hand a GPU whose memory fails to the next
//! tenant: nobody but its driver, in the guest, learns of that. What was said is in the certificate of the lease and in the audit log, with the VM
//! that said it.
//!
//! A guest tells sums of its boot. What it had said before a device came to it is not said against that one: [`Sums`] of before are in its certificate.
//!
//! How often a guest can make `laird` do something is bounded by its devices: what is said again is counted, and told and written down only when
//! something new is said, of which there are at most [`FAULTS_MAX`](crate::passthrough::certificate::FAULTS_MAX) in a lease.

use super::{Devices, Fault, Function, State, Told, What, lock};
use crate::{
    error::chain,
    host::pci::{Address, Id},
    passthrough::certificate::{Said, Sum, Sums},
    shim::protocol::GuestDevices,
};
use lair_guest::wire::message::GuestDevice;
use std::{collections::BTreeMap, sync::Arc};

/// The most of what a guest tells that is looked at; its shim has cut it already.
const DEVICES_MAX: usize = 64;

/// Which of the VM's functions each of the guest's devices may be, by its address in the guest. None where the VM has no such device.
pub fn places<'a>(guest: &'a [GuestDevice], functions: &[Function]) -> BTreeMap<&'a str, Vec<Address>> {
    let mut places = BTreeMap::new();
    for device in guest.iter().take(DEVICES_MAX) {
        let same = functions
            .iter()
            .filter(|function| (function.vendor, function.device) == (Id(device.vendor), Id(device.device)));
        let same: Vec<_> = same.map(|function| function.address).collect();
        if !same.is_empty() {
            places.insert(device.address.as_str(), same);
        }
    }
    places
}

/// What a guest has said since it booted.
fn sums(said: &GuestDevices) -> Sums {
    let faults = said.report.faults.iter().filter_map(|theirs| {
        let fault = Fault::of(theirs.fault)?;
        Some(Sum { place: theirs.address.clone(), fault, count: theirs.count })
    });
    let errors = said.report.gpus.iter().take(DEVICES_MAX).filter_map(|gpu| {
        let count = gpu.ecc_volatile.uncorrected.filter(|count| *count > 0)?;
        Some(Sum { place: gpu.address.clone(), fault: Fault::Ecc, count })
    });
    Sums { boot: said.boot_id.clone(), counts: faults.chain(errors).collect() }
}

impl Devices {
    /// All functions that a VM has, by address.
    pub fn functions_of(&self, vm: &str) -> Vec<Function> {
        let held = lock(&self.held);
        let its = held.values().filter(|holding| holding.life.state == State::Leased { vm: vm.into() });
        its.flat_map(|holding| holding.functions.clone()).collect()
    }

    /// Takes what a guest says of its devices; whether any of it is new.
    pub async fn reported(self: &Arc<Self>, vm: &str, said: &GuestDevices) -> bool {
        let functions = self.functions_of(vm);
        let places = places(&said.report.devices, &functions);
        let mut news = self.first_word(vm, &said.boot_id).await;
        for theirs in &said.report.faults {
            let Some(fault) = Fault::of(theirs.fault) else { continue };
            for address in places.get(theirs.address.as_str()).into_iter().flatten() {
                let said = Said {
                    boot: &said.boot_id,
                    place: &theirs.address,
                    address: *address,
                    fault,
                    count: theirs.count,
                    text: &theirs.text,
                };
                news |= self.hear(vm, said).await;
            }
        }
        for gpu in said.report.gpus.iter().take(DEVICES_MAX) {
            let Some(count) = gpu.ecc_volatile.uncorrected.filter(|count| *count > 0) else { continue };
            for address in places.get(gpu.address.as_str()).into_iter().flatten() {
                let (boot, text) = (&said.boot_id, "counted by the GPU since its driver was loaded");
                let (place, address, fault) = (&gpu.address, *address, Fault::Ecc);
                news |= self.hear(vm, Said { boot, place, address, fault, count, text }).await;
            }
        }
        lock(&self.heard).insert(vm.into(), sums(said));
        news
    }

    /// Notes in the certificates of what a VM has that its guest tells of it; whether it did not before.
    async fn first_word(self: &Arc<Self>, vm: &str, boot: &str) -> bool {
        let mut firsts = Vec::new();
        for (key, holding) in lock(&self.held).iter_mut() {
            let its = holding.life.state == State::Leased { vm: vm.into() };
            let lease = holding.lease.as_mut().filter(|lease| its && lease.is_open());
            if lease.is_some_and(|lease| lease.hear(boot)) {
                firsts.push(*key);
            }
        }
        for key in &firsts {
            if let Err(error) = self.keep(*key).await {
                tracing::error!(device = %key, error = chain(&error), "cannot write down that a guest tells of it");
            }
        }
        !firsts.is_empty()
    }

    async fn hear(self: &Arc<Self>, vm: &str, said: Said<'_>) -> bool {
        let key = {
            let mut held = lock(&self.held);
            let its = held.iter_mut().find(|(_, holding)| {
                holding.has(said.address) && holding.life.state == State::Leased { vm: vm.into() }
            });
            let Some((key, holding)) = its else { return false };
            let is_news = match holding.lease.as_mut().filter(|lease| lease.is_open()) {
                Some(lease) => lease.note(said),
                // It was given by a `laird` that made no certificates.
                None => said.fault.is_fatal() && holding.life.blame.is_none(),
            };
            if !is_news {
                return false;
            }
            *key
        };
        tracing::warn!(device = %said.address, vm, fault = %said.fault, "a guest reports");
        let what = What::Fault(said.address, said.fault);
        self.say(Told { device: key, vm: Some(vm.into()), what });
        let kept = if said.fault.is_fatal() {
            let what = format!("{}, as VM {vm} says", said.fault);
            match self.blame(vm, said.address, what).await {
                // That wrote it down.
                Ok(true) => Ok(()),
                Ok(false) => self.keep(key).await,
                Err(error) => Err(error),
            }
        } else {
            self.keep(key).await
        };
        if let Err(error) = kept {
            tracing::error!(device = %key, error = chain(&error), "cannot write down what a guest says");
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(address: &str, device: u16) -> Function {
        Function {
            address: address.parse().unwrap(),
            vendor: Id(0x10de),
            device: Id(device),
            driver: None,
            driver_override: None,
            d3cold: None,
            width: None,
            group: None,
            bars: vec![],
        }
    }

    fn guest(address: &str, device: u16) -> GuestDevice {
        GuestDevice { address: address.into(), vendor: 0x10de, device, class: 0x03_00_00, driver: None }
    }

    #[test]
    fn vf11_a_guests_device_is_found_by_its_numbers_and_two_that_are_alike_are_both_meant() {
        let functions =
            [function("0000:41:00.0", 1), function("0000:41:00.1", 2), function("0000:42:00.0", 1)];
        let told = |guest: &[GuestDevice], functions: &[Function]| {
            let places = places(guest, functions);
            let told = places.iter().map(|(theirs, ours)| {
                let ours: Vec<_> = ours.iter().map(ToString::to_string).collect();
                format!("{theirs} is {}", ours.join(" or "))
            });
            told.collect::<Vec<_>>()
        };
        let card = [guest("0000:01:00.0", 1), guest("0000:01:00.1", 2), guest("0000:02:00.0", 9)];
        assert_eq!(
            told(&card, &functions[..2]),
            ["0000:01:00.0 is 0000:41:00.0", "0000:01:00.1 is 0000:41:00.1"]
        );
        // In which order they came into the guest is not known here: one may have been plugged later.
        assert_eq!(told(&card[..1], &functions), ["0000:01:00.0 is 0000:41:00.0 or 0000:42:00.0"]);
        assert!(told(&card, &[]).is_empty());
        let many: Vec<_> = (0..1000).map(|n| guest(&n.to_string(), 1)).collect();
        assert_eq!(told(&many, &functions).len(), DEVICES_MAX);
    }
}
