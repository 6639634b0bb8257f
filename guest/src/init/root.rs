//! The guest's root file system: memory, with the usual folders; everything that lasts is mounted into it.

use super::mounts::{self, MountError};
use nix::{
    errno::Errno,
    mount::MsFlags,
    unistd::{chdir, chroot},
};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Why there is no new root.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    #[error("Could not create `{path}`")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Could not free the initramfs at `{path}`")]
    Free {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Could not make `{NEW}` the root")]
    Switch(#[source] Errno),
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// Where the new root is put together.
const NEW: &str = "/sysroot";

/// Mounts that go along.
const KEPT: [&str; 4] = ["proc", "sys", "dev", "run"];

/// Folders of the new root and their modes.
const FOLDERS: [(&str, u32); 15] = [
    ("proc", 0o555),
    ("sys", 0o555),
    ("dev", 0o755),
    ("run", 0o755),
    ("bin", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("nix", 0o755),
    ("nix/store", 0o755),
    ("nix/var", 0o755),
    ("root", 0o700),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("var", 0o755),
    ("tmp", 0o1777),
];

/// Makes a file system in memory the root, moves the kernel's file systems there, and frees the initramfs.
pub(super) fn switch() -> Result<(), RootError> {
    mounts::fs("tmpfs", "root", NEW, MsFlags::empty(), "mode=0755")?;
    for (folder, mode) in FOLDERS {
        let path = Path::new(NEW).join(folder);
        make(&path, mode).map_err(|source| RootError::Create { path, source })?;
    }
    free_initramfs()?;
    for name in KEPT {
        mounts::rebind(&format!("/{name}"), &format!("{NEW}/{name}"), MsFlags::MS_MOVE)?;
    }
    // The initramfs can not be unmounted, so the new root is moved over it.
    chdir(NEW).map_err(RootError::Switch)?;
    mounts::rebind(".", "/", MsFlags::MS_MOVE)?;
    chroot(".").and_then(|()| chdir("/")).map_err(RootError::Switch)
}

fn make(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Deletes the files of the initramfs: they are memory. What is mounted on it has another device number.
fn free_initramfs() -> Result<(), RootError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| RootError::Free { path, source }
    };
    let root = Path::new("/");
    let device = fs::symlink_metadata(root).map_err(failed(root))?.dev();
    for entry in fs::read_dir(root).map_err(failed(root))? {
        let path = entry.map_err(failed(root))?.path();
        let metadata = fs::symlink_metadata(&path).map_err(failed(&path))?;
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
            .map_err(failed(&path))?;
    }
    Ok(())
}
