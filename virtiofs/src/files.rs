//! Contents of the files that are served: which descriptors are open, and no more than a fixed number of them.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::{
    beneath,
    index::{Node, NodeId, Tree},
    stats::Stats,
};
use nix::{errno::Errno, fcntl::OFlag, sys::stat::Mode};
use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use thiserror::Error;

/// How many files are kept open.
pub const OPEN_MAX: usize = 256;

/// A store directory could not be opened.
#[derive(Debug, Error)]
#[error("Cannot open the store directory {path}")]
pub struct OpenError {
    path: PathBuf,
    source: Errno,
}

/// The store directories, and the files of them that are open.
#[derive(Debug)]
pub struct Files {
    stores: Vec<OwnedFd>,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    files: HashMap<NodeId, (Arc<File>, u64)>,
    /// Counts uses; the file with the smallest mark was used longest ago.
    clock: u64,
}

impl Files {
    /// Opens the store directories, in the order in which [`Tree::load`] gets them.
    pub fn open_stores(directories: &[impl AsRef<Path>]) -> Result<Self, OpenError> {
        let open = |directory: &Path| {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            nix::fcntl::open(directory, flags, Mode::empty())
                .map_err(|source| OpenError { path: directory.to_owned(), source })
        };
        let stores = directories.iter().map(|d| open(d.as_ref())).collect::<Result<_, _>>()?;
        Ok(Self { stores, cache: Mutex::default() })
    }

    /// The store directories.
    pub fn stores(&self) -> &[OwnedFd] {
        &self.stores
    }

    /// The file of a node, open for reading. ESTALE if it is not of this tree; EIO if what is there now is no regular file.
    pub fn get(&self, tree: &Tree, stats: &Stats, id: NodeId) -> Result<Arc<File>, Errno> {
        if let Some(file) = self.lock().get(id) {
            return Ok(file);
        }
        let Some(Node::Inode { entry, number, .. }) = tree.node(id) else { return Err(Errno::ESTALE) };
        let store = self.stores.get(entry.source).ok_or(Errno::ESTALE)?;
        let names = entry.manifest.path(number).ok_or(Errno::EIO)?;
        let components: Vec<&[u8]> =
            std::iter::once(entry.path.base_name().as_bytes()).chain(names).collect();
        stats.opens.add(1);
        // A file that is gone was garbage-collected, or its store path was replaced.
        let file = beneath::open_file(store.as_fd(), &components).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV => Errno::ESTALE,
            errno => errno,
        })?;
        let file = Arc::new(file);
        self.lock().put(id, file.clone());
        Ok(file)
    }

    /// The path of a node on the host's side, for messages.
    pub fn describe(&self, tree: &Tree, id: NodeId) -> String {
        let Some(Node::Inode { entry, number, .. }) = tree.node(id) else {
            return crate::store::STORE_DIR.into();
        };
        let names = entry.manifest.path(number).unwrap_or_default().join(&b'/');
        format!("{}/{}", entry.path, String::from_utf8_lossy(&names).escape_debug())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    fn tick(&mut self) -> u64 {
        self.clock = self.clock.wrapping_add(1);
        self.clock
    }

    fn get(&mut self, id: NodeId) -> Option<Arc<File>> {
        let now = self.tick();
        let (file, used) = self.files.get_mut(&id)?;
        *used = now;
        Some(file.clone())
    }

    fn put(&mut self, id: NodeId, file: Arc<File>) {
        if self.files.len() >= OPEN_MAX {
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used).map(|(id, _)| *id);
            oldest.map(|id| self.files.remove(&id));
        }
        let now = self.tick();
        self.files.insert(id, (file, now));
    }
}
