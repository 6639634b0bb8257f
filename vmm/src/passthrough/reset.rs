//! How a device is reset, and whether it is fine afterwards. Pure.
//!
//! A function that has a way of its own is reset by it. Functions of one card often have none but the reset of their bus, which the kernel
//! offers to a function only where it is alone there (it may list it nevertheless, having looked before it knew the others); then the
//! bridge above resets all that is below it, where that is all ours: by the kernel's file for it, or by VFIO where there is none, or where the
//! hotplug driver would take that for a removal.

use super::{binding::Function, machine::Reason};
use crate::host::pci::{Address, Bridge, Device};
use std::collections::BTreeMap;

/// How devices are reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResetBy {
    /// A 1 is written to this file.
    File(String),
    /// VFIO resets all that is on the bus.
    Vfio {
        /// A function on it.
        function: Address,
        /// The IOMMU groups of all that is there, its own first.
        groups: Vec<u32>,
    },
}

/// What is written to reset all of `devices`, which are one whole. `bridges` are those above them, by device.
pub fn plan(devices: &[Device], bridges: &BTreeMap<Address, Bridge>) -> Result<Vec<ResetBy>, Reason> {
    let mut by_bridge: BTreeMap<Option<Address>, Vec<&Device>> = BTreeMap::new();
    for device in devices {
        by_bridge.entry(bridges.get(&device.address).map(|bridge| bridge.address)).or_default().push(device);
    }
    let ours = |address: &Address| devices.iter().any(|device| device.address == *address);
    let mut writes = Vec::new();
    for members in by_bridge.values() {
        let bridge = members.first().and_then(|member| bridges.get(&member.address));
        let alone = bridge.is_some_and(|bridge| bridge.below.len() == 1);
        let lacks = members.iter().find(|member| !has_own(member, alone));
        match (lacks, bridge) {
            (None, _) => {
                writes.extend(members.iter().map(|member| ResetBy::File(attribute(member.address, "reset"))));
            }
            (Some(member), Some(bridge)) if bridge.below.iter().all(ours) => {
                writes.push(if bridge.resets && !bridge.hotplug {
                    ResetBy::File(attribute(bridge.address, "reset_subordinate"))
                } else {
                    by_vfio(member, members)
                });
            }
            (Some(member), bridge) => {
                let why = match bridge {
                    Some(bridge) => {
                        let others: Vec<_> = bridge
                            .below
                            .iter()
                            .filter(|below| !ours(below))
                            .map(ToString::to_string)
                            .collect();
                        format!(
                            "the kernel offers no way but with {}, which this VM does not get",
                            others.join(", ")
                        )
                    }
                    None => "the kernel offers no way".into(),
                };
                return Err(Reason::NoReset { address: member.address.to_string(), why });
            }
        }
    }
    Ok(writes)
}

