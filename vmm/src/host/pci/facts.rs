//! Reads what [`usage`](super::usage) needs to know.

use super::{
    address::Address,
    sysfs::Sysfs,
    usage::{Disk, Facts, Interface},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

const BLOCK: &str = "/sys/class/block";
const NET: &str = "/sys/class/net";
const GRAPHICS: &str = "/sys/class/graphics";

/// Why it is not known what the host uses devices for.
#[derive(Debug, thiserror::Error)]
#[error("{0} cannot be read")]
pub(super) struct FactsError(&'static str, #[source] io::Error);

/// Reads all of it.
pub(super) fn read(sysfs: &Sysfs) -> Result<Facts, FactsError> {
    let names = |path| sysfs.names(path).map_err(|error| FactsError(path, error));
    let table = |path| sysfs.table(path).map_err(|error| FactsError(path, error));
    // Missing where the kernel has no IPv6, no swap.
    let optional = |path| match sysfs.table(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.map_err(|error| FactsError(path, error)),
    };
    let btrfs = btrfs(sysfs).map_err(|error| FactsError(BTRFS, error))?;
    let zfs = sysfs.exists("/sys/module/zfs");
    let disks = names(BLOCK)?.into_iter().map(|name| {
        let disk = disk(sysfs, &name, &btrfs, zfs);
        (name, disk)
    });
    let interfaces = names(NET)?.into_iter().map(|name| {
        let interface = interface(sysfs, &name);
        (name, interface)
    });
    // `fbcon` is beside them.
    let is_framebuffer = |name: &String| {
        name.strip_prefix("fb")
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let framebuffers = names(GRAPHICS)?.into_iter().filter(is_framebuffer).map(|name| {
        let of = sysfs.real(&format!("{GRAPHICS}/{name}")).and_then(|path| nearest(&path));
        (name, of)
    });
    Ok(Facts {
        disks: disks.collect(),
        // Services may see fewer mounts than the host has; not all may look at those of the first process.
        mounts: table("/proc/self/mountinfo")? + &sysfs.table("/proc/1/mountinfo").unwrap_or_default(),
        swaps: optional("/proc/swaps")?,
        interfaces: interfaces.collect(),
        routes: optional("/proc/net/route")?,
        routes6: optional("/proc/net/ipv6_route")?,
        framebuffers: framebuffers.collect(),
    })
}

/// The devices in a path such as `/sys/devices/pci0000:00/0000:00:1c.0/0000:02:00.0/nvme/nvme0/nvme0n1`. Not only the last has the disk: with
/// a controller such as Intel's VMD, which is no bridge, go all that are behind it.
fn devices_in(path: &str) -> BTreeSet<Address> {
    path.split('/').filter_map(|name| name.parse().ok()).collect()
}

/// The last of them.
fn nearest(path: &str) -> Option<Address> {
    path.rsplit('/').find_map(|name| name.parse().ok())
}

const BTRFS: &str = "/sys/fs/btrfs";

/// Members of the btrfs file systems that are mounted.
fn btrfs(sysfs: &Sysfs) -> io::Result<BTreeSet<String>> {
    let mut members = BTreeSet::new();
    for name in sysfs.names(BTRFS)? {
        // `features` has no devices.
        members.extend(sysfs.names(&format!("{BTRFS}/{name}/devices")).unwrap_or_default());
    }
    Ok(members)
}

fn disk(sysfs: &Sysfs, name: &str, btrfs: &BTreeSet<String>, zfs: bool) -> Disk {
    let directory = format!("{BLOCK}/{name}");
    let number = sysfs.attribute(&format!("{directory}/dev")).unwrap_or_default();
    let names = |path: &str| sysfs.names(&format!("{directory}/{path}")).unwrap_or_default();
    let path = sysfs.real(&directory).unwrap_or_default();
    let member_of = if btrfs.contains(name) {
        Some("a btrfs that is mounted".into())
    } else {
        // The kernel does not say which disks a pool has; udev has looked what is on them.
        let udev = sysfs.table(&format!("/run/udev/data/b{number}")).unwrap_or_default();
        (zfs && udev.lines().any(|line| line == "E:ID_FS_TYPE=zfs_member")).then(|| "a ZFS pool".into())
    };
    Disk {
        mapped: sysfs.attribute(&format!("{directory}/dm/name")).ok(),
        made_of: names("slaves"),
        held_by: names("holders"),
        member_of,
        behind: behind(sysfs, &path),
        number,
    }
}

/// The devices through which a disk is reached; with NVMe's multipath, those of all its paths.
fn behind(sysfs: &Sysfs, path: &str) -> BTreeSet<Address> {
    let devices = devices_in(path);
    if !devices.is_empty() {
        return devices;
    }
    let Some((above, rest)) = path.split_once("/nvme-subsystem/") else { return BTreeSet::new() };
    let subsystem = rest.split('/').next().unwrap_or_default();
    let directory = format!("{above}/nvme-subsystem/{subsystem}");
    let names = sysfs.names(&directory).unwrap_or_default();
    let controllers = names.iter().filter(|name| {
        name.strip_prefix("nvme")
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    });
    let paths = controllers.filter_map(|name| sysfs.real(&format!("{directory}/{name}")));
    paths.flat_map(|path| devices_in(&path)).collect()
}

fn interface(sysfs: &Sysfs, name: &str) -> Interface {
    let directory = format!("{NET}/{name}");
    let names = sysfs.names(&format!("{directory}/")).unwrap_or_default();
    let lower = names.iter().filter_map(|name| name.strip_prefix("lower_")).map(str::to_owned).collect();
    let behind = sysfs.real(&directory).map(|path| devices_in(&path)).unwrap_or_default();
    Interface { lower, behind }
}

/// Screens at the outputs of devices: what is said to be connected.
pub(super) fn connected(sysfs: &Sysfs) -> BTreeMap<Address, BTreeSet<String>> {
    const DRM: &str = "/sys/class/drm";
    let mut found: BTreeMap<Address, BTreeSet<String>> = BTreeMap::new();
    for name in sysfs.names(DRM).unwrap_or_default() {
        // `card0-HDMI-A-1`; `card0` and `renderD128` have no status.
        let Some((_, output)) = name.split_once('-') else { continue };
        let directory = format!("{DRM}/{name}");
        if sysfs.attribute(&format!("{directory}/status")).is_ok_and(|status| status.trim() == "connected")
            && let Some(address) = sysfs.real(&directory).and_then(|path| nearest(&path))
        {
            found.entry(address).or_default().insert(output.into());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::{machine::Machine, usage};

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn told(machine: &Machine) -> Vec<String> {
        let facts = read(&Sysfs::at(machine.root())).unwrap();
        let uses = usage::uses(&facts, []);
        uses.iter()
            .flat_map(|(address, uses)| uses.iter().map(move |what| format!("{address}: {what}")))
            .collect()
    }

    /// Paths and links as a kernel has them: a disk on NVMe with multipath, LVM on it, btrfs, ZFS, a USB stick.
    #[test]
    fn vf1_disks_are_followed_to_their_controllers() {
        let machine = Machine::of(
            "/proc/self/mountinfo = 1 0 253:0 / / rw - xfs /dev/mapper/vg-root rw\n\
             /proc/self/mountinfo + 2 1 8:17 / /media rw - vfat /dev/sdb1 rw\n\
             /sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/dev = 259:0\n\
             /sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0 -> /sys/devices/pci0000:00/0000:00:1c.0/0000:02:00.0/nvme/nvme0\n\
             /sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme1 -> /sys/devices/pci0000:00/0000:00:1d.0/0000:03:00.0/nvme/nvme1\n\
             /sys/devices/pci0000:00/0000:00:1c.0/0000:02:00.0/nvme/nvme0/state = live\n\
             /sys/devices/pci0000:00/0000:00:1d.0/0000:03:00.0/nvme/nvme1/state = live\n\
             /sys/class/block/nvme0n1 -> /sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1\n\
             /sys/devices/virtual/block/dm-0/dev = 253:0\n\
             /sys/devices/virtual/block/dm-0/dm/name = vg-root\n\
             /sys/devices/virtual/block/dm-0/slaves/nvme0n1 -> /sys/class/block/nvme0n1\n\
             /sys/class/block/dm-0 -> /sys/devices/virtual/block/dm-0\n\
             /sys/devices/pci0000:00/0000:00:14.0/usb1/1-4/host0/target0:0:0/0:0:0:0/block/sdb/sdb1/dev = 8:17\n\
             /sys/class/block/sdb1 -> /sys/devices/pci0000:00/0000:00:14.0/usb1/1-4/host0/target0:0:0/0:0:0:0/block/sdb/sdb1\n\
             /sys/devices/pci0000:00/0000:00:17.0/ata1/host1/target1:0:0/1:0:0:0/block/sda/dev = 8:0\n\
             /sys/class/block/sda -> /sys/devices/pci0000:00/0000:00:17.0/ata1/host1/target1:0:0/1:0:0:0/block/sda\n\
             /sys/fs/btrfs/features/raid56 = 0\n\
             /sys/fs/btrfs/0bb8/devices/sda -> /sys/class/block/sda\n\
             /sys/module/zfs/version = 2.3\n\
             /run/udev/data/b259:7 = E:ID_FS_TYPE=zfs_member\n\
             /sys/devices/pci0000:00/0000:00:1e.0/0000:04:00.0/nvme/nvme2/nvme2n1/dev = 259:7\n\
             /sys/class/block/nvme2n1 -> /sys/devices/pci0000:00/0000:00:1e.0/0000:04:00.0/nvme/nvme2/nvme2n1\n",
        );
        assert_eq!(
            told(&machine),
            [
                "0000:00:14.0: sdb1 is mounted on /media",
                "0000:00:17.0: sda is a part of a btrfs that is mounted",
                "0000:00:1c.0: nvme0n1 is mounted on /",
                "0000:00:1d.0: nvme0n1 is mounted on /",
                "0000:00:1e.0: nvme2n1 is a part of a ZFS pool",
                "0000:02:00.0: nvme0n1 is mounted on /",
                "0000:03:00.0: nvme0n1 is mounted on /",
                "0000:04:00.0: nvme2n1 is a part of a ZFS pool",
            ]
        );
    }

    #[test]
    fn vf1_the_default_route_of_a_recorded_machine_goes_over_a_bridge() {
        let expected = ["0000:00:01.3", "0000:03:00.2", "0000:20:01.0", "0000:22:00.0"]
            .map(|address| format!("{address}: the default route goes over vmbr0"));
        assert_eq!(told(&Machine::recorded("turing")), expected);
    }

    #[test]
    fn vf1_a_disk_behind_a_controller_that_is_no_bridge_and_a_mount_that_only_the_first_process_sees() {
        let disk =
            "/sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0/nvme/nvme0/nvme0n1";
        let machine = Machine::of(&format!(
            "/proc/self/mountinfo =\n/proc/1/mountinfo = 1 0 259:0 / /nix rw - ext4 /dev/nvme0n1 rw\n\
             {disk}/dev = 259:0\n/sys/class/block/nvme0n1 -> {disk}\n"
        ));
        let expected = ["0000:00:0e.0", "10000:e0:06.0", "10000:e1:00.0"]
            .map(|address| format!("{address}: nvme0n1 is mounted on /nix"));
        assert_eq!(told(&machine), expected);
    }

    #[test]
    fn vf1_a_host_that_does_not_tell_its_mounts_is_an_error() {
        let machine = Machine::of("/sys/class/net/lo/mtu = 65536\n");
        let error = read(&Sysfs::at(machine.root())).unwrap_err();
        assert_eq!(error.to_string(), "/proc/self/mountinfo cannot be read");
    }

    #[test]
    fn screens_that_are_connected() {
        let machine = Machine::of(
            "/sys/devices/pci0000:00/0000:01:00.0/drm/card0/card0-HDMI-A-1/status = connected\n\
             /sys/devices/pci0000:00/0000:01:00.0/drm/card0/card0-DP-1/status = disconnected\n\
             /sys/class/drm/card0 -> /sys/devices/pci0000:00/0000:01:00.0/drm/card0\n\
             /sys/class/drm/card0-HDMI-A-1 -> /sys/devices/pci0000:00/0000:01:00.0/drm/card0/card0-HDMI-A-1\n\
             /sys/class/drm/card0-DP-1 -> /sys/devices/pci0000:00/0000:01:00.0/drm/card0/card0-DP-1\n",
        );
        let outputs: BTreeSet<String> = ["HDMI-A-1".to_owned()].into();
        assert_eq!(connected(&Sysfs::at(machine.root())), [(address("0000:01:00.0"), outputs)].into());
    }

    /// This host's own files are understood, whatever they say.
    #[test]
    fn this_host_can_be_read() {
        match read(&Sysfs::of_this_host()) {
            Ok(facts) => drop(usage::uses(&facts, [])),
            Err(error) => println!("SKIPPED: {error}"),
        }
    }
}
