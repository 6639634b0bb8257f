//! Makes the initramfs of a guest: one archive that all VMs of a kernel share, one small archive for each VM.
//!
//! The kernel unpacks archives that are simply put one behind the other, so a VM's initramfs is [`base`] followed
//! by [`overlay`]. Both are padded to 512 bytes and not compressed: they live for a moment, in memory.

mod cpio;
mod modules;

use crate::boot::{BootConfig, CONFIG, MODULES, REGISTRATION};
use cpio::Archive;
use std::{
    io,
    path::{Path, PathBuf},
};

/// The kernel modules that a guest of Lair needs, where they are not built into the kernel.
///
/// What they depend on is added; so are the providers of the checksums that ext4 asks for.
pub const WANTED_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "virtio_blk",
    "ext4",
];

/// The folder of the initramfs that holds the kernel modules.
const MODULE_FOLDER: &str = "lair/ko";

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file that goes into the initramfs, or says what does, could not be read.
    #[error("Could not read `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel has not been prepared by `depmod`, or the folder is not one of modules.
    #[error("`{0}` is missing: not a folder of kernel modules, or `depmod` has not been run on it")]
    NotIndexed(PathBuf),
    /// The kernel has no such module, neither built in nor as a file.
    #[error("The kernel of `{folder}` has no module `{module}`")]
    NoSuchModule {
        /// The module's name.
        module: String,
        /// The folder of modules.
        folder: PathBuf,
    },
    /// A file is longer than the archive's format can say.
    #[error("`{name}` of {length} bytes is too long for an initramfs: the limit is 4 GiB")]
    TooLong {
        /// The name in the archive.
        name: String,
        /// Its length in bytes.
        length: usize,
    },
    /// The configuration could not be written as JSON.
    #[error("Could not write the boot configuration")]
    Config(#[source] serde_json::Error),
}

/// The archive that all VMs with one kernel share: `guest_binary` (the static `lair-guest`) as `/init`, and the
/// `wanted` kernel modules of `modules_dir` (`…/lib/modules/VERSION`), with what they depend on.
pub fn base(guest_binary: &Path, modules_dir: &Path, wanted: &[&str]) -> Result<Vec<u8>, InitramfsError> {
    let files = modules::resolve(&modules::Index::read(modules_dir)?, wanted)
        .map_err(|module| InitramfsError::NoSuchModule { module, folder: modules_dir.to_path_buf() })?;
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "run", "sysroot", "lair", MODULE_FOLDER] {
        archive.directory(folder, 0o755)?;
    }
    // A kernel whose console driver is a module starts PID 1 without open files, and Rust's runtime then wants /dev/null.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.character_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, &read(guest_binary)?)?;
    let mut list = String::new();
    for file in files {
        let name = file.rsplit('/').next().unwrap_or(&file);
        archive.file(&format!("{MODULE_FOLDER}/{name}"), 0o644, &read(&modules_dir.join(&file))?)?;
        list.push_str(&format!("/{MODULE_FOLDER}/{name}\n"));
    }
    archive.file(in_archive(MODULES), 0o644, list.as_bytes())?;
    archive.finish()
}

/// The archive of one VM: its configuration and its view's registration (the input of `nix-store --load-db`;
/// empty for none).
pub fn overlay(config: &BootConfig, registration: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let json = serde_json::to_vec(config).map_err(InitramfsError::Config)?;
    let mut archive = Archive::new();
    archive.directory("lair", 0o755)?;
    archive.file(in_archive(CONFIG), 0o600, &json)?;
    if !registration.is_empty() {
        archive.file(in_archive(REGISTRATION), 0o600, registration)?;
    }
    archive.finish()
}

/// Names in an archive have no leading slash.
fn in_archive(path: &str) -> &str {
    path.trim_start_matches('/')
}

fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    std::fs::read(path).map_err(|source| InitramfsError::Read { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeMap, process::Command};

    /// A folder of modules: `b` needs `a`, `e` softly needs `sum`, `core` is built in.
    fn kernel() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("kernel")).unwrap();
        for name in ["a.ko.xz", "b.ko.xz", "e.ko.xz", "sum_generic.ko.xz"] {
            std::fs::write(folder.path().join("kernel").join(name), name).unwrap();
        }
        let dep =
            "kernel/b.ko.xz: kernel/a.ko.xz\nkernel/a.ko.xz:\nkernel/e.ko.xz:\nkernel/sum_generic.ko.xz:\n";
        std::fs::write(folder.path().join("modules.dep"), dep).unwrap();
        std::fs::write(folder.path().join("modules.builtin"), "kernel/core.ko\n").unwrap();
        std::fs::write(folder.path().join("modules.softdep"), "softdep e pre: sum\n").unwrap();
        std::fs::write(folder.path().join("modules.alias"), "alias sum sum_generic\n").unwrap();
        folder
    }

    #[test]
    fn archives_are_what_cpio_reads() {
        let kernel = kernel();
        let binary = kernel.path().join("guest");
        std::fs::write(&binary, b"program").unwrap();
        let archive = base(&binary, kernel.path(), &["b", "core", "e"]).unwrap();
        assert_eq!(archive.len() % 512, 0);

        let out = tempfile::tempdir().unwrap();
        let file = out.path().join("archive");
        std::fs::write(&file, &archive).unwrap();
        let root = out.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let done = Command::new("cpio")
            .args(["--extract", "--quiet", "--no-absolute-filenames", "-F"])
            .arg(&file)
            .arg("--nonmatching")
            .arg("dev/*")
            .current_dir(&root)
            .status();
        match done {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                eprintln!("skipped: cpio is not installed ({error})");
                return;
            }
        }
        assert_eq!(std::fs::read(root.join("init")).unwrap(), b"program");
        assert_eq!(
            std::fs::read_to_string(root.join("lair/modules")).unwrap(),
            "/lair/ko/a.ko.xz\n/lair/ko/b.ko.xz\n/lair/ko/sum_generic.ko.xz\n/lair/ko/e.ko.xz\n"
        );
        assert_eq!(std::fs::read(root.join("lair/ko/sum_generic.ko.xz")).unwrap(), b"sum_generic.ko.xz");
    }

    #[test]
    fn what_is_missing_is_named() {
        let kernel = kernel();
        let binary = kernel.path().join("guest");
        let error = base(&binary, kernel.path(), &["nosuch"]).unwrap_err();
        assert!(error.to_string().ends_with("has no module `nosuch`"), "{error}");
        assert!(
            matches!(base(&binary, kernel.path(), &["a"]), Err(InitramfsError::Read { path, .. }) if path == binary)
        );
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(base(&binary, empty.path(), &[]), Err(InitramfsError::NotIndexed(_))));
    }

    #[test]
    fn the_overlay_holds_the_configuration() {
        let config = BootConfig {
            hostname: "builder".into(),
            init: None,
            profile: None,
            overlay: None,
            volumes: vec![],
            services: vec![crate::boot::Service {
                name: "s".into(),
                command: vec!["x".into()],
                environment: BTreeMap::new(),
                ready: None,
            }],
            credentials: vec![],
            deny_vsock: true,
        };
        let archive = overlay(&config, b"registration").unwrap();
        let json = serde_json::to_vec(&config).unwrap();
        assert!(archive.windows(json.len()).any(|window| window == json));
        assert!(archive.windows(12).any(|window| window == b"registration"));
        let without = overlay(&config, b"").unwrap();
        assert!(!without.windows(12).any(|window| window == b"registration"));
    }
}
