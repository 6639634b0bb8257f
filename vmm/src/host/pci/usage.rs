//! What the host itself uses a device for: disks, the way to the network, the screen. Pure functions over what the kernel tells; reading it
//! is in [`facts`](super::facts).
//!
//! A device that is wrongly taken for free would take the host's root file system away, so what cannot be told is an error and never "no".

use super::{address::Address, device::Device};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// What a device is used for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// A disk behind it is mounted.
    Mounted {
        /// The disk or the partition.
        disk: String,
        /// Where.
        at: String,
    },
    /// A disk behind it is swap.
    Swap {
        /// The disk or the partition.
        disk: String,
    },
    /// A disk behind it is a part of another.
    Part {
        /// The disk or the partition.
        disk: String,
        /// What it is a part of.
        of: String,
    },
    /// The default route goes over it.
    DefaultRoute {
        /// The interface.
        interface: String,
    },
    /// The host shows its console on it.
    Display {
        /// What draws there.
        by: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { disk, at } => write!(f, "{disk} is mounted on {at}"),
            Self::Swap { disk } => write!(f, "{disk} is swap"),
            Self::Part { disk, of } => write!(f, "{disk} is a part of {of}"),
            Self::DefaultRoute { interface } => write!(f, "the default route goes over {interface}"),
            Self::Display { by } => write!(f, "the host's display is on it ({by})"),
        }
    }
}

/// A disk or a partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Disk {
    /// Major and minor number, such as `259:1`.
    pub(super) number: String,
    /// The name of a mapped device, as in `/dev/mapper`.
    pub(super) mapped: Option<String>,
    /// Disks that it is made of.
    pub(super) made_of: BTreeSet<String>,
    /// Disks that are made of it.
    pub(super) held_by: BTreeSet<String>,
    /// File systems and pools of several disks that are in use and that it is a member of.
    pub(super) member_of: Option<String>,
    /// The devices through which it is reached: its controller, and what is above that.
    pub(super) behind: BTreeSet<Address>,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Interface {
    /// Interfaces that carry it: a bridge's ports, a bond's members, the one below a VLAN.
    pub(super) lower: BTreeSet<String>,
    /// The devices through which it is reached: its controller, and what is above that.
    pub(super) behind: BTreeSet<Address>,
}

/// What the kernel tells of the host's own use of devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Disks and partitions, by name.
    pub(super) disks: BTreeMap<String, Disk>,
    /// `/proc/self/mountinfo`, and that of other processes.
    pub(super) mounts: String,
    /// `/proc/swaps`.
    pub(super) swaps: String,
    /// Network interfaces, by name.
    pub(super) interfaces: BTreeMap<String, Interface>,
    /// `/proc/net/route`.
    pub(super) routes: String,
    /// `/proc/net/ipv6_route`.
    pub(super) routes6: String,
    /// Framebuffers, with the devices that they are of. One of the firmware's belongs to none.
    pub(super) framebuffers: BTreeMap<String, Option<Address>>,
}

/// What each device is used for.
pub(super) fn uses<'a>(
    facts: &Facts,
    devices: impl IntoIterator<Item = &'a Device>,
) -> BTreeMap<Address, BTreeSet<Use>> {
    let mut uses: BTreeMap<Address, BTreeSet<Use>> = BTreeMap::new();
    let mut add = |address: Address, what: Use| {
        uses.entry(address).or_default().insert(what);
    };
    let found = disk_uses(facts);
    for (disk, what) in &found {
        for address in facts.disks.get(*disk).into_iter().flat_map(|disk| &disk.behind) {
            add(*address, what.clone());
        }
    }
    for interface in default_routes(facts) {
        let below = below(interface, |name| facts.interfaces.get(name).map(|interface| &interface.lower));
        let each = below.iter().filter_map(|name| facts.interfaces.get(*name));
        for address in each.flat_map(|interface| &interface.behind) {
            add(*address, Use::DefaultRoute { interface: interface.into() });
        }
    }
    for device in devices {
        if let Some(by) = display(facts, device) {
            add(device.address, Use::Display { by });
        }
    }
    uses
}