fn by_vfio(first: &Device, members: &[&Device]) -> ResetBy {
    let mut groups: Vec<u32> = Vec::new();
    for group in std::iter::once(&first).chain(members).filter_map(|member| member.group) {
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    ResetBy::Vfio { function: first.address, groups }
}

/// Whether it can be reset without others. An old kernel does not tell how it would.
fn has_own(device: &Device, alone: bool) -> bool {
    let of_bus = |method: &String| matches!(method.as_str(), "bus" | "cxl_bus");
    device.reset_methods.as_ref().is_none_or(|methods| methods.iter().any(|method| alone || !of_bus(method)))
}

fn attribute(address: Address, name: &str) -> String {
    format!("/sys/bus/pci/devices/{address}/{name}")
}

/// Whether a device is as it was when it was taken. `numbers` is what its own configuration space begins with: vendor and device.
pub fn check(function: &Function, device: &Device, numbers: Option<u32>) -> Result<(), Reason> {
    let address = || function.address.to_string();
    // That of a virtual function says nothing.
    if let Some(numbers) = numbers.filter(|_| device.physical_function.is_none()) {
        if numbers == u32::MAX {
            return Err(Reason::Dead { address: address() });
        }
        let wanted = u32::from(function.device.0) << 16 | u32::from(function.vendor.0);
        if numbers != wanted {
            let told = |numbers: u32| format!("{:04x}:{:04x}", numbers & 0xffff, numbers >> 16);
            return Err(Reason::Other { address: address(), found: told(numbers), wanted: told(wanted) });
        }
    }
    if let (Some(wanted), Some(found)) = (function.width, device.link.width)
        && found < wanted
    {
        return Err(Reason::Width { address: address(), found, wanted });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::{Inventory, Sysfs, machine::Machine};

    fn planned(text: &str, whole: &[&str]) -> Result<Vec<String>, String> {
        let machine = Machine::of(text);
        let inventory = Inventory::of(&machine);
        let sysfs = Sysfs::at(machine.root());
        let devices: Vec<_> =
            whole.iter().map(|address| inventory.devices[&address.parse().unwrap()].clone()).collect();
        let bridges = devices
            .iter()
            .filter_map(|d| Some((d.address, Bridge::above(&sysfs, d.address).unwrap()?)))
            .collect();
        plan(&devices, &bridges)
            .map(|writes| {
                let told = |write| match write {
                    ResetBy::File(path) => path.replace("/sys/bus/pci/devices/", ""),
                    ResetBy::Vfio { function, groups } => format!("VFIO: {function} {groups:?}"),
                };
                writes.into_iter().map(told).collect()
            })
            .map_err(|reason| reason.to_string())
    }

    fn device(address: &str, parent: &str, more: &str) -> String {
        let parent = if parent.is_empty() { String::new() } else { format!("parent = {parent}\n") };
        format!("[{address}]\nvendor = 0x1234\ndevice = 0x0001\nclass = 0x030000\n{parent}{more}\n")
    }

    const BRIDGE: &str =
        "[0000:00:01.0]\nvendor = 0x1234\ndevice = 0x0002\nclass = 0x060400\nsecondary_bus_number = 1\n";

    #[test]
    fn vf8_each_function_by_its_own_way_or_all_by_the_bridge() {
        let (gpu, sound) = ("0000:01:00.0", "0000:01:00.1");
        let card = |bridge: &str, gpu_has: &str, sound_has: &str| {
            format!(
                "{BRIDGE}{bridge}{}{}",
                device(gpu, "0000:00:01.0", gpu_has),
                device(sound, "0000:00:01.0", sound_has)
            )
        };
        let newer = "reset_subordinate =\n";
        let (flr, bus) = ("reset =\nreset_method = flr bus", "reset =\nreset_method = bus");
        let own = ["0000:01:00.0/reset", "0000:01:00.1/reset"];
        assert_eq!(planned(&card(newer, flr, flr), &[gpu, sound]).unwrap(), own);
        assert_eq!(planned(&card("", "reset =", "reset ="), &[gpu, sound]).unwrap(), own);
        // The reset of the bus that the first function lists is none.
        let all = ["0000:00:01.0/reset_subordinate"];
        assert_eq!(planned(&card(newer, bus, ""), &[gpu, sound]).unwrap(), all);
        assert_eq!(planned(&card(newer, flr, ""), &[gpu, sound]).unwrap(), all);
        // Where the kernel has no file for it, or its hotplug driver would take it for a removal.
        let by_vfio = ["VFIO: 0000:01:00.1 [7]"];
        let groups = ["reset =\nreset_method = flr\niommu_group = 7", "iommu_group = 7"];
        assert_eq!(planned(&card("", groups[0], groups[1]), &[gpu, sound]).unwrap(), by_vfio);
        let slot = "/sys/bus/pci/slots/3/address = 0000:01:00\n";
        let in_slot = |more: &str| format!("{slot}{more}{}", card(newer, groups[0], groups[1]));
        assert_eq!(planned(&in_slot("/sys/bus/pci/slots/3/power = 1\n"), &[gpu, sound]).unwrap(), by_vfio);
        // One that has a name only.
        assert_eq!(planned(&in_slot(""), &[gpu, sound]).unwrap(), ["0000:00:01.0/reset_subordinate"]);
        let apart = card("", "reset =\nreset_method = bus\niommu_group = 7", "iommu_group = 8");
        assert_eq!(planned(&apart, &[gpu, sound]).unwrap(), ["VFIO: 0000:01:00.0 [7, 8]"]);
        // What is below the bridge and not ours would be reset as well.
        let more = card(newer, bus, "") + &device("0000:01:01.0", "0000:00:01.0", "");
        let error = planned(&more, &[gpu, sound]).unwrap_err();
        assert!(error.contains("no way but with 0000:01:01.0"), "{error}");
        // One that is alone can be reset by its bus.
        let alone = format!("{BRIDGE}{}", device(gpu, "0000:00:01.0", bus));
        assert_eq!(planned(&alone, &[gpu]).unwrap(), ["0000:01:00.0/reset"]);
    }

    #[test]
    fn vf8_a_device_without_any_way_is_told() {
        let error = planned(&device("0000:00:07.0", "", ""), &["0000:00:07.0"]).unwrap_err();
        assert_eq!(error, "0000:00:07.0 cannot be reset: the kernel offers no way");
    }

    #[test]
    fn vf8_a_device_that_is_dead_another_or_slower_is_told() {
        let text = device("0000:01:00.0", "", "current_link_width = 8\nmax_link_width = 16");
        let inventory = Inventory::of(&Machine::of(&text));
        let device = &inventory.devices[&"0000:01:00.0".parse().unwrap()];
        let function = Function::of(device);
        assert_eq!(check(&function, device, Some(0x0001_1234)), Ok(()));
        assert_eq!(check(&function, device, None), Ok(()));
        let told =
            |function: &Function, numbers| check(function, device, Some(numbers)).unwrap_err().to_string();
        insta::assert_snapshot!([
            told(&function, u32::MAX),
            told(&function, 0x0002_1234),
            told(&Function { width: Some(16), ..function.clone() }, 0x0001_1234),
        ].join("\n"), @r"
        0000:01:00.0 does not answer: its configuration reads 0xffffffff
        0000:01:00.0 is another device now: 1234:0002, not 1234:0001
        the link of 0000:01:00.0 has 8 lanes of the 16 that it had
        ");
        assert_eq!(check(&Function { width: Some(4), ..function }, device, Some(0x0001_1234)), Ok(()));
    }
}
