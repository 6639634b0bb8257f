//! The programs that Lair runs: its own beside `laird`, the others in PATH.

use crate::fleet::schema::Vm;
use nix::unistd::{AccessFlags, access};
use std::path::{Path, PathBuf};

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
pub const MKFS: Tool =
    Tool { name: "mkfs.ext4", source: "install e2fsprogs (Debian and nixpkgs: e2fsprogs)" };
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

/// Programs that are not there, told one a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", told(.0))]
pub struct Missing(pub Vec<Tool>);

fn told(missing: &[Tool]) -> String {
    missing
        .iter()
        .map(|tool| format!("{} is missing: {}", tool.name, tool.source))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Where programs are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// The directories, in their order.
    pub directories: Vec<PathBuf>,
}

impl Tools {
    /// Beside the running program, then in PATH, then in `/usr/sbin` and `/sbin`, which are not in a user's PATH.
    pub fn of_this_process() -> Self {
        let own = std::env::current_exe().ok();
        let own = own.as_deref().and_then(Path::parent).map(Path::to_owned);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::split_paths(&path).filter(|directory| directory.is_absolute());
        Self {
            directories: own.into_iter().chain(path).chain(["/usr/sbin".into(), "/sbin".into()]).collect(),
        }
    }

    /// Finds a program.
    pub fn find(&self, tool: Tool) -> Result<PathBuf, Missing> {
        self.directories
            .iter()
            .map(|directory| directory.join(tool.name))
            .find(|file| access(file, AccessFlags::X_OK).is_ok() && file.is_file())
            .ok_or(Missing(vec![tool]))
    }

    /// Whether there is all that starting `vm` needs; what is not there is told at once.
    pub fn suffice_for(&self, vm: &Vm) -> Result<(), Missing> {
        let unneeded = |tool: &Tool| *tool == MKFS && vm.volumes.is_empty();
        let missing: Vec<_> =
            ALL.into_iter().filter(|tool| !unneeded(tool) && self.find(*tool).is_err()).collect();
        if missing.is_empty() { Ok(()) } else { Err(Missing(missing)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::units::Size;
    use std::os::unix::fs::PermissionsExt;

    fn put(directory: &Path, tool: Tool, mode: u32) {
        let file = directory.join(tool.name);
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn vm() -> Vm {
        let vm = serde_json::json!({ "vcpus": 1, "memory": "512MiB", "kernel": "/k", "modules": "/m", "roots": [] });
        serde_json::from_value(vm).unwrap()
    }

    #[test]
    fn hv1_missing_programs_are_named_with_their_packages() {
        let directory = tempfile::tempdir().unwrap();
        let tools = Tools { directories: vec![directory.path().into()] };
        put(directory.path(), SHIM, 0o755);
        // There, and no program.
        put(directory.path(), VIRTIOFS, 0o644);
        std::fs::create_dir(directory.path().join(GUEST.name)).unwrap();
        let with_volume = Vm {
            volumes: vec![crate::fleet::schema::Volume {
                name: "v".into(),
                size: Size(1 << 30),
                mount: "/v".into(),
            }],
            ..vm()
        };
        insta::assert_snapshot!(tools.suffice_for(&with_volume).unwrap_err().to_string());
        assert!(!tools.suffice_for(&vm()).unwrap_err().0.contains(&MKFS));
    }

    #[test]
    fn the_first_directory_wins_and_the_program_must_be_executable() {
        let (a, b, c) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (directory, mode) in [(&a, 0o644), (&b, 0o755), (&c, 0o755)] {
            put(directory.path(), SHIM, mode);
        }
        let tools = Tools { directories: [&a, &b, &c].map(|directory| directory.path().to_owned()).into() };
        assert_eq!(tools.find(SHIM).unwrap(), b.path().join(SHIM.name));
    }
}
