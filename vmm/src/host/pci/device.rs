//! One device, as its directory in sysfs tells it.

use super::{
    address::Address,
    bar::{self, Bar},
    gpu::{self, Gpu},
    id::{Class, Id},
    link::{self, Link, Speed},
    sysfs::Sysfs,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{io, str::FromStr};

/// Drivers that hand a device to others, or keep it away from all: the host itself does not use it.
const NO_HOST_DRIVERS: [&str; 2] = ["vfio-pci", "pci-stub"];

/// Where devices are.
pub(super) const DEVICES: &str = "/sys/bus/pci/devices";

/// One device, or one function of it. What its kernel or its hardware does not tell is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// Where it is.
    pub address: Address,
    /// Who made it.
    pub vendor: Id,
    /// What it is, in the vendor's numbers.
    pub device: Id,
    /// Who made the card, and the card's number.
    pub subsystem: Option<Subsystem>,
    /// What kind of device it is.
    pub class: Class,
    /// What it has to do with devices being given to VMs.
    pub kind: Kind,
    /// What it is, if it is a GPU that is known.
    pub gpu: Option<Gpu>,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The only driver that may take it, if one is named.
    pub driver_override: Option<String>,
    /// The IOMMU group that it is in.
    pub group: Option<u32>,
    /// The memory and processors that it is near to.
    pub numa_node: Option<u32>,
    /// Its windows.
    pub bars: Vec<Bar>,
    /// How it can be reset, the first first. `[]`: the kernel offers no way; `null`: it does, and is too old (before 5.15) to tell which.
    pub reset_methods: Option<Vec<String>>,
    /// Its link.
    pub link: Link,
    /// Its virtual functions, if it can have some.
    pub virtual_functions: Option<VirtualFunctions>,
    /// The device of which it is a virtual function.
    pub physical_function: Option<Address>,
    /// Whether the firmware showed its messages on it.
    pub boot_vga: Option<bool>,
    /// Whether the kernel may cut its power while it is idle.
    pub d3cold_allowed: Option<bool>,
}

/// Who made a card, and which it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Subsystem {
    /// Who made it.
    pub vendor: Id,
    /// What it is, in the vendor's numbers.
    pub device: Id,
}

/// What a device has to do with devices being given to VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It can be given, and all of its kind in a group go together.
    Endpoint,
    /// It leads to others, and stays with its own driver whoever has those.
    Bridge,
    /// A part of the mainboard, such as a host bridge, which nobody binds.
    Platform,
}

/// Virtual functions (SR-IOV).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VirtualFunctions {
    /// How many there can be.
    pub total: u16,
    /// How many there are.
    pub active: u16,
}

/// Why a device is not known.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is none, or none any more.
    #[error("There is no PCI device {0}")]
    Missing(Address),
    /// An attribute that each device has cannot be read.
    #[error("PCI device {address}: {attribute} cannot be read")]
    Unreadable {
        /// The device.
        address: Address,
        /// The attribute.
        attribute: &'static str,
        /// Why.
        source: io::Error,
    },
    /// An attribute that each device has says what it cannot say.
    #[error("PCI device {address}: {attribute} is {value:?}, which is no number of its kind")]
    Malformed {
        /// The device.
        address: Address,
        /// The attribute.
        attribute: &'static str,
        /// The beginning of what it says.
        value: String,
    },
}

impl DeviceError {
    /// The device.
    pub fn address(&self) -> Address {
        match self {
            Self::Missing(address) | Self::Unreadable { address, .. } | Self::Malformed { address, .. } => {
                *address
            }
        }
    }
}

impl Device {
    /// The driver, if it is one by which the host itself uses the device.
    pub fn host_driver(&self) -> Option<&str> {
        self.driver.as_deref().filter(|driver| !NO_HOST_DRIVERS.contains(driver))
    }

    /// In a few words: its address, what it is, and who has it.
    pub fn told(&self) -> String {
        let driver =
            self.driver.as_ref().map_or_else(|| "no driver".into(), |driver| format!("driver {driver}"));
        format!("{} ({}, {driver})", self.address, self.class.word())
    }

