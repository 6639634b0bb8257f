//! The PCI devices of the host, and which of them can be given to VMs. See the README.md here.

mod address;
mod aer;
mod bar;
mod bridge;
mod device;
mod facts;
mod gpu;
mod group;
mod id;
mod link;
#[cfg(test)]
#[path = "../../../tests/common/machine.rs"]
pub(crate) mod machine;
pub mod names;
mod obstacle;
mod sysfs;
mod usage;

pub use address::{Address, NotAnAddress};
pub use aer::AerCounts;
pub use bar::{Bar, Space};
pub use bridge::Bridge;
pub use device::{Device, DeviceError, Kind, Subsystem, VirtualFunctions};
pub use gpu::{Architecture, Gpu};
pub use group::Group;
pub use id::{AMD, Class, Id, NVIDIA};
pub use link::{Link, Speed};
pub use obstacle::Obstacle;
pub use sysfs::Sysfs;
pub use usage::Use;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

/// All devices of the host, as they were at one moment.
#[derive(Debug)]
pub struct Inventory {
    /// The devices that could be read.
    pub devices: BTreeMap<Address, Device>,
    /// Why others could not.
    pub unreadable: Vec<DeviceError>,
    /// The IOMMU groups; none: there is no IOMMU, or it is off.
    pub groups: BTreeMap<u32, Group>,
    /// What the host itself uses devices for, or why that is not known.
    pub uses: Result<BTreeMap<Address, BTreeSet<Use>>, String>,
    /// Outputs of devices at which there is a screen.
    pub screens: BTreeMap<Address, BTreeSet<String>>,
    /// How VFIO is set up.
    pub vfio: Vfio,
}

/// How VFIO, by which a VM gets a device, is set up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vfio {
    /// Whether the driver `vfio-pci` is loaded or built in.
    pub driver: bool,
    /// Whether it takes devices that no IOMMU holds back.
    pub no_iommu_mode: bool,
    /// Whether it takes devices on hosts that cannot keep their interrupts apart.
    pub unsafe_interrupts: bool,
}

/// Why there is no inventory.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The list of devices cannot be read.
    #[error("The PCI devices cannot be listed")]
    Devices(#[source] io::Error),
    /// The list of groups cannot be read.
    #[error("The IOMMU groups cannot be listed")]
    Groups(#[source] io::Error),
}

impl Inventory {
    /// Looks at all devices. Changes nothing.
    pub fn read(sysfs: &Sysfs) -> Result<Self, InventoryError> {
        let groups = group::read(sysfs).map_err(InventoryError::Groups)?;
        let (mut devices, mut unreadable) = (BTreeMap::new(), Vec::new());
        for address in device::addresses(sysfs).map_err(InventoryError::Devices)? {
            match Device::read(sysfs, address) {
                Ok(device) => {
                    devices.insert(address, device);
                }
                // It went while the others were read.
                Err(DeviceError::Missing(_)) => {}
                Err(error) => unreadable.push(error),
            }
        }
        let uses = facts::read(sysfs)
            .map(|facts| usage::uses(&facts, devices.values()))
            .map_err(|error| crate::error::chain(&error));
        let screens = facts::connected(sysfs);
        Ok(Self { devices, unreadable, groups, uses, screens, vfio: Vfio::read(sysfs) })
    }

    /// One device.
    pub fn device(&self, address: Address) -> Result<&Device, DeviceError> {
        self.devices.get(&address).ok_or(DeviceError::Missing(address))
    }

    /// What must be bound if `device` is given to a VM, itself first.
    pub fn together(&self, device: &Device) -> Vec<Address> {
        group::together(device, &self.devices, &self.groups)
    }

    /// Why `device` cannot be given to a VM that gets the devices `also` as well; nothing if it can.
    pub fn obstacles(&self, device: &Device, also: &BTreeSet<Address>) -> Vec<Obstacle> {
        obstacle::obstacles(self, device, also)
    }

    /// The cards that compute: NVIDIA's and AMD's.
    pub fn gpus(&self) -> impl Iterator<Item = &Device> {
        self.devices.values().filter(|device| {
            device.class.is_display()
                && [NVIDIA, AMD].contains(&device.vendor)
                && device.kind == Kind::Endpoint
        })
    }

    /// A recorded machine's.
    #[cfg(test)]
    pub(crate) fn of(machine: &machine::Machine) -> Self {
        Self::read(&Sysfs::at(machine.root())).unwrap()
    }
}

impl Vfio {
    /// Looks at the modules' parameters.
    pub fn read(sysfs: &Sysfs) -> Self {
        let yes = |path: &str| sysfs.attribute(path).is_ok_and(|value| value.trim() == "Y");
        Self {
            driver: sysfs.exists("/sys/bus/pci/drivers/vfio-pci"),
            no_iommu_mode: yes("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"),
            unsafe_interrupts: yes("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::Machine;

    #[test]
    fn gpus_are_nvidias_and_amds_display_controllers() {
        let gpus = |name: &str| {
            let inventory = Inventory::of(&Machine::recorded(name));
            inventory.gpus().map(|device| device.address.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(gpus("turing"), ["0000:26:00.0"]);
        assert_eq!(gpus("rtx-4000-sff-ada"), ["0000:01:00.0"]);
        // Eight, and no NVSwitch.
        assert_eq!(gpus("h100-sxm").len(), 8);
    }

    #[test]
    fn a_device_that_makes_no_sense_hides_no_other() {
        let machine = Machine::of(
            "[0000:01:00.0]\nvendor = x\n[0000:02:00.0]\nvendor = 0x10de\ndevice = 0x2330\nclass = 0x030200\n\
             /sys/bus/pci/devices/nonsense/vendor = 0x10de\n",
        );
        let inventory = Inventory::of(&machine);
        assert_eq!(inventory.devices.len(), 1);
        assert_eq!(inventory.unreadable.len(), 1);
        assert!(inventory.device("0000:01:00.0".parse().unwrap()).is_err());
    }

    #[test]
    fn vf3_modules_are_looked_at() {
        assert_eq!(Inventory::of(&Machine::of("")).vfio, Vfio::default());
        let machine = Machine::of(
            "/sys/bus/pci/drivers/vfio-pci/bind =\n\
             /sys/module/vfio/parameters/enable_unsafe_noiommu_mode = Y\n\
             /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts = Y\n",
        );
        let vfio = Vfio { driver: true, no_iommu_mode: true, unsafe_interrupts: true };
        assert_eq!(Inventory::of(&machine).vfio, vfio);
    }

    /// This host's own devices are understood, whatever they are.
    #[test]
    fn this_host_can_be_read() {
        let inventory = Inventory::read(&Sysfs::of_this_host()).unwrap();
        if inventory.devices.is_empty() {
            return println!("SKIPPED: this host has no PCI devices");
        }
        assert!(inventory.unreadable.is_empty(), "{:?}", inventory.unreadable);
        for device in inventory.devices.values() {
            assert_eq!(inventory.together(device)[0], device.address);
            inventory.obstacles(device, &BTreeSet::new());
        }
    }
}
