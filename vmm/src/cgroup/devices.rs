//! The block device that a file is on: what `io.max` limits.

use super::values::Device;
use nix::sys::stat::{major, minor};
use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

/// The disk under `path`. None where its file system has no block device of its own, as ZFS, btrfs, tmpfs and overlayfs have none: their
/// reads and writes cannot be told apart by device.
pub fn backing(path: &Path) -> io::Result<Option<Device>> {
    let number = fs::metadata(path)?.dev();
    let device = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let device = Device { major: device(major(number)), minor: device(minor(number)) };
    if device.major == 0 {
        return Ok(None);
    }
    Ok(Some(disk(device, Path::new("/sys"))))
}

/// The kernel limits whole disks, so a partition stands for the disk that it is on.
fn disk(device: Device, sys: &Path) -> Device {
    let directory = sys.join(format!("dev/block/{device}"));
    if !directory.join("partition").exists() {
        return device;
    }
    let of_disk = || {
        let whole = fs::canonicalize(&directory).ok()?;
        let text = fs::read_to_string(whole.parent()?.join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some(Device { major: major.parse().ok()?, minor: minor.parse().ok()? })
    };
    of_disk().unwrap_or(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cg5_a_partition_stands_for_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let disk_directory = sys.path().join("devices/nvme0n1");
        fs::create_dir_all(disk_directory.join("nvme0n1p2")).unwrap();
        fs::write(disk_directory.join("dev"), "259:0\n").unwrap();
        fs::write(disk_directory.join("nvme0n1p2/partition"), "2\n").unwrap();
        fs::create_dir_all(sys.path().join("dev/block")).unwrap();
        for (number, to) in [("259:2", "nvme0n1/nvme0n1p2"), ("259:0", "nvme0n1")] {
            let link = sys.path().join("dev/block").join(number);
            std::os::unix::fs::symlink(format!("../../devices/{to}"), link).unwrap();
        }
        let whole = Device { major: 259, minor: 0 };
        assert_eq!(disk(Device { major: 259, minor: 2 }, sys.path()), whole);
        assert_eq!(disk(whole, sys.path()), whole);
        let unknown = Device { major: 8, minor: 1 };
        assert_eq!(disk(unknown, sys.path()), unknown);
    }

    #[test]
    fn cg5_a_file_system_without_a_device_has_none() {
        assert_eq!(backing(Path::new("/proc")).unwrap(), None);
        assert!(backing(Path::new("/nowhere")).is_err());
    }
}
