//! What is said of devices that VMs may be given.

use crate::{
    host::pci::{Address, Device, DeviceError, Inventory, Obstacle},
    passthrough::{certificate::Certificate, machine::State, record::Holding},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Which devices.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GpusQuery {
    /// All devices, also those that are no GPUs of NVIDIA's or AMD's and are the host's.
    pub all: bool,
}

/// A device that was given back to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReleaseReply {
    /// The device that was named; what goes with it was given back as well.
    pub address: Address,
}

/// Devices of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GpusReply {
    /// The devices, by address.
    pub devices: Vec<GpuStatus>,
    /// Why others could not be read, one sentence each.
    pub unreadable: Vec<String>,
}

/// One device of the host, or one function of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GpuStatus {
    /// What the kernel tells of it.
    #[serde(flatten)]
    pub device: Device,
    /// What kind of device it is, in words.
    pub class_name: String,
    /// All that is in its IOMMU group, itself too.
    pub group_members: Vec<Member>,
    /// What must be given to the same VM: it, its card, and what else is in their groups.
    pub together: Vec<Address>,
    /// Its outputs at which there is a screen.
    pub screens: Vec<String>,
    /// Where it is in the life that `laird` gives it: `host`, `probed`, `bound`, `leased`, `resetting`, `free`, `returning`, `quarantined`.
    pub state: String,
    /// More about that, where it is not the host's.
    pub held: Option<Held>,
    /// Whether it could be given to a VM: whether there is no obstacle, and no VM has it.
    pub available: bool,
    /// Why it cannot be given to a VM.
    pub obstacles: Vec<ObstacleStatus>,
}

/// What is known of a device that is not the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Held {
    /// Since when it is in its state.
    pub since: jiff::Timestamp,
    /// The VM that has it, or is to have it.
    pub vm: Option<String>,
    /// The VM that had it last.
    pub last_vm: Option<String>,
    /// Why it is quarantined.
    pub reason: Option<String>,
    /// The driver that gets it back.
    pub first_driver: Option<String>,
    /// Whether it has been reset, and was fine, since a VM had it.
    pub clean: bool,
    /// How long its last reset took.
    pub reset_ms: Option<u64>,
    /// What is known of its health in the lease that a VM has, or had last. It is kept as long as the device is not the host's, and in the audit log.
    #[serde(default)]
    pub lease: Option<Certificate>,
}

/// A device in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Member {
    /// Its address; for what is no PCI device, its name.
    pub name: String,
    /// What kind of device it is, in words; none where that is not known.
    pub class_name: Option<String>,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whether it must be bound for VFIO when the group is given to a VM. Bridges need not.
    pub bound: bool,
}

/// A reason why a device cannot be given to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObstacleStatus {
    /// Which it is, in one word.
    pub kind: String,
    /// For people.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

impl GpusReply {
    /// What there is.
    pub fn new(inventory: &Inventory, held: &BTreeMap<Address, Holding>, query: &GpusQuery) -> Self {
        let status = |device| GpuStatus::new(inventory, held, device);
        let gpus: BTreeSet<_> = inventory.gpus().map(|device| device.address).collect();
        // What a VM has, or has broken, is of interest whatever it is.
        let is_held = |device: &Device| held.values().any(|holding| holding.has(device.address));
        Self {
            devices: inventory
                .devices
                .values()
                .filter(|device| query.all || gpus.contains(&device.address) || is_held(device))
                .map(status)
                .collect(),
            unreadable: inventory.unreadable.iter().map(|error| crate::error::chain(error)).collect(),
        }
    }
}

impl GpuStatus {
    /// All about the device at `address`.
    pub fn of(
        inventory: &Inventory,
        held: &BTreeMap<Address, Holding>,
        address: Address,
    ) -> Result<Self, DeviceError> {
        inventory.device(address).map(|device| Self::new(inventory, held, device))
    }

