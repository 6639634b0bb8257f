//! Why a device cannot be given to a VM, and what to do about it. Pure.

use super::{
    Inventory,
    address::Address,
    device::{Device, Kind},
    usage::Use,
};
use std::collections::BTreeSet;

/// The driver of bridges that leaves the IOMMU to others (Linux, `driver_managed_dma`).
const PORT: &str = "pcieport";

/// One reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// It is a bridge or a part of the mainboard.
    #[error("it is a {0}, and only what is behind it can be given")]
    Bridge(&'static str),
    /// Virtual functions of it are in use, perhaps by others.
    #[error("{0} of its virtual functions are active, and they end when it is reset")]
    VirtualFunctions(u16),
    /// There is no IOMMU, or it is not used.
    #[error("it is in no IOMMU group: without an IOMMU it could write to all of the host's memory")]
    NoIommu,
    /// VFIO pretends that there is an IOMMU.
    #[error("VFIO runs without an IOMMU (no-IOMMU mode): the device could write to all of the host's memory")]
    NoIommuMode,
    /// VFIO was told that interrupts need not be kept apart.
    #[error("VFIO allows unsafe interrupts: the device could send interrupts to the host as it likes")]
    UnsafeInterrupts,
    /// The host uses it, or what goes with it.
    #[error("{} in use: {what}", .other.map_or_else(|| "it is".into(), |other| format!("{other}, which goes with it, is")))]
    InUse {
        /// What goes with it, if that is in use and not it itself.
        other: Option<Address>,
        /// What for.
        what: Use,
    },
    /// The host has drivers on others of its group.
    #[error("its IOMMU group {group} has other devices of the host's; all in it: {}", .members.join(", "))]
    SharedGroup {
        /// The group.
        group: u32,
        /// All members with their drivers.
        members: Vec<String>,
    },
    /// A bridge in its group has a driver that uses the IOMMU as the host's drivers do.
    #[error(
        "the bridge {address} in its IOMMU group {group} has the driver {driver}, beside which VFIO takes no device"
    )]
    BridgeDriver {
        /// The group.
        group: u32,
        /// The bridge.
        address: Address,
        /// The driver.
        driver: String,
    },
    /// Its group has what is no PCI device.
    #[error("its IOMMU group {group} has {}, which cannot be given to a VM", .members.join(", "))]
    ForeignMembers {
        /// The group.
        group: u32,
        /// Their names.
        members: Vec<String>,
    },
    /// A member of its group is not known.
    #[error("{address} in its IOMMU group {group} cannot be read")]
    UnknownMember {
        /// The group.
        group: u32,
        /// The member.
        address: Address,
    },
    /// Whether the host uses it is not known.
    #[error("it cannot be told whether the host uses it: {0}")]
    UnknownUse(String),
}

impl Obstacle {
    /// Which it is, in one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Bridge(_) => "bridge",
            Self::VirtualFunctions(_) => "virtual_functions",
            Self::NoIommu => "no_iommu",
            Self::NoIommuMode => "no_iommu_mode",
            Self::UnsafeInterrupts => "unsafe_interrupts",
            Self::InUse { .. } => "in_use",
            Self::SharedGroup { .. } => "shared_group",
            Self::BridgeDriver { .. } => "bridge_driver",
            Self::ForeignMembers { .. } => "foreign_members",
            Self::UnknownMember { .. } => "unknown_member",
            Self::UnknownUse(_) => "unknown_use",
        }
    }

    /// What to do about it.
    pub fn mend(&self) -> &'static str {
        match self {
            Self::Bridge(_) => "name the device behind it",
            Self::VirtualFunctions(_) => {
                "give a virtual function instead, or end them: echo 0 > sriov_numvfs in its directory of /sys/bus/pci/devices"
            }
            Self::NoIommu => {
                "enable VT-d or AMD-Vi in the firmware, and boot with intel_iommu=on for Intel's"
            }
            Self::NoIommuMode => {
                "remove enable_unsafe_noiommu_mode from /etc/modprobe.d and the kernel's parameters"
            }
            Self::UnsafeInterrupts => {
                "remove allow_unsafe_interrupts from /etc/modprobe.d and the kernel's parameters"
            }
            Self::InUse { what: Use::Display { .. }, .. } => {
                "make another card the firmware's first display, or none; or boot with vfio-pci.ids= and its numbers, so that nothing else draws \
                 on it"
            }
            Self::InUse { what: Use::DefaultRoute { .. }, .. } => "route over another network card",
            Self::InUse { .. } => "move what is on it to another controller",
            Self::SharedGroup { .. } => {
                "put the card into another slot, or enable ACS in the firmware; or give all of the group to the VM"
            }
            Self::BridgeDriver { .. } => {
                "take the bridge from its driver, by a write of its address to the driver's file unbind: what is behind it works without"
            }
            Self::ForeignMembers { .. } => "put the card into another slot",
            Self::UnknownMember { .. } | Self::UnknownUse(_) => "look into the kernel's log: journalctl -k",
        }
    }
}

