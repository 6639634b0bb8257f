//! The devices of the host that a VM asks for: by address, or by what they are.

use crate::host::pci::{AMD, Address, Architecture, Device, Id, Kind, NVIDIA};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The most devices of one entry: no mainboard has more places for GPUs.
pub const COUNT_MAX: u32 = 16;

/// A device of the host that a VM has for itself while it runs, with all that must go with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Gpu {
    /// The device at an address.
    At(GpuAt),
    /// Any device of a kind.
    Any(GpuAny),
}

/// The device at an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuAt {
    /// Where it is, as `vmctl gpu list` shows it, such as `0000:01:00.0`.
    pub address: Address,
}

/// Any device of a kind that is free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuAny {
    /// Who made it: `nvidia`, `amd`, or a vendor's number, such as `1b36`.
    pub vendor: Vendor,
    /// The generation of an NVIDIA GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<Architecture>,
    /// Class and subclass, such as `0108` for NVMe disks. Without it and without `device` only GPUs are meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Id>,
    /// The device's number, such as `2684`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Id>,
    /// How many, 1 if not given.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = COUNT_MAX))]
    pub count: u32,
}

fn one() -> u32 {
    1
}

fn is_one(count: &u32) -> bool {
    *count == 1
}

/// Who made a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(nvidia|amd|[0-9a-f]{4})$", "format" = "pci-vendor"))]
pub struct Vendor(pub Id);

/// A text that is no vendor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no vendor: \"nvidia\", \"amd\", or four hexadecimal digits such as \"1b36\"")]
pub struct NotAVendor(String);

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            NVIDIA => f.write_str("nvidia"),
            AMD => f.write_str("amd"),
            other => other.fmt(f),
        }
    }
}

impl TryFrom<String> for Vendor {
    type Error = NotAVendor;

    fn try_from(text: String) -> Result<Self, NotAVendor> {
        let id = match text.as_str() {
            "nvidia" => NVIDIA,
            "amd" => AMD,
            _ => Id::try_from(text.clone()).map_err(|_| NotAVendor(text.chars().take(40).collect()))?,
        };
        Ok(Self(id))
    }
}

impl From<Vendor> for String {
    fn from(vendor: Vendor) -> Self {
        vendor.to_string()
    }
}

impl Gpu {
    /// Whether `device` is meant.
    pub fn means(&self, device: &Device) -> bool {
        match self {
            Self::At(at) => device.address == at.address,
            Self::Any(any) => any.means(device),
        }
    }
}

impl GpuAny {
    fn means(&self, device: &Device) -> bool {
        let (class, subclass) = device.class.pair();
        let kind = match (self.class, self.device) {
            (None, None) => device.class.is_display(),
            (wanted_class, wanted_device) => {
                wanted_class.is_none_or(|wanted| wanted.0 == u16::from_be_bytes([class, subclass]))
                    && wanted_device.is_none_or(|wanted| wanted == device.device)
            }
        };
        let arch =
            self.arch.is_none_or(|arch| device.gpu.as_ref().is_some_and(|gpu| gpu.architecture == arch));
        device.kind == Kind::Endpoint && device.vendor == self.vendor.0 && kind && arch
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let any = match self {
            Self::At(at) => return write!(f, "the device {}", at.address),
            Self::Any(any) => any,
        };
        write!(f, "{} of vendor {}", any.count, any.vendor)?;
        if let Some(arch) = any.arch {
            write!(f, ", {arch}")?;
        }
        if let Some(class) = any.class {
            write!(f, ", class {class}")?;
        }
        if let Some(device) = any.device {
            write!(f, ", device {device}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::{Inventory, machine::Machine};

    fn gpu(text: &str) -> Gpu {
        serde_json::from_str(text).unwrap()
    }

    fn meant(machine: &str, text: &str) -> Vec<String> {
        let (inventory, gpu) = (Inventory::of(&Machine::recorded(machine)), gpu(text));
        let devices = inventory.devices.values().filter(|device| gpu.means(device));
        devices.map(|device| device.address.to_string()).collect()
    }

    #[test]
    fn kinds_of_devices() {
        assert_eq!(meant("turing", r#"{"vendor":"nvidia"}"#), ["0000:26:00.0"]);
        assert_eq!(meant("turing", r#"{"vendor":"nvidia","arch":"turing"}"#), ["0000:26:00.0"]);
        assert!(meant("turing", r#"{"vendor":"nvidia","arch":"ada"}"#).is_empty());
        assert!(meant("turing", r#"{"vendor":"amd"}"#).is_empty());
        assert_eq!(meant("turing", r#"{"vendor":"10de","class":"0403"}"#), ["0000:26:00.1"]);
        assert_eq!(meant("turing", r#"{"address":"0000:26:00.3"}"#), ["0000:26:00.3"]);
        assert_eq!(meant("h100-sxm", r#"{"vendor":"nvidia","arch":"hopper","count":8}"#).len(), 8);
    }

    #[test]
    fn they_are_told_as_they_were_written() {
        for text in [
            r#"{"address":"0000:26:00.3"}"#,
            r#"{"vendor":"nvidia","arch":"ada","count":2}"#,
            r#"{"vendor":"1b36","class":"0108","device":"0010"}"#,
        ] {
            assert_eq!(serde_json::to_string(&gpu(text)).unwrap(), text);
        }
        assert_eq!(
            gpu(r#"{"vendor":"nvidia","arch":"ada"}"#).to_string(),
            "1 of vendor nvidia, Ada Lovelace"
        );
    }
}
