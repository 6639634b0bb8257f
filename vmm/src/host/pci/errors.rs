//! Errors of a device that the kernel has counted (Advanced Error Reporting), from the files `aer_dev_fatal` and `aer_dev_nonfatal` of sysfs.

use super::{address::Address, device::DEVICES, sysfs::Sysfs};

/// The files, and the line of each that has the sum.
const FILES: [(&str, &str); 2] =
    [("aer_dev_fatal", "TOTAL_ERR_FATAL "), ("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL ")];

/// How many errors of a device the kernel has counted, fatal and others, but for those that the link has mended itself. `None` where it counts
/// none: the device, the kernel or the firmware does not report any.
pub fn errors(sysfs: &Sysfs, device: Address) -> Option<u64> {
    let counts =
        FILES.map(|(file, line)| total(&sysfs.attribute(&format!("{DEVICES}/{device}/{file}")).ok()?, line));
    counts.into_iter().flatten().reduce(u64::saturating_add)
}

fn total(text: &str, line: &str) -> Option<u64> {
    text.lines().find_map(|text| text.strip_prefix(line))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::machine::Machine;

    #[test]
    fn vf11_errors_are_counted_where_the_kernel_does() {
        let machine = Machine::of(
            "[0000:01:00.0]\nvendor = 0x1\n[0000:02:00.0]\nvendor = 0x1\n[0000:03:00.0]\nvendor = 0x1\naer_dev_fatal = TOTAL_ERR_FATAL -1\n\
             /sys/devices/pci0000:01/0000:01:00.0/aer_dev_fatal = DLP 2\n\
             /sys/devices/pci0000:01/0000:01:00.0/aer_dev_fatal + TOTAL_ERR_FATAL 2\n\
             /sys/devices/pci0000:01/0000:01:00.0/aer_dev_nonfatal = TOTAL_ERR_NONFATAL 5\n",
        );
        let sysfs = Sysfs::at(machine.root());
        let counted = |address: &str| errors(&sysfs, address.parse().unwrap());
        assert_eq!(counted("0000:01:00.0"), Some(7));
        assert_eq!(
            (counted("0000:02:00.0"), counted("0000:03:00.0"), counted("0000:04:00.0")),
            (None, None, None)
        );
    }
}
