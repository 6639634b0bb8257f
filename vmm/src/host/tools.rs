//! The programs that Lair runs: its own beside `laird`, the others in PATH.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// A program, and where it comes from if it is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// The program's name.
    pub name: &'static str,
    /// How to get it.
    pub source: &'static str,
}

/// QEMU.
pub const QEMU: Tool =
    Tool { name: "qemu-system-x86_64", source: "install QEMU (Debian: qemu-system-x86; nixpkgs: qemu_kvm)" };
/// The vsock device for QEMU.
pub const VHOST_DEVICE_VSOCK: Tool = Tool {
    name: "vhost-device-vsock",
    source: "install rust-vmm's vhost-device-vsock (`cargo install vhost-device-vsock`; nixpkgs: vhost-device-vsock)",
};
/// Formats volumes.
pub const MKFS: Tool = Tool { name: "mkfs.ext4", source: "install e2fsprogs" };
/// The store backend.
pub const VIRTIOFS: Tool = own("lair-virtiofs");
/// The shim.
pub const SHIM: Tool = own("lair-shim");
/// The guest's half, a static binary.
pub const GUEST: Tool = own("lair-guest");

/// All programs that starting a VM needs.
pub const ALL: [Tool; 6] = [QEMU, VHOST_DEVICE_VSOCK, MKFS, VIRTIOFS, SHIM, GUEST];

const fn own(name: &'static str) -> Tool {
    Tool { name, source: "it is part of Lair and belongs beside laird, or in PATH" }
}

/// A program that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is missing: {}", .0.name, .0.source)]
pub struct Missing(pub Tool);

/// Finds a program: beside the running one, then in PATH, then in `/usr/sbin` and `/sbin`, which are not in a user's PATH.
pub fn find(tool: Tool) -> Result<PathBuf, Missing> {
    let own = std::env::current_exe().ok();
    let own = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(tool, own, &path)
}

fn find_in(tool: Tool, own: Option<PathBuf>, path: &OsStr) -> Result<PathBuf, Missing> {
    own.into_iter()
        .chain(std::env::split_paths(path).filter(|directory| directory.is_absolute()))
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(tool.name))
        .find(|file| nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file())
        .ok_or(Missing(tool))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn hv1_a_missing_program_is_named_with_its_package() {
        let missing = find_in(QEMU, None, OsStr::new("/nonexistent")).unwrap_err();
        insta::assert_snapshot!(missing, @"qemu-system-x86_64 is missing: install QEMU (Debian: qemu-system-x86; nixpkgs: qemu_kvm)");
    }

    #[test]
    fn a_program_beside_the_running_one_wins_and_must_be_executable() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (directory, mode) in [(&a, 0o644), (&b, 0o755)] {
            let file = directory.path().join(SHIM.name);
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let found = find_in(SHIM, Some(a.path().into()), b.path().as_os_str()).unwrap();
        assert_eq!(found, b.path().join(SHIM.name));
    }
}