/// What there is of each disk that is not made of others.
fn disk_uses(facts: &Facts) -> Vec<(&str, Use)> {
    let mut found = Vec::new();
    let mut below_of = |name: &'_ str, what: &dyn Fn(&str) -> Use| {
        let Some((name, _)) = facts.disks.get_key_value(name) else { return };
        for disk in below(name, |name| facts.disks.get(name).map(|disk| &disk.made_of)) {
            found.push((disk, what(disk)));
        }
    };
    for Mount { number, source, at } in mounts(&facts.mounts) {
        for name in named(facts, number, source) {
            below_of(name, &|disk| Use::Mounted { disk: disk.into(), at: unescaped(at) });
        }
    }
    // The first line is a heading; the path ends at the first blank (blanks in it are escaped).
    for path in facts.swaps.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()) {
        for name in named(facts, "", path) {
            below_of(name, &|disk| Use::Swap { disk: disk.into() });
        }
    }
    let used: BTreeSet<&str> = found.iter().map(|(disk, _)| *disk).collect();
    for (name, disk) in facts.disks.iter().filter(|(name, _)| !used.contains(name.as_str())) {
        let of = disk.member_of.clone().or_else(|| disk.held_by.first().cloned());
        found.extend(of.map(|of| (name.as_str(), Use::Part { disk: name.clone(), of })));
    }
    found
}

/// A thing, and all that is below it.
fn below<'a>(name: &'a str, lower: impl Fn(&str) -> Option<&'a BTreeSet<String>>) -> BTreeSet<&'a str> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![name]);
    while let Some(name) = waiting.pop() {
        if found.insert(name) {
            waiting.extend(lower(name).into_iter().flatten().map(String::as_str));
        }
    }
    found
}

/// A line of a table of mounts.
struct Mount<'a> {
    number: &'a str,
    source: &'a str,
    at: &'a str,
}

/// proc_pid_mountinfo(5): the third field is the device's number, the fifth the mount point; after a lone `-` come type and source.
fn mounts(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter_map(|line| {
        let (first, second) = line.split_once(" - ")?;
        let mut fields = first.split(' ');
        let (number, at) = (fields.nth(2)?, fields.nth(1)?);
        Some(Mount { number, source: second.split(' ').nth(1).unwrap_or_default(), at })
    })
}

/// The disks of a number, or of a source: file systems of several disks have numbers that are no disk's (btrfs), or name several (bcachefs).
fn named<'a>(facts: &'a Facts, number: &str, source: &str) -> Vec<&'a str> {
    let is = |name: &str, disk: &Disk| {
        (!number.is_empty() && disk.number == number)
            || source.split(':').any(|path| match path.strip_prefix("/dev/") {
                Some(path) => {
                    path == name.replace('!', "/")
                        || path
                            .strip_prefix("mapper/")
                            .is_some_and(|path| disk.mapped.as_deref() == Some(path))
                }
                None => false,
            })
    };
    facts.disks.iter().filter(|(name, disk)| is(name, disk)).map(|(name, _)| name.as_str()).collect()
}

/// The kernel writes blanks, line ends and backslashes as three octal digits.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Interfaces of default routes that are up and lead somewhere. `/proc/net/route` has columns: interface, destination, gateway, flags, ...,
/// mask (8th); `/proc/net/ipv6_route`: destination, its prefix, ..., flags (9th), interface. Flags: 1 up, 0x200 refuses.
fn default_routes(facts: &Facts) -> BTreeSet<&str> {
    const UP: u32 = 1;
    const REJECT: u32 = 0x200;
    let leads = |flags: &str| {
        u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & UP != 0 && flags & REJECT == 0)
    };
    let fields = |line: &'_ str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let known = |name: &str| facts.interfaces.get_key_value(name).map(|(name, _)| name.as_str());
    let v4 = facts.routes.lines().skip(1).map(fields).filter_map(|fields| match fields.as_slice() {
        [interface, destination, _, flags, _, _, _, mask, ..]
            if destination == "00000000" && mask == "00000000" && leads(flags) =>
        {
            known(interface)
        }
        _ => None,
    });
    let v6 = facts.routes6.lines().map(fields).filter_map(|fields| match fields.as_slice() {
        [destination, prefix, _, _, _, _, _, _, flags, interface]
            if destination.bytes().all(|byte| byte == b'0') && prefix == "00" && leads(flags) =>
        {
            known(interface)
        }
        _ => None,
    });
    v4.chain(v6).collect()
}

