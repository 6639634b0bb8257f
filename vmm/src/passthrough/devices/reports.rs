//! What guests say of their devices, and what follows from it.
//!
//! **A guest is not trusted.** What it says counts for devices that it has itself, and for no others; each is known to it by an address of its
//! own, so `laird` looks which of the VM's devices may be meant: by vendor and device, and of those that are alike by the port that `laird` has put it
//! into and the number of the function there. A guest that does not tell the port (an earlier release's, or one that lies) means all that are alike.
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

use super::{Devices, Fault, Function, Holding, State, Told, What, lock};
use crate::{
    error::chain,
    host::pci::{Address, Id},
    hypervisor::ports::Place,
    passthrough::certificate::{Said, Sum, Sums},
    shim::protocol::GuestDevices,
};
use lair_guest::wire::message::GuestDevice;
use std::{collections::BTreeMap, sync::Arc};

/// The most of what a guest tells that is looked at; its shim has cut it already.
const DEVICES_MAX: usize = 64;

/// A function that a VM has, as its guest may know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// Where it is.
    pub address: Address,
    /// Who made it.
    pub vendor: Id,
    /// What it is.
    pub device: Id,
    /// Where the guest sees it, as far as that is known.
    pub place: Option<Place>,
}

/// Which of the VM's functions each of the guest's devices may be, by its address in the guest. None where the VM has no such device.
pub fn places<'a>(guest: &'a [GuestDevice], functions: &[Lent]) -> BTreeMap<&'a str, Vec<Address>> {
    let mut places = BTreeMap::new();
    for device in guest.iter().take(DEVICES_MAX) {
        let numbers = (Id(device.vendor), Id(device.device));
        let alike = functions.iter().filter(|function| (function.vendor, function.device) == numbers);
        let place = place(device);
        let there = alike.clone().filter(|function| place.is_some() && function.place == place);
        let there: Vec<_> = there.map(|function| function.address).collect();
        let meant = if there.is_empty() { alike.map(|function| function.address).collect() } else { there };
        if !meant.is_empty() {
            places.insert(device.address.as_str(), meant);
        }
    }
    places
}

/// Where a guest says that it sees a device.
fn place(device: &GuestDevice) -> Option<Place> {
    let address: Address = device.address.parse().ok()?;
    Some(Place { port: device.port.as_deref()?.parse().ok()?, function: address.function() })
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
    pub fn functions_of(&self, vm: &str) -> Vec<Lent> {
        let held = lock(&self.held);
        let its = held.values().filter(|holding| holding.life.state == State::Leased { vm: vm.into() });
        let lent = |holding: &Holding| {
            let lent = |function: &Function| Lent {
                address: function.address,
                vendor: function.vendor,
                device: function.device,
                place: holding.places.get(&function.address).copied(),
            };
            holding.functions.iter().map(lent).collect::<Vec<_>>()
        };
        its.flat_map(lent).collect()
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

    fn lent(address: &str, device: u16) -> Lent {
        Lent { address: address.parse().unwrap(), vendor: Id(0x10de), device: Id(device), place: None }
    }

    fn lent_in(address: &str, device: u16, port: &str, function: u8) -> Lent {
        Lent { place: Some(Place { port: port.parse().unwrap(), function }), ..lent(address, device) }
    }

    fn guest(address: &str, device: u16) -> GuestDevice {
        GuestDevice {
            address: address.into(),
            vendor: 0x10de,
            device,
            class: 0x03_00_00,
            driver: None,
            port: None,
        }
    }

    fn guest_in(address: &str, device: u16, port: &str) -> GuestDevice {
        GuestDevice { port: Some(port.into()), ..guest(address, device) }
    }

    fn told(guest: &[GuestDevice], functions: &[Lent]) -> Vec<String> {
        let places = places(guest, functions);
        let told = places.iter().map(|(theirs, ours)| {
            let ours: Vec<_> = ours.iter().map(ToString::to_string).collect();
            format!("{theirs} is {}", ours.join(" or "))
        });
        told.collect()
    }

    #[test]
    fn vf11_a_guests_device_is_found_by_its_numbers_and_two_that_are_alike_are_both_meant() {
        let functions = [lent("0000:41:00.0", 1), lent("0000:41:00.1", 2), lent("0000:42:00.0", 1)];
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

    #[test]
    fn vf11_of_two_that_are_alike_the_one_in_the_port_is_meant() {
        let functions = [
            lent_in("0000:41:00.0", 1, "0000:00:1a.0", 0),
            // Two functions of one card, alike as well.
            lent_in("0000:42:00.0", 1, "0000:00:1b.0", 0),
            lent_in("0000:42:00.1", 1, "0000:00:1b.0", 1),
        ];
        let seen = [
            guest_in("0000:06:00.0", 1, "0000:00:1a.0"),
            guest_in("0000:05:00.0", 1, "0000:00:1b.0"),
            guest_in("0000:05:00.1", 1, "0000:00:1b.0"),
        ];
        assert_eq!(
            told(&seen, &functions),
            ["0000:05:00.0 is 0000:42:00.0", "0000:05:00.1 is 0000:42:00.1", "0000:06:00.0 is 0000:41:00.0"]
        );
    }

    /// Whatever a guest says of ports, it means devices of its own that are of the kind that it says.
    #[test]
    fn vs3_a_guest_that_lies_about_ports_means_all_that_are_alike_and_no_others() {
        let functions = [
            lent_in("0000:41:00.0", 1, "0000:00:1a.0", 0),
            lent_in("0000:42:00.0", 1, "0000:00:1b.0", 0),
            lent_in("0000:43:00.0", 2, "0000:00:1c.0", 0),
        ];
        let both = "0000:41:00.0 or 0000:42:00.0";
        for port in ["0000:00:1c.0", "0000:00:1d.0", "0000:00:1a.1", "", "port1", "\u{1b}[2J", "0000:00:1A.0"]
        {
            let seen = guest_in("0000:05:00.0", 1, port);
            assert_eq!(told(&[seen], &functions), [format!("0000:05:00.0 is {both}")], "{port:?}");
        }
        for address in ["", "x", "0000:05:00.1", "0000:05:00.8"] {
            let seen = guest_in(address, 1, "0000:00:1a.0");
            assert_eq!(told(&[seen], &functions), [format!("{address} is {both}")], "{address:?}");
        }
        assert!(told(&[guest_in("0000:05:00.0", 3, "0000:00:1a.0")], &functions).is_empty());
        // One that an earlier laird gave it is in none that is known.
        let functions = [lent("0000:41:00.0", 1), functions[1]];
        let seen = [guest_in("0000:05:00.0", 1, "0000:00:06.0"), guest_in("0000:06:00.0", 1, "0000:00:1b.0")];
        assert_eq!(
            told(&seen, &functions),
            [format!("0000:05:00.0 is {both}"), "0000:06:00.0 is 0000:42:00.0".into()]
        );
    }
}