    /// Reads a device.
    pub fn read(sysfs: &Sysfs, address: Address) -> Result<Self, DeviceError> {
        let directory = format!("{DEVICES}/{address}");
        let attributes = Attributes { sysfs, directory: &directory, address };
        attributes.device().map_err(|error| match error {
            // It went while it was read.
            DeviceError::Unreadable { .. } if !sysfs.exists(&directory) => DeviceError::Missing(address),
            error => error,
        })
    }
}

/// All addresses in use, and names that are none.
pub(super) fn addresses(sysfs: &Sysfs) -> io::Result<Vec<Address>> {
    Ok(sysfs.names(DEVICES)?.iter().filter_map(|name| name.parse().ok()).collect())
}

struct Attributes<'a> {
    sysfs: &'a Sysfs,
    directory: &'a str,
    address: Address,
}

impl Attributes<'_> {
    fn device(&self) -> Result<Device, DeviceError> {
        let vendor = self.required("vendor", Id::parse)?;
        let device = self.required("device", Id::parse)?;
        let class = self.required("class", Class::parse)?;
        Ok(Device {
            address: self.address,
            vendor,
            device,
            subsystem: self
                .parsed("subsystem_vendor", Id::parse)
                .zip(self.parsed("subsystem_device", Id::parse))
                .map(|(vendor, device)| Subsystem { vendor, device }),
            class,
            kind: kind(class, self.has("secondary_bus_number")),
            gpu: gpu::gpu(vendor, device, class),
            driver: self.link("driver"),
            driver_override: self.text("driver_override").filter(|text| !text.is_empty() && text != "(null)"),
            group: self.link("iommu_group").and_then(|group| group.parse().ok()),
            // -1 where the kernel does not know.
            numa_node: self.number("numa_node"),
            bars: self.bars(),
            reset_methods: self.resets(),
            link: Link {
                speed: self.parsed("current_link_speed", Speed::parse),
                max_speed: self.parsed("max_link_speed", Speed::parse),
                width: self.parsed("current_link_width", link::width),
                max_width: self.parsed("max_link_width", link::width),
            },
            virtual_functions: self
                .number("sriov_totalvfs")
                .zip(self.number("sriov_numvfs"))
                .map(|(total, active)| VirtualFunctions { total, active }),
            physical_function: self.link("physfn").and_then(|name| name.parse().ok()),
            boot_vga: self.parsed("boot_vga", flag),
            d3cold_allowed: self.parsed("d3cold_allowed", flag),
        })
    }

    fn bars(&self) -> Vec<Bar> {
        let mut bars = self.text("resource").map(|text| bar::bars(&text)).unwrap_or_default();
        for bar in &mut bars {
            bar.sizes = self.parsed(&format!("resource{}_resize", bar.index), bar::sizes).unwrap_or_default();
        }
        bars
    }

    /// Both files are there only where there is a way.
    fn resets(&self) -> Option<Vec<String>> {
        match self.text("reset_method") {
            Some(text) => Some(words(&text)),
            None if self.has("reset") => None,
            None => Some(vec![]),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.sysfs.exists(&format!("{}/{name}", self.directory))
    }

    fn link(&self, name: &str) -> Option<String> {
        self.sysfs.link(&format!("{}/{name}", self.directory))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.sysfs.attribute(&format!("{}/{name}", self.directory)).ok()
    }

    fn parsed<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        parse(&self.text(name)?)
    }

    fn number<T: FromStr>(&self, name: &str) -> Option<T> {
        self.parsed(name, |text| text.trim().parse().ok())
    }

    fn required<T>(
        &self,
        attribute: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, DeviceError> {
        let address = self.address;
        let text = self
            .sysfs
            .attribute(&format!("{}/{attribute}", self.directory))
            .map_err(|source| DeviceError::Unreadable { address, attribute, source })?;
        let value = || text.chars().take(20).collect();
        parse(&text).ok_or_else(|| DeviceError::Malformed { address, attribute, value: value() })
    }
}

/// Only what leads to another bus has a number of one; kernels before 4.13 do not tell it.
fn kind(class: Class, leads_on: bool) -> Kind {
    match class.pair() {
        _ if leads_on => Kind::Bridge,
        (0x06, 0x04 | 0x07 | 0x09) => Kind::Bridge,
        (0x06, 0x00 | 0x01) => Kind::Platform,
        // Other bridges, such as NVIDIA's switches between GPUs, are devices like others.
        _ => Kind::Endpoint,
    }
}

