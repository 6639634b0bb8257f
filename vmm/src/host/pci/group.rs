//! IOMMU groups: devices that the IOMMU cannot keep apart, so that whoever has one has them all.

use super::{
    address::Address,
    device::{Device, Kind},
    sysfs::Sysfs,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

const GROUPS: &str = "/sys/kernel/iommu_groups";

/// One group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// The PCI devices in it.
    pub members: BTreeSet<Address>,
    /// What else is in it: devices of other buses, which cannot be given to a VM.
    pub foreign: BTreeSet<String>,
    /// Whether there is no IOMMU behind it (VFIO's no-IOMMU mode): its devices reach all of the host's memory.
    pub unprotected: bool,
}

/// All groups of the host.
pub(super) fn read(sysfs: &Sysfs) -> io::Result<BTreeMap<u32, Group>> {
    let mut groups = BTreeMap::new();
    for name in sysfs.names(GROUPS)? {
        let Ok(number) = name.parse::<u32>() else { continue };
        let directory = format!("{GROUPS}/{name}");
        let kind = sysfs.attribute(&format!("{directory}/name")).unwrap_or_default();
        groups.insert(number, parse(&sysfs.names(&format!("{directory}/devices"))?, &kind));
    }
    Ok(groups)
}

fn parse(devices: &BTreeSet<String>, name: &str) -> Group {
    let mut group = Group { unprotected: name.trim() == "vfio-noiommu", ..Group::default() };
    for device in devices {
        match device.parse() {
            Ok(address) => group.members.insert(address),
            Err(_) => group.foreign.insert(device.clone()),
        };
    }
    group
}

/// What must be bound for VFIO if `device` is given to a VM, itself first: the endpoints of its group, and all functions of its card with
/// the endpoints of their groups. Bridges stay as they are, and virtual functions are devices of their own.
pub(super) fn together(
    device: &Device,
    devices: &BTreeMap<Address, Device>,
    groups: &BTreeMap<u32, Group>,
) -> Vec<Address> {
    let endpoint =
        |address: &Address| devices.get(address).is_some_and(|member| member.kind == Kind::Endpoint);
    let mut found = BTreeSet::new();
    // Each device that is found may bring its card, and each card its group.
    let mut waiting = vec![device.address];
    while let Some(address) = waiting.pop() {
        let Some(member) = devices.get(&address) else { continue };
        if !found.insert(address) {
            continue;
        }
        if member.physical_function.is_none() {
            let card = devices.values().filter(|other| {
                other.address.same_card(address)
                    && other.physical_function.is_none()
                    && other.kind == Kind::Endpoint
            });
            waiting.extend(card.map(|other| other.address));
        }
        let group = member.group.and_then(|group| groups.get(&group));
        waiting.extend(group.into_iter().flat_map(|group| &group.members).filter(|member| endpoint(member)));
    }
    found.remove(&device.address);
    std::iter::once(device.address).chain(found).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::{Inventory, machine::Machine};

    fn set<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeSet<T> {
        items.into_iter().collect()
    }

    #[test]
    fn members_of_other_buses_are_told_apart() {
        let devices = set(["0000:01:00.0".to_owned(), "fd800000.dma".to_owned()]);
        let group = parse(&devices, "");
        assert_eq!(group.members, set(["0000:01:00.0".parse().unwrap()]));
        assert_eq!(group.foreign, set(["fd800000.dma".to_owned()]));
        assert!(!group.unprotected && parse(&devices, "vfio-noiommu\n").unprotected);
    }

    #[test]
    fn vf4_all_functions_of_a_card_go_together() {
        let inventory = Inventory::of(&Machine::recorded("turing"));
        let with = |text: &str| {
            let device = &inventory.devices[&text.parse().unwrap()];
            together(device, &inventory.devices, &inventory.groups)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(with("0000:26:00.0"), ["0000:26:00.0", "0000:26:00.1", "0000:26:00.2", "0000:26:00.3"]);
        // The one that was asked for comes first.
        assert_eq!(with("0000:26:00.3"), ["0000:26:00.3", "0000:26:00.0", "0000:26:00.1", "0000:26:00.2"]);
        // A group of 7, of which four are bridges.
        assert_eq!(with("0000:22:00.0"), ["0000:22:00.0", "0000:03:00.0", "0000:03:00.1"]);
    }

    #[test]
    fn vf4_functions_in_groups_of_their_own_go_together_and_virtual_functions_do_not() {
        let device = |address: &str, more: &str| {
            format!("[{address}]\nvendor = 0x10de\ndevice = 0x0001\nclass = 0x030000\n{more}\n")
        };
        let machine = Machine::of(
            &[
                device("0000:01:00.0", "iommu_group = 1"),
                device("0000:01:00.1", "iommu_group = 2"),
                device("0000:02:00.0", "iommu_group = 2"),
                device("0000:01:00.4", "iommu_group = 3\nphysfn = 0000:01:00.0"),
                device("0000:03:00.0", "iommu_group = 4"),
            ]
            .concat(),
        );
        let inventory = Inventory::of(&machine);
        let with = |text: &str| {
            let device = &inventory.devices[&text.parse().unwrap()];
            together(device, &inventory.devices, &inventory.groups)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(with("0000:01:00.0"), ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]);
        assert_eq!(with("0000:01:00.4"), ["0000:01:00.4"]);
        assert_eq!(with("0000:03:00.0"), ["0000:03:00.0"]);
    }
}
