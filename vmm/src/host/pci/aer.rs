//! How many errors of PCI Express the kernel has counted for a device (Advanced Error Reporting; Linux,
//! Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats).

use super::{Address, Sysfs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Errors since the kernel found the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AerCounts {
    /// Those that the hardware has corrected.
    pub corrected: u64,
    /// Those that lost a transaction.
    pub nonfatal: u64,
    /// Those after which the link could not be relied upon.
    pub fatal: u64,
}

impl AerCounts {
    /// Those of a device; none where it, or the kernel, does not count.
    pub fn read(sysfs: &Sysfs, address: Address) -> Option<Self> {
        let total = |file: &str| {
            total(&sysfs.attribute(&format!("/sys/bus/pci/devices/{address}/aer_dev_{file}")).ok()?)
        };
        Some(Self { corrected: total("correctable")?, nonfatal: total("nonfatal")?, fatal: total("fatal")? })
    }

    /// How many there are more than in `before`. Fewer means that the kernel has found the device anew.
    pub fn since(self, before: Self) -> Self {
        Self {
            corrected: self.corrected.saturating_sub(before.corrected),
            nonfatal: self.nonfatal.saturating_sub(before.nonfatal),
            fatal: self.fatal.saturating_sub(before.fatal),
        }
    }
}

/// A line for each kind of error, and their sum: `TOTAL_ERR_COR 2`.
fn total(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("TOTAL_ERR_"))?.split_once(' ')?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::machine::Machine;
    use std::fs;

    #[test]
    fn sums_are_read_and_a_device_that_does_not_count_has_none() {
        let machine = Machine::of("[0000:01:00.0]\nvendor = 0x1234\ndevice = 0x5678\nclass = 0x020000\n");
        let (sysfs, address) = (Sysfs::at(machine.root()), "0000:01:00.0".parse().unwrap());
        assert_eq!(AerCounts::read(&sysfs, address), None);
        let write = |file: &str, text: &str| {
            let path = format!("/sys/bus/pci/devices/0000:01:00.0/aer_dev_{file}");
            fs::write(sysfs.path(&path), text).unwrap();
        };
        write("correctable", "RxErr 2\nBadTLP 0\nTOTAL_ERR_COR 2\n");
        write("nonfatal", "Undefined 0\nTOTAL_ERR_NONFATAL 0\n");
        assert_eq!(AerCounts::read(&sysfs, address), None);
        write("fatal", "TOTAL_ERR_FATAL 1\n");
        let counts = AerCounts::read(&sysfs, address).unwrap();
        assert_eq!(counts, AerCounts { corrected: 2, nonfatal: 0, fatal: 1 });
        let anew = AerCounts { corrected: 3, ..AerCounts::default() };
        assert_eq!(anew.since(counts), AerCounts { corrected: 1, ..AerCounts::default() });
        assert_eq!(total("TOTAL_ERR_COR many"), None);
    }
}
