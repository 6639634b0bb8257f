//! Where the files and the metadata of a store are on the host.

use super::StorePath;
use std::path::{Path, PathBuf};

/// A Nix store on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The directory that holds the store paths.
    pub store: PathBuf,
    /// The directory that holds `db.sqlite`.
    pub database: PathBuf,
}

impl Source {
    /// A chroot store: `nix/store` and `nix/var/nix/db` below `root`.
    pub fn chroot(root: &Path) -> Self {
        Self { store: root.join("nix/store"), database: root.join("nix/var/nix/db") }
    }

    /// Where this source would have the files of `path`.
    pub fn physical(&self, path: &StorePath) -> PathBuf {
        self.store.join(path.base_name())
    }
}
