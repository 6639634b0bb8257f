//! Volumes: virtio-blk devices, found by the serial that the host gives them.

use super::mounts::{self, MountError};
use lair_guest::boot::Volume;
use nix::mount::MsFlags;
use std::{
    fs,
    path::{Component, Path},
    thread,
    time::{Duration, Instant},
};

/// Why a volume is not mounted.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeError {
    #[error("Volume `{volume}` did not appear within {} seconds; the disks here are: {present}", WAIT.as_secs())]
    Missing { volume: String, present: String },
    #[error(
        "Volume `{volume}` can not be mounted at `{mount}`: an absolute path without `..` below `/` is needed"
    )]
    BadPath { volume: String, mount: String },
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// How long to wait for a volume: the kernel finds disks while init runs.
const WAIT: Duration = Duration::from_secs(10);

/// Mounts all volumes, in their order.
pub(super) fn mount_all(volumes: &[Volume]) -> Result<(), VolumeError> {
    for volume in volumes {
        if !is_mount_point(&volume.mount) {
            return Err(VolumeError::BadPath { volume: volume.name.clone(), mount: volume.mount.clone() });
        }
        let device = wait_for(&volume.name, Path::new("/sys/block"), WAIT)?;
        mounts::fs("ext4", &format!("/dev/{device}"), &volume.mount, mounts::DATA | MsFlags::MS_NOATIME, "")?;
    }
    Ok(())
}

fn is_mount_point(path: &str) -> bool {
    let mut components = Path::new(path).components();
    components.next() == Some(Component::RootDir)
        && components.clone().count() > 0
        && components.all(|part| matches!(part, Component::Normal(_)))
}

/// The name of the disk whose serial is `volume`, as soon as there is one.
fn wait_for(volume: &str, block: &Path, wait: Duration) -> Result<String, VolumeError> {
    let deadline = Instant::now() + wait;
    loop {
        let disks = disks(block);
        if let Some((name, _)) = disks.iter().find(|(_, serial)| serial == volume) {
            return Ok(name.clone());
        }
        if Instant::now() >= deadline {
            let present: Vec<_> = disks.iter().map(|(_, serial)| format!("`{serial}`")).collect();
            let present = if present.is_empty() { "none".into() } else { present.join(", ") };
            return Err(VolumeError::Missing { volume: volume.into(), present });
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Names and serials of the virtio disks.
fn disks(block: &Path) -> Vec<(String, String)> {
    let names = fs::read_dir(block).into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd"))
        .filter_map(|name| {
            let serial = fs::read_to_string(block.join(&name).join("serial")).ok()?;
            Some((name, serial.trim_end().to_string()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(disks: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, serial) in disks {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("serial"), serial).unwrap();
        }
        folder
    }

    #[test]
    fn a_volume_is_found_by_its_serial() {
        let block = block(&[("vda", "state"), ("vdb", "store\n"), ("sda", "other")]);
        assert_eq!(wait_for("store", block.path(), WAIT).unwrap(), "vdb");
    }

    #[test]
    fn a_missing_volume_is_named_with_what_is_there() {
        let block = block(&[("vda", "state"), ("sda", "other")]);
        let error = wait_for("other", block.path(), Duration::ZERO).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Volume `other` did not appear within 10 seconds; the disks here are: `state`"
        );
    }

    #[test]
    fn mount_points_are_below_the_root() {
        for good in ["/var", "/var/lib/x"] {
            assert!(is_mount_point(good), "{good}");
        }
        for bad in ["", "/", "var", "/var/../etc", ".."] {
            assert!(!is_mount_point(bad), "{bad}");
        }
    }
}
