//! The bridge above a device, which can reset what is below it.

use super::{address::Address, device, sysfs::Sysfs};
use std::{collections::BTreeSet, io};

/// A bridge, as seen from a device right below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Where it is.
    pub address: Address,
    /// Whether the kernel can have it reset all that is below it (Linux 6.12, later stable releases).
    pub resets: bool,
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
        Ok(Some(Self { address, resets: sysfs.exists(&format!("{above}/reset_subordinate")), below }))
    }
}