    fn new(inventory: &Inventory, held: &BTreeMap<Address, Holding>, device: &Device) -> Self {
        let holding = held.values().find(|holding| holding.has(device.address));
        let obstacles: Vec<_> =
            inventory.obstacles(device, &BTreeSet::new()).iter().map(ObstacleStatus::new).collect();
        Self {
            class_name: device.class.word().into(),
            group_members: members(inventory, device),
            together: inventory.together(device),
            screens: inventory.screens.get(&device.address).into_iter().flatten().cloned().collect(),
            state: holding.map_or("host", |holding| holding.life.state.word()).into(),
            available: obstacles.is_empty()
                && holding.is_none_or(|holding| holding.life.obstacle().is_none()),
            held: holding.map(|holding| Held::new(holding, device.address)),
            obstacles,
            device: device.clone(),
        }
    }
}

impl Held {
    fn new(holding: &Holding, address: Address) -> Self {
        let Holding { functions, life, since, reset_ms, lease, .. } = holding;
        let function = functions.iter().find(|function| function.address == address);
        Self {
            since: *since,
            vm: life.state.vm().map(str::to_owned),
            last_vm: life.last.clone(),
            reason: match &life.state {
                State::Quarantined { reason } => Some(reason.to_string()),
                _ => None,
            },
            first_driver: function.and_then(|function| function.driver.clone()),
            clean: life.clean,
            reset_ms: *reset_ms,
            lease: lease.clone(),
        }
    }
}

impl ObstacleStatus {
    fn new(obstacle: &Obstacle) -> Self {
        Self { kind: obstacle.word().into(), message: obstacle.to_string(), hint: obstacle.mend().into() }
    }
}

fn members(inventory: &Inventory, device: &Device) -> Vec<Member> {
    let Some(group) = device.group.and_then(|group| inventory.groups.get(&group)) else { return vec![] };
    let together = inventory.together(device);
    let of_pci = group.members.iter().map(|address| {
        let member = inventory.devices.get(address);
        Member {
            name: address.to_string(),
            class_name: member.map(|member| member.class.word().into()),
            driver: member.and_then(|member| member.driver.clone()),
            bound: together.contains(address),
        }
    });
    let of_others = group.foreign.iter().map(|name| Member {
        name: name.clone(),
        class_name: None,
        driver: None,
        bound: false,
    });
    of_pci.chain(of_others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::machine::Machine;

    fn list(name: &str, all: bool) -> GpusReply {
        GpusReply::new(&Inventory::of(&Machine::recorded(name)), &BTreeMap::new(), &GpusQuery { all })
    }

    #[test]
    fn gpus_of_recorded_machines() {
        for name in ["gtx-1080", "rtx-4000-sff-ada", "turing"] {
            insta::assert_json_snapshot!(name, list(name, false));
        }
        // Eight of the same kind: the first, which shares its group, will do.
        let mut h100 = list("h100-sxm", false);
        assert_eq!(h100.devices.len(), 8);
        h100.devices.truncate(1);
        insta::assert_json_snapshot!("h100-sxm", h100);
    }

    #[test]
    fn all_devices_are_in_the_longer_list() {
        let addresses =
            |all| list("turing", all).devices.into_iter().map(|gpu| gpu.device.address).collect::<Vec<_>>();
        assert_eq!(addresses(true).len(), 13);
        assert!(addresses(true).contains(&addresses(false)[0]));
    }

    #[test]
    fn vf2_each_member_of_a_group_is_told_with_its_driver() {
        let inventory = Inventory::of(&Machine::recorded("turing"));
        let gpu = GpuStatus::of(&inventory, &BTreeMap::new(), "0000:22:00.0".parse().unwrap()).unwrap();
        let told = |member: &Member| {
            let driver = member.driver.as_deref().unwrap_or("-");
            format!("{} {} {}", member.name, driver, member.bound)
        };
        assert_eq!(
            gpu.group_members.iter().map(told).collect::<Vec<_>>(),
            [
                "0000:03:00.0 xhci_hcd true",
                "0000:03:00.1 ahci true",
                "0000:03:00.2 - false",
                "0000:20:00.0 - false",
                "0000:20:01.0 - false",
                "0000:20:04.0 - false",
                "0000:22:00.0 r8169 true",
            ]
        );
    }

    /// What a client reads is what was said.
    #[test]
    fn it_is_read_as_it_was_written() {
        let reply = list("turing", true);
        let text = serde_json::to_string(&reply).unwrap();
        assert_eq!(serde_json::from_str::<GpusReply>(&text).unwrap(), reply);
    }
}
