//! The devices that a guest sees and that are none of its machine's own.

use lair_guest::wire::message::GuestDevice;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::Path,
};

/// The most devices that are told.
pub(super) const MAX: usize = 64;

/// The most entries that are looked at.
const ENTRIES_MAX: usize = 4096;

/// The longest name of a driver that is told, in bytes. The kernel has shorter ones.
const NAME_MAX: usize = 64;

/// NVIDIA.
const NVIDIA: u16 = 0x10de;

/// Virtio's devices, all of which are the machine's.
const VIRTIO: u16 = 0x1af4;

/// What else a hypervisor makes by itself: the SATA controller and the SMBus of QEMU's machine `q35`, and `pvpanic-pci`.
const MACHINE: [(u16, u16); 3] = [(0x8086, 0x2922), (0x8086, 0x2930), (0x1b36, 0x0011)];

/// All devices below `sys` that were passed through, by address.
pub(super) fn list(sys: &Path) -> Vec<GuestDevice> {
    let mut devices = BTreeMap::new();
    let entries = fs::read_dir(sys.join("bus/pci/devices")).into_iter().flatten().take(ENTRIES_MAX);
    for entry in entries.flatten() {
        let address = entry.file_name().to_str().and_then(address);
        let device = address.and_then(|address| device(&entry.path(), address));
        devices.extend(device.map(|device| (device.address.clone(), device)));
    }
    devices.into_values().take(MAX).collect()
}

fn device(directory: &Path, address: String) -> Option<GuestDevice> {
    let vendor = u16::try_from(number(&directory.join("vendor"))?).ok()?;
    let class = number(&directory.join("class"))?;
    let is_bridge = class >> 16 == 0x06;
    if is_bridge || vendor == VIRTIO {
        return None;
    }
    let device = u16::try_from(number(&directory.join("device"))?).ok()?;
    if MACHINE.contains(&(vendor, device)) {
        return None;
    }
    let driver = fs::read_link(directory.join("driver")).ok();
    let driver = driver.and_then(|driver| driver.file_name()?.to_str().map(|name| cut(name, NAME_MAX)));
    Some(GuestDevice { address, vendor, device, class, driver, port: port(directory) })
}

/// The address of the port that a device is in: the kernel's directory of a device is in that of what is above it, and what is asked is a link to it.
fn port(directory: &Path) -> Option<String> {
    address(fs::read_link(directory).ok()?.parent()?.file_name()?.to_str()?)
}

/// A number as sysfs writes it: `0x10de`.
fn number(path: &Path) -> Option<u32> {
    u32::from_str_radix(text(path)?.trim().strip_prefix("0x")?, 16).ok()
}