/// All reasons why `device` cannot be given to a VM that gets the devices `also` as well; none if it can.
pub(super) fn obstacles(inventory: &Inventory, device: &Device, also: &BTreeSet<Address>) -> Vec<Obstacle> {
    if device.kind != Kind::Endpoint {
        return vec![Obstacle::Bridge(device.class.word())];
    }
    let mut found = Vec::new();
    let together = inventory.together(device);
    let members = || together.iter().filter_map(|address| inventory.devices.get(address));
    let active = members().filter_map(|member| member.virtual_functions).map(|functions| functions.active);
    found.extend(active.filter(|active| *active > 0).map(Obstacle::VirtualFunctions));
    let groups: Vec<u32> = {
        let mut groups: Vec<_> = members().filter_map(|member| member.group).collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    };
    let known = |group: &u32| inventory.groups.get(group);
    if members().any(|member| member.group.is_none()) {
        found.push(Obstacle::NoIommu);
    }
    if inventory.vfio.no_iommu_mode || groups.iter().filter_map(known).any(|group| group.unprotected) {
        found.push(Obstacle::NoIommuMode);
    }
    if inventory.vfio.unsafe_interrupts {
        found.push(Obstacle::UnsafeInterrupts);
    }
    match &inventory.uses {
        Ok(uses) => {
            let of = |address: &Address| {
                uses.get(address)
                    .into_iter()
                    .flatten()
                    .map(|what| (*address, what.clone()))
                    .collect::<Vec<_>>()
            };
            let each = together.iter().flat_map(of);
            let other = |address: Address| (address != device.address).then_some(address);
            found.extend(each.map(|(address, what)| Obstacle::InUse { other: other(address), what }));
        }
        Err(error) => found.push(Obstacle::UnknownUse(error.clone())),
    }
    for group in groups {
        found.extend(group_obstacles(inventory, device, group, also));
    }
    found
}

