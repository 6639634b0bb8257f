//! Contents of the files that are served: which descriptors are open, and no more than a fixed number of them.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod copy;
mod mapping;
mod open_file;
mod recent;

pub use crate::buffers::Part;
pub use copy::copy;
pub use open_file::{OpenFile, Read, Waiting};
pub use recent::{RECENT_MAX, Recent};

use crate::{
    beneath,
    index::{Node, NodeId, Tree},
    stats::Counter,
};
use lru::LruCache;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        stat::Mode,
        statfs::{FsType, fstatfs},
    },
};
use open_file::Abilities;
use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64},
    },
};
use thiserror::Error;

/// How many files are kept open.
pub const OPEN_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// File systems of which a mapped file is cached twice, or whose pages come over a network: the numbers of statfs(2). ZFS is not
/// in the kernel's headers; its number is in its own sources (`ZFS_SUPER_MAGIC`).
const NOT_MAPPED: [i64; 6] = [
    0x2fc1_2fc1, // ZFS
    0x6969,      // NFS
    0x6573_5546, // FUSE
    0x0102_1997, // 9p
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
];

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
    /// What each of them can do.
    abilities: Vec<Arc<Abilities>>,
    cache: Mutex<LruCache<NodeId, Arc<OpenFile>>>,
    opens: Counter,
}

impl Files {
    /// Opens the store directories, in the order in which [`Tree::load`] gets them.
    pub fn open_stores(directories: &[impl AsRef<Path>]) -> Result<Self, OpenError> {
        let mapped = Arc::new(AtomicU64::new(0));
        let (mut stores, mut abilities) = (Vec::new(), Vec::new());
        for path in directories.iter().map(AsRef::as_ref) {
            let (store, able) =
                open(path, &mapped).map_err(|source| OpenError { path: path.to_owned(), source })?;
            stores.push(store);
            abilities.push(Arc::new(able));
        }
        let cache = Mutex::new(LruCache::new(OPEN_MAX));
        Ok(Self { stores, abilities, cache, opens: Counter::default() })
    }

    /// The store directories.
    pub fn stores(&self) -> &[OwnedFd] {
        &self.stores
    }

    /// How often a file was opened.
    pub fn opens(&self) -> &Counter {
        &self.opens
    }

    /// The file of a node, open for reading. Without `wait`, `None` if opening it might have to wait for a disk. ESTALE if it is
    /// not of this tree; EIO if what is there now is no regular file.
    pub fn get(&self, tree: &Tree, id: NodeId, wait: bool) -> Result<Option<Arc<OpenFile>>, Errno> {
        if let Some(file) = self.lock().get(&id) {
            return Ok(Some(file.clone()));
        }
        let Some(Node::Inode { entry, number, inode, .. }) = tree.node(id) else {
            return Err(Errno::ESTALE);
        };
        let store = self.stores.get(entry.source).ok_or(Errno::ESTALE)?;
        let abilities = self.abilities.get(entry.source).ok_or(Errno::ESTALE)?;
        let names = entry.manifest.path(number).ok_or(Errno::EIO)?;
        let components: Vec<&[u8]> =
            std::iter::once(entry.path.base_name().as_bytes()).chain(names).collect();
        let file = match beneath::open_file(store.as_fd(), &components, !wait) {
            Ok(file) => file,
            Err(Errno::EAGAIN) if !wait => return Ok(None),
            // A file that is gone was garbage-collected, or its store path was replaced.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV) => return Err(Errno::ESTALE),
            Err(errno) => return Err(errno),
        };
        self.opens.add(1);
        let file = Arc::new(OpenFile::new(file, inode.size(), abilities.clone()));
        // What falls out is closed after the lock is released.
        let _old = self.lock().push(id, file.clone());
        Ok(Some(file))
    }

    /// Brings what a read needs into memory: opens the file and reads that part of it. Waits for it. An error is left to the
    /// read itself to find.
    pub fn warm(&self, tree: &Tree, id: NodeId, offset: u64, length: u64) {
        if let Ok(Some(file)) = self.get(tree, id, true) {
            let _ = file.warm(offset, length);
        }
    }

    /// The path of a node on the host's side, for messages.
    pub fn describe(&self, tree: &Tree, id: NodeId) -> String {
        let Some(Node::Inode { entry, number, .. }) = tree.node(id) else {
            return crate::store::STORE_DIR.into();
        };
        let names = entry.manifest.path(number).unwrap_or_default().join(&b'/');
        format!("{}/{}", entry.path, String::from_utf8_lossy(&names).escape_debug())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LruCache<NodeId, Arc<OpenFile>>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a store directory, and finds out what its file system can do.
fn open(directory: &Path, mapped: &Arc<AtomicU64>) -> Result<(OwnedFd, Abilities), Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = nix::fcntl::open(directory, flags, Mode::empty())?;
    let FsType(kind) = fstatfs(&directory)?.filesystem_type();
    let map = !NOT_MAPPED.contains(&kind);
    Ok((directory, Abilities { nowait: AtomicBool::new(true), map, mapped: mapped.clone() }))
}