/// The beginning of a small file.
pub(super) fn text(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(4096).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether it is a GPU of NVIDIA's.
pub(super) fn is_nvidia_gpu(device: &GuestDevice) -> bool {
    device.vendor == NVIDIA && device.class >> 16 == 0x03
}

/// An address as the kernel writes it, from one of the forms in use: `0000:01:00.0`; NVIDIA's driver leaves the function out
/// (`0000:01:00`), its tool has a domain of eight digits (`00000000:01:00.0`).
pub(super) fn address(text: &str) -> Option<String> {
    let hexadecimal = |text: &str, most: usize| {
        let well_formed = (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        u32::from_str_radix(text, 16).ok().filter(|_| well_formed)
    };
    let (place, function) = text.split_once('.').unwrap_or((text, "0"));
    let mut parts = place.split(':');
    let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
    let (domain, bus) = (hexadecimal(domain, 8)?, hexadecimal(bus, 2)?);
    let (device, function) = (hexadecimal(device, 2)?, hexadecimal(function, 1)?);
    let fits = parts.next().is_none() && device < 32 && function < 8;
    fits.then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

/// At most so many bytes of a text, without what a terminal would obey.
pub(super) fn cut(text: &str, longest: usize) -> String {
    let end = text.char_indices().map(|(at, c)| at.saturating_add(c.len_utf8()));
    let end = end.take_while(|end| *end <= longest).last().unwrap_or_default();
    let kept = text.get(..end).unwrap_or_default().trim();
    kept.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::Sys;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_the_machine_has_by_itself_is_not_told() {
        let sys = Sys::new();
        for (address, vendor, device, class) in [
            ("0000:00:00.0", 0x8086, 0x29c0, 0x06_00_00),
            ("0000:00:01.0", 0x1af4, 0x105a, 0x01_80_00),
            ("0000:00:02.0", 0x1b36, 0x000c, 0x06_04_00),
            ("0000:00:1f.2", 0x8086, 0x2922, 0x01_06_01),
            ("0000:00:1f.3", 0x8086, 0x2930, 0x0c_05_00),
        ] {
            sys.device(address, vendor, device, class, None);
        }
        assert_eq!(list(sys.path()), []);
        sys.device("0000:02:00.0", 0x10de, 0x2684, 0x03_00_00, Some("nvidia"));
        sys.device("0000:01:00.0", 0x1b36, 0x0010, 0x01_08_02, None);
        let devices = list(sys.path());
        let told: Vec<_> =
            devices.iter().map(|d| (d.address.as_str(), d.driver.as_deref(), is_nvidia_gpu(d))).collect();
        assert_eq!(told, [("0000:01:00.0", None, false), ("0000:02:00.0", Some("nvidia"), true)]);
        assert_eq!((devices[1].device, devices[1].class), (0x2684, 0x03_00_00));
        // A device that makes no sense hides no other, and a guest without PCI has none.
        fs::write(sys.path().join("bus/pci/devices/0000:01:00.0/class"), "none\n").unwrap();
        assert_eq!(list(sys.path()).len(), 1);
        assert_eq!(list(Path::new("/nonexistent")), []);
    }

    #[test]
    fn a_device_is_told_with_the_port_that_it_is_in() {
        let sys = Sys::new();
        for (place, address) in [
            ("pci0000:00/0000:00:1a.0", "0000:05:00.0"),
            ("pci0000:00/0000:00:1a.0", "0000:05:00.1"),
            ("pci0000:00/0000:00:1b.0/0000:06:00.0", "0000:07:00.0"),
            ("pci0000:00", "0000:00:05.0"),
            ("elsewhere", "0000:08:00.0"),
        ] {
            sys.device_in(place, address);
        }
        // As on no kernel: a directory itself.
        sys.device("0000:09:00.0", 0x10de, 0x2684, 0x03_00_00, None);
        let devices = list(sys.path());
        let told = devices.iter().map(|device| (device.address.as_str(), device.port.as_deref()));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [
                ("0000:00:05.0", None),
                ("0000:05:00.0", Some("0000:00:1a.0")),
                ("0000:05:00.1", Some("0000:00:1a.0")),
                ("0000:07:00.0", Some("0000:06:00.0")),
                ("0000:08:00.0", None),
                ("0000:09:00.0", None),
            ]
        );
    }

    #[test]
    fn vs5_more_devices_than_any_guest_has_are_cut() {
        let sys = Sys::new();
        for n in 0..MAX + 10 {
            sys.device(&format!("0000:{n:02x}:00.0"), 0x1234, 1, 0x02_00_00, Some(&"d".repeat(200)));
        }
        let devices = list(sys.path());
        assert_eq!((devices.len(), devices[0].driver.as_ref().unwrap().len()), (MAX, NAME_MAX));
    }

    #[test]
    fn addresses_have_one_form() {
        for (text, expected) in [
            ("0000:01:00.0", Some("0000:01:00.0")),
            ("0000:01:00", Some("0000:01:00.0")),
            ("00000000:0A:1f.7", Some("0000:0a:1f.7")),
            ("10000:01:00.0", Some("10000:01:00.0")),
            ("0000:01:20.0", None),
            ("0000:01:00.8", None),
            ("0000:01", None),
            ("0000:01:00:00", None),
            ("0000:+1:00.0", None),
            ("", None),
        ] {
            assert_eq!(address(text).as_deref(), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn vs5_any_text_is_cut_where_it_may_be(text in "\\PC{0,40}|[\\x00-\\x1fä€]{0,40}", longest in 0_usize..60) {
            let cut = cut(&text, longest);
            prop_assert!(cut.chars().count() <= text.chars().count() && !cut.contains(char::is_control));
            let _ = address(&text);
        }
    }
}