fn group_obstacles(
    inventory: &Inventory,
    device: &Device,
    number: u32,
    also: &BTreeSet<Address>,
) -> Vec<Obstacle> {
    let Some(group) = inventory.groups.get(&number) else { return vec![] };
    let mut found = Vec::new();
    if !group.foreign.is_empty() {
        found.push(Obstacle::ForeignMembers {
            group: number,
            members: group.foreign.iter().cloned().collect(),
        });
    }
    for address in group.members.iter().filter(|address| !inventory.devices.contains_key(address)) {
        found.push(Obstacle::UnknownMember { group: number, address: *address });
    }
    let known: Vec<_> = group.members.iter().filter_map(|address| inventory.devices.get(address)).collect();
    for bridge in known.iter().filter(|member| member.kind == Kind::Bridge) {
        if let Some(driver) = bridge.host_driver().filter(|driver| *driver != PORT) {
            let (address, driver) = (bridge.address, driver.to_owned());
            found.push(Obstacle::BridgeDriver { group: number, address, driver });
        }
    }
    // The functions of its own card are taken from their drivers with it. Bridges keep theirs, where those let VFIO be.
    let holds = |member: &Device| {
        member.kind != Kind::Bridge
            && member.host_driver().is_some()
            && (member.kind == Kind::Platform || !member.address.same_card(device.address))
            && !also.contains(&member.address)
    };
    if known.iter().any(|member| holds(member)) {
        let members = known.iter().map(|member| member.told()).collect();
        found.push(Obstacle::SharedGroup { group: number, members });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::machine::Machine;

    fn told(inventory: &Inventory, address: &str) -> Vec<String> {
        let device = &inventory.devices[&address.parse().unwrap()];
        let found = obstacles(inventory, device, &BTreeSet::new());
        for obstacle in &found {
            assert!(!obstacle.mend().is_empty() && !obstacle.word().is_empty());
        }
        found.iter().map(|obstacle| format!("{}: {obstacle}", obstacle.word())).collect()
    }

    /// A device without anything against it, and what else the test says.
    fn machine(more: &str) -> Inventory {
        Inventory::of(&Machine::of(&format!("/proc/self/mountinfo =\n{more}")))
    }

    fn endpoint(address: &str, more: &str) -> String {
        format!("[{address}]\nvendor = 0x1234\ndevice = 0x0001\nclass = 0x020000\n{more}\n")
    }

    #[test]
    fn a_device_alone_in_its_group_can_be_given_whatever_driver_has_it() {
        for driver in ["", "driver = nvidia\n", "driver = vfio-pci\n"] {
            let inventory = machine(&endpoint("0000:01:00.0", &format!("iommu_group = 1\n{driver}")));
            assert_eq!(told(&inventory, "0000:01:00.0"), Vec::<String>::new());
        }
    }

    #[test]
    fn vf1_bridges_and_devices_with_active_virtual_functions_are_refused() {
        let functions = |active: u16| format!("iommu_group = 1\nsriov_totalvfs = 8\nsriov_numvfs = {active}");
        assert_eq!(
            told(&machine(&endpoint("0000:01:00.0", &functions(0))), "0000:01:00.0"),
            Vec::<String>::new()
        );
        insta::assert_debug_snapshot!(told(&machine(&endpoint("0000:01:00.0", &functions(2))), "0000:01:00.0"), @r#"
        [
            "virtual_functions: 2 of its virtual functions are active, and they end when it is reset",
        ]
        "#);
        let bridge = endpoint("0000:01:00.0", "iommu_group = 1\nsecondary_bus_number = 2");
        insta::assert_debug_snapshot!(told(&machine(&bridge.replace("0x020000", "0x060400")), "0000:01:00.0"), @r#"
        [
            "bridge: it is a PCI bridge, and only what is behind it can be given",
        ]
        "#);
    }

    #[test]
    fn vf1_what_the_host_uses_is_refused_with_what_goes_with_it() {
        // A disk at the USB port of a graphics card.
        let card = endpoint("0000:01:00.0", "iommu_group = 1")
            + &endpoint("0000:01:00.2", "iommu_group = 1\ndriver = xhci_hcd");
        let disk = "/proc/self/mountinfo = 1 0 8:1 / /data rw - ext4 /dev/sda1 rw\n\
                    /sys/devices/pci0000:00/0000:01:00.2/usb1/block/sda/sda1/dev = 8:1\n\
                    /sys/class/block/sda1 -> /sys/devices/pci0000:00/0000:01:00.2/usb1/block/sda/sda1\n";
        let inventory = Inventory::of(&Machine::of(&(disk.to_owned() + &card)));
        let expected = ["in_use: 0000:01:00.2, which goes with it, is in use: sda1 is mounted on /data"];
        assert_eq!(told(&inventory, "0000:01:00.0"), expected);
        assert_eq!(told(&inventory, "0000:01:00.2"), ["in_use: it is in use: sda1 is mounted on /data"]);
    }

    #[test]
    fn vf1_where_the_hosts_use_is_not_known_nothing_is_free() {
        let inventory = Inventory::of(&Machine::of(&endpoint("0000:01:00.0", "iommu_group = 1")));
        let told = told(&inventory, "0000:01:00.0");
        assert!(told.len() == 1 && told[0].starts_with("unknown_use: "), "{told:?}");
    }

    #[test]
    fn vf2_all_members_of_a_shared_group_are_listed_with_their_drivers() {
        let inventory = Inventory::of(&Machine::recorded("turing"));
        insta::assert_debug_snapshot!(told(&inventory, "0000:03:00.1"));
    }

    #[test]
    fn vf2_a_shared_group_can_be_taken_whole() {
        let machine = machine(
            &(endpoint("0000:01:00.0", "iommu_group = 1\ndriver = e1000e")
                + &endpoint("0000:02:00.0", "iommu_group = 1\ndriver = nvme")
                + &endpoint("0000:03:00.0", "iommu_group = 1\ndriver = igb")),
        );
        let device = &machine.devices[&"0000:01:00.0".parse().unwrap()];
        let with = |also: &[&str]| {
            let also = also.iter().map(|address| address.parse().unwrap()).collect();
            obstacles(&machine, device, &also).len()
        };
        assert_eq!(with(&["0000:02:00.0"]), 1);
        assert_eq!(with(&["0000:02:00.0", "0000:03:00.0"]), 0);
    }

    #[test]
    fn vf2_members_without_a_driver_or_with_vfio_are_no_obstacle() {
        let inventory = Inventory::of(&Machine::recorded("h100-sxm"));
        assert_eq!(told(&inventory, "0000:11:00.0"), Vec::<String>::new());
        let device = &inventory.devices[&"0000:11:00.0".parse().unwrap()];
        assert_eq!(inventory.together(device)[1].to_string(), "0000:12:00.0");
    }

    #[test]
    fn vf2_a_group_with_what_is_no_pci_device_or_with_what_cannot_be_read_is_refused() {
        let inventory = machine(
            &(endpoint("0000:01:00.0", "iommu_group = 1")
                + "/sys/kernel/iommu_groups/1/devices/fd800000.dma/x = 1\n\
                   /sys/kernel/iommu_groups/1/devices/0000:09:00.0/x = 1\n"),
        );
        insta::assert_debug_snapshot!(told(&inventory, "0000:01:00.0"), @r#"
        [
            "foreign_members: its IOMMU group 1 has fd800000.dma, which cannot be given to a VM",
            "unknown_member: 0000:09:00.0 in its IOMMU group 1 cannot be read",
        ]
        "#);
    }

    #[test]
    fn vf2_a_part_of_the_mainboard_with_a_driver_shares_the_group_and_a_bridge_does_not() {
        let with = |class: &str, driver: &str| {
            let other = endpoint("0000:00:1f.0", &format!("iommu_group = 1\n{driver}"));
            machine(&(endpoint("0000:01:00.0", "iommu_group = 1") + &other.replace("0x020000", class)))
        };
        let count = |inventory: Inventory| told(&inventory, "0000:01:00.0").len();
        assert_eq!(count(with("0x060100", "driver = lpc_ich")), 1);
        assert_eq!(count(with("0x060100", "")), 0);
        assert_eq!(count(with("0x060400", "driver = pcieport")), 0);
    }

    #[test]
    fn vf2_a_bridge_in_the_group_may_have_the_driver_that_leaves_the_iommu_alone_and_no_other() {
        let with = |driver: &str| {
            let bridge =
                endpoint("0000:00:1c.0", &format!("iommu_group = 1\nsecondary_bus_number = 1\n{driver}"));
            let bridge = bridge.replace("0x020000", "0x060400");
            told(&machine(&(bridge + &endpoint("0000:01:00.0", "iommu_group = 1"))), "0000:01:00.0")
        };
        assert_eq!((with("driver = pcieport"), with("")), (vec![], vec![]));
        insta::assert_debug_snapshot!(with("driver = shpchp"), @r#"
        [
            "bridge_driver: the bridge 0000:00:1c.0 in its IOMMU group 1 has the driver shpchp, beside which VFIO takes no device",
        ]
        "#);
    }

    #[test]
    fn vf3_without_an_iommu_or_with_its_protection_switched_off_it_is_refused() {
        let device = endpoint("0000:01:00.0", "");
        insta::assert_debug_snapshot!(told(&machine(&device), "0000:01:00.0"), @r#"
        [
            "no_iommu: it is in no IOMMU group: without an IOMMU it could write to all of the host's memory",
        ]
        "#);
        let device = endpoint("0000:01:00.0", "iommu_group = 1");
        let mode = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode = Y\n";
        let interrupts = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts = Y\n";
        let group = "/sys/kernel/iommu_groups/1/name = vfio-noiommu\n";
        let words = |more: &str| {
            let told = told(&machine(&format!("{more}{device}")), "0000:01:00.0");
            told.iter().map(|told| told.split(':').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(words(mode), ["no_iommu_mode"]);
        assert_eq!(words(group), ["no_iommu_mode"]);
        assert_eq!(words(interrupts), ["unsafe_interrupts"]);
        assert_eq!(words(&(mode.to_owned() + interrupts)), ["no_iommu_mode", "unsafe_interrupts"]);
        assert_eq!(words(&(mode.to_owned() + interrupts).replace('Y', "N")), Vec::<String>::new());
    }

    #[test]
    fn vf3_recorded_a_host_with_its_iommu_off() {
        let inventory = Inventory::of(&Machine::recorded("gtx-1080"));
        insta::assert_debug_snapshot!(told(&inventory, "0000:65:00.0"));
    }
}