/// What draws the host's console on a device.
fn display(facts: &Facts, device: &Device) -> Option<String> {
    if device.boot_vga != Some(true) {
        return None;
    }
    if let Some(driver) = device.host_driver() {
        return Some(driver.into());
    }
    // VFIO takes the firmware's framebuffer away from a device that it gets.
    if device.driver.is_some() {
        return None;
    }
    let framebuffer = facts
        .framebuffers
        .iter()
        .find(|(_, of)| of.is_none_or(|address| address == device.address))
        .map(|(name, _)| name);
    framebuffer.cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn set<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeSet<T> {
        items.into_iter().collect()
    }

    /// A disk with a number behind a device.
    fn disk(name: &str, number: &str, behind: &str) -> (String, Disk) {
        let behind = (!behind.is_empty()).then(|| address(behind)).into_iter().collect();
        (name.into(), Disk { number: number.into(), behind, ..Disk::default() })
    }

    fn made_of(name: &str, number: &str, parts: &[&str]) -> (String, Disk) {
        let (name, disk) = disk(name, number, "");
        (name, Disk { made_of: parts.iter().map(|part| (*part).into()).collect(), ..disk })
    }

    fn told(facts: &Facts) -> Vec<String> {
        let uses = uses(facts, []);
        uses.iter()
            .flat_map(|(address, uses)| uses.iter().map(move |what| format!("{address}: {what}")))
            .collect()
    }

    #[test]
    fn vf1_the_controllers_of_mounted_disks_and_of_swap_are_in_use() {
        let (name, root) = made_of("dm-0", "253:0", &["nvme0n1p3", "sda2"]);
        let root = Disk { mapped: Some("vg-root".into()), ..root };
        let (swap_name, swap) = made_of("dm-1", "253:1", &["dm-0"]);
        let swap = Disk { mapped: Some("vg-swap".into()), ..swap };
        let facts = Facts {
            disks: [
                disk("nvme0n1", "259:0", "0000:01:00.0"),
                disk("nvme0n1p1", "259:1", "0000:01:00.0"),
                disk("nvme0n1p3", "259:3", "0000:01:00.0"),
                disk("sda2", "8:2", "0000:00:17.0"),
                disk("nvme1n1", "259:4", "0000:02:00.0"),
                (name, root),
                (swap_name, swap),
            ]
            .into(),
            mounts: "22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw\n\
                     23 22 259:1 / /boot\\040efi rw - vfat /dev/nvme0n1p1 rw\n\
                     24 22 0:22 / /proc rw - proc proc rw\nnonsense\n"
                .into(),
            swaps: "Filename\tType\tSize\tUsed\tPriority\n/dev/dm-1 partition 8388604 0 -2\n".into(),
            ..Facts::default()
        };
        assert_eq!(
            told(&facts),
            [
                "0000:00:17.0: sda2 is mounted on /",
                "0000:00:17.0: sda2 is swap",
                "0000:01:00.0: nvme0n1p1 is mounted on /boot efi",
                "0000:01:00.0: nvme0n1p3 is mounted on /",
                "0000:01:00.0: nvme0n1p3 is swap",
            ]
        );
    }

    #[test]
    fn vf1_file_systems_and_pools_of_several_disks_count_though_the_mount_names_one_or_none() {
        let (name, member) = disk("nvme2n1", "259:9", "0000:03:00.0");
        let (raid_name, raid) = disk("sdb", "8:16", "0000:04:00.0");
        let facts = Facts {
            disks: [
                disk("nvme0n1p2", "259:2", "0000:01:00.0"),
                disk("nvme1n1", "259:4", "0000:02:00.0"),
                (name, Disk { member_of: Some("a ZFS pool".into()), ..member }),
                (raid_name, Disk { held_by: set(["md0".to_owned()]), ..raid }),
                disk("cciss!c0d0p1", "104:1", "0000:05:00.0"),
            ]
            .into(),
            mounts: "1 0 0:30 / / rw - btrfs /dev/nvme0n1p2 rw\n2 1 0:31 / /data rw - bcachefs /dev/x:/dev/nvme1n1 rw\n\
                     3 1 0:32 / /nix rw - zfs rpool/nix rw\n4 1 104:1 / /old rw - ext4 /dev/cciss/c0d0p1 rw\n"
                .into(),
            ..Facts::default()
        };
        assert_eq!(
            told(&facts),
            [
                "0000:01:00.0: nvme0n1p2 is mounted on /",
                "0000:02:00.0: nvme1n1 is mounted on /data",
                "0000:03:00.0: nvme2n1 is a part of a ZFS pool",
                "0000:04:00.0: sdb is a part of md0",
                "0000:05:00.0: cciss!c0d0p1 is mounted on /old",
            ]
        );
    }

    #[test]
    fn vf1_the_way_to_the_network_is_in_use_through_bridges_and_bonds() {
        let interface = |name: &str, lower: &[&str], behind: Option<&str>| {
            let lower = lower.iter().map(|name| (*name).into()).collect();
            (name.to_owned(), Interface { lower, behind: behind.map(address).into_iter().collect() })
        };
        let facts = Facts {
            interfaces: [
                interface("vmbr0", &["bond0.5", "tap0"], None),
                interface("bond0.5", &["bond0"], None),
                interface("bond0", &["eno1", "eno2"], None),
                interface("tap0", &[], None),
                interface("eno1", &[], Some("0000:04:00.0")),
                interface("eno2", &[], Some("0000:04:00.1")),
                interface("eno3", &[], Some("0000:05:00.0")),
                interface("eno4", &[], Some("0000:06:00.0")),
                interface("lo", &[], None),
            ]
            .into(),
            routes: "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                     vmbr0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eno3\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
                .into(),
            routes6: format!(
                "{zeros} 00 {zeros} 00 fe80 00000400 00000001 00000000 00000003     eno4\n\
                 {zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n",
                zeros = "0".repeat(32)
            ),
            ..Facts::default()
        };
        assert_eq!(
            told(&facts),
            [
                "0000:04:00.0: the default route goes over vmbr0",
                "0000:04:00.1: the default route goes over vmbr0",
                "0000:06:00.0: the default route goes over eno4",
            ]
        );
    }

    #[test]
    fn vf1_the_screen_is_in_use_where_a_driver_or_the_firmware_draws_on_it() {
        use crate::host::pci::{machine::Machine, sysfs::Sysfs};
        let shown = |more: &str, framebuffers: &[(&str, Option<&str>)]| {
            let text =
                format!("[0000:01:00.0]\nvendor = 0x10de\ndevice = 0x1b80\nclass = 0x030000\n{more}\n");
            let machine = Machine::of(&text);
            let device = Device::read(&Sysfs::at(machine.root()), address("0000:01:00.0")).unwrap();
            let framebuffers =
                framebuffers.iter().map(|(name, of)| ((*name).to_owned(), of.map(address))).collect();
            display(&Facts { framebuffers, ..Facts::default() }, &device)
        };
        let firmware = [("fb0", None)];
        assert_eq!(shown("boot_vga = 1\ndriver = nouveau", &[]).as_deref(), Some("nouveau"));
        assert_eq!(shown("boot_vga = 1", &firmware).as_deref(), Some("fb0"));
        assert_eq!(shown("boot_vga = 1", &[("fb1", Some("0000:01:00.0"))]).as_deref(), Some("fb1"));
        assert_eq!(shown("boot_vga = 1", &[("fb1", Some("0000:02:00.0"))]), None);
        assert_eq!(shown("boot_vga = 1", &[]), None);
        assert_eq!(shown("boot_vga = 1\ndriver = vfio-pci", &firmware), None);
        assert_eq!(shown("boot_vga = 0\ndriver = nvidia", &firmware), None);
        assert_eq!(shown("driver = nvidia", &firmware), None);
    }

    proptest! {
        /// Disks that are made of each other end no less.
        #[test]
        fn no_tables_panic_or_hang(text in "(\\PC|[\n /0:-]){0,200}") {
            let (one, other) = (made_of("a", "1:1", &["b"]), made_of("b", "1:2", &["a"]));
            let facts = Facts {
                disks: [one, other].into(),
                mounts: format!("1 1 1:1 / / rw - x y\n{text}"),
                swaps: text.clone(),
                routes: text.clone(),
                routes6: text,
                ..Facts::default()
            };
            prop_assert!(uses(&facts, []).is_empty());
        }
    }
}
