//! The bridge above a device, which can reset what is below it.

use super::{address::Address, device, sysfs::Sysfs};
use std::{collections::BTreeSet, io};

/// A bridge, as seen from a device right below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Where it is.
    pub address: Address,
    /// Whether the kernel can have it reset all that is below it (Linux 6.13, and the stable releases since December 2024).
    pub resets: bool,
    /// Whether the kernel's hotplug driver watches its link. Before Linux 7.1 that takes such a reset for a removal.
    pub hotplug: bool,
    /// All devices below it.
    pub below: BTreeSet<Address>,
}

impl Bridge {
    /// The bridge above `device`; none where it is on a root bus, or is not there.
    pub fn above(sysfs: &Sysfs, device: Address) -> io::Result<Option<Self>> {
        let real = |address: Address| sysfs.real(&format!("{}/{address}", device::DEVICES));
        let Some(path) = real(device) else { return Ok(None) };
        let Some((above, _)) = path.rsplit_once('/') else { return Ok(None) };
        let Some(address) = above.rsplit('/').next().and_then(|name| name.parse().ok()) else {
            return Ok(None);
        };
        let prefix = format!("{above}/");
        let below = device::addresses(sysfs)?
            .into_iter()
            .filter(|other| real(*other).is_some_and(|path| path.starts_with(&prefix)))
            .collect();
        let resets = sysfs.exists(&format!("{above}/reset_subordinate"));
        Ok(Some(Self { address, resets, hotplug: in_hotplug_slot(sysfs, device)?, below }))
    }
}

/// Whether a device is in a slot that can be switched on and off; others are there by name only.
fn in_hotplug_slot(sysfs: &Sysfs, device: Address) -> io::Result<bool> {
    const SLOTS: &str = "/sys/bus/pci/slots";
    let address = device.to_string();
    Ok(sysfs.names(SLOTS)?.iter().any(|slot| {
        let place = sysfs.attribute(&format!("{SLOTS}/{slot}/address")).unwrap_or_default();
        let is_its = address.rsplit_once('.').is_some_and(|(before, _)| before == place.trim());
        is_its && sysfs.exists(&format!("{SLOTS}/{slot}/power"))
    }))
}