fn flag(text: &str) -> Option<bool> {
    match text.trim() {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::machine::Machine;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn a_device_of_a_recorded_machine() {
        let machine = Machine::recorded("turing");
        let sysfs = Sysfs::at(machine.root());
        insta::assert_json_snapshot!(Device::read(&sysfs, address("0000:26:00.0")).unwrap());
    }

    #[test]
    fn what_is_absent_or_odd_is_none() {
        let machine = Machine::of(
            "[0000:01:00.0]\nvendor = 0x1234\ndevice = 0x5678\nclass = 0x020000\nnuma_node = -1\nboot_vga = 2\n\
             current_link_width = 255\nreset_method =\ndriver_override = (null)\nsriov_totalvfs = 70000\n\
             sriov_numvfs = 1\nresource = nonsense\n",
        );
        let device = Device::read(&Sysfs::at(machine.root()), address("0000:01:00.0")).unwrap();
        let expected = Device {
            address: address("0000:01:00.0"),
            vendor: Id(0x1234),
            device: Id(0x5678),
            subsystem: None,
            class: Class(0x02_00_00),
            kind: Kind::Endpoint,
            gpu: None,
            driver: None,
            driver_override: None,
            group: None,
            numa_node: None,
            bars: vec![],
            reset_methods: Some(vec![]),
            link: Link::default(),
            virtual_functions: None,
            physical_function: None,
            boot_vga: None,
            d3cold_allowed: None,
        };
        assert_eq!(device, expected);
    }

    #[test]
    fn vf8_ways_to_reset_are_told_by_new_kernels_and_only_that_there_are_some_by_old_ones() {
        let resets = |more: &str| {
            let text =
                format!("[0000:01:00.0]\nvendor = 0x1234\ndevice = 0x5678\nclass = 0x020000\n{more}\n");
            let machine = Machine::of(&text);
            Device::read(&Sysfs::at(machine.root()), address("0000:01:00.0")).unwrap().reset_methods
        };
        assert_eq!(resets("reset =\nreset_method = flr bus"), Some(vec!["flr".into(), "bus".into()]));
        assert_eq!(resets("reset ="), None);
        assert_eq!(resets(""), Some(vec![]));
    }

    #[test]
    fn vf1_a_device_that_is_not_there_or_makes_no_sense_is_named() {
        let machine = Machine::of("[0000:01:00.0]\nvendor = 0xnope\n[0000:02:00.0]\nvendor = 0x10de\n");
        let sysfs = Sysfs::at(machine.root());
        let said = |text: &str| Device::read(&sysfs, address(text)).unwrap_err().to_string();
        assert_eq!(said("0000:03:00.0"), "There is no PCI device 0000:03:00.0");
        assert_eq!(
            said("0000:01:00.0"),
            "PCI device 0000:01:00.0: vendor is \"0xnope\", which is no number of its kind"
        );
        assert_eq!(said("0000:02:00.0"), "PCI device 0000:02:00.0: device cannot be read");
    }

    #[test]
    fn vf1_bridges_are_known_by_their_class_and_by_the_bus_behind_them() {
        assert_eq!(kind(Class(0x06_04_00), false), Kind::Bridge);
        assert_eq!(kind(Class(0x08_80_00), true), Kind::Bridge);
        assert_eq!(kind(Class(0x06_00_00), false), Kind::Platform);
        assert_eq!(kind(Class(0x06_80_00), false), Kind::Endpoint);
        assert_eq!(kind(Class(0x03_00_00), false), Kind::Endpoint);
    }

    #[test]
    fn a_driver_that_only_keeps_a_device_is_none_of_the_hosts() {
        let machine = Machine::of(
            "[0000:01:00.0]\nvendor = 0x1234\ndevice = 0x5678\nclass = 0x020000\ndriver = vfio-pci\n\
             [0000:02:00.0]\nvendor = 0x1234\ndevice = 0x5678\nclass = 0x020000\ndriver = e1000e\n",
        );
        let sysfs = Sysfs::at(machine.root());
        let device = |text: &str| Device::read(&sysfs, address(text)).unwrap();
        assert_eq!(device("0000:01:00.0").host_driver(), None);
        assert_eq!(device("0000:02:00.0").host_driver(), Some("e1000e"));
        assert_eq!(device("0000:02:00.0").told(), "0000:02:00.0 (Ethernet controller, driver e1000e)");
    }
}
