//! Names of vendors and devices, from the PCI ID Repository. They add 3 MiB to a program that uses them: `vmctl` does, `laird` speaks in
//! numbers.

use super::id::{Id, NVIDIA};
use pci_ids::{Device, FromId, Vendor};

/// Who made it.
pub fn vendor(vendor: Id) -> Option<&'static str> {
    Vendor::from_id(vendor.0).map(Vendor::name)
}

/// What it is called.
pub fn device(vendor: Id, device: Id) -> Option<&'static str> {
    Device::from_vid_pid(vendor.0, device.0).map(Device::name)
}

/// What people call it: of `AD104GL [RTX 4000 SFF Ada Generation]` what is in brackets. Without a name, its numbers.
pub fn short(vendor: Id, id: Id) -> String {
    let Some(name) = device(vendor, id) else { return format!("{vendor}:{id}") };
    let bracketed = name.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    match bracketed {
        Some((inner, _)) if vendor == NVIDIA || vendor == super::id::AMD => inner.into(),
        _ => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_cards() {
        assert_eq!(vendor(NVIDIA), Some("NVIDIA Corporation"));
        assert_eq!(device(NVIDIA, Id(0x27b0)), Some("AD104GL [RTX 4000 SFF Ada Generation]"));
        assert_eq!(short(NVIDIA, Id(0x27b0)), "RTX 4000 SFF Ada Generation");
        assert_eq!(short(NVIDIA, Id(0x10f0)), "GP104 High Definition Audio Controller");
        assert_eq!(short(NVIDIA, Id(0xfffe)), "10de:fffe");
        assert_eq!(vendor(Id(0x0000)), None);
    }
}
