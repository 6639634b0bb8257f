//! Contents of files: opened below their store without following any link, a bounded number of them kept open.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::{
    index::{Index, Node},
    store::Source,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstat},
};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::fs::FileExt},
    sync::{Arc, Mutex, PoisonError},
};

/// How many files are kept open.
const OPEN_MAX: usize = 256;

/// The sources' files.
#[derive(Debug)]
pub struct Files {
    stores: Vec<OwnedFd>,
    open: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    files: HashMap<Node, (Arc<File>, u64)>,
    clock: u64,
}

impl Files {
    /// Opens the sources' store directories.
    pub fn new(sources: &[Source]) -> io::Result<Self> {
        let open = |source: &Source| File::open(&source.store).map(OwnedFd::from);
        Ok(Self { stores: sources.iter().map(open).collect::<io::Result<_>>()?, open: Mutex::default() })
    }

    /// Fills `buffer` from a file at `offset`. A file that is shorter than the index says is an error: the guest would take
    /// less than it asked for as the file's end.
    pub fn read(&self, index: &Index, node: Node, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.open(index, node)?.read_exact_at(buffer, offset)
    }

    fn open(&self, index: &Index, node: Node) -> io::Result<Arc<File>> {
        let mut cache = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        cache.clock = cache.clock.wrapping_add(1);
        let now = cache.clock;
        if let Some((file, used)) = cache.files.get_mut(&node) {
            *used = now;
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.open_anew(index, node)?);
        if cache.files.len() >= OPEN_MAX {
            let oldest = cache.files.iter().min_by_key(|(_, (_, used))| *used).map(|(node, _)| *node);
            oldest.and_then(|oldest| cache.files.remove(&oldest));
        }
        cache.files.insert(node, (Arc::clone(&file), now));
        Ok(file)
    }

    fn open_anew(&self, index: &Index, node: Node) -> io::Result<File> {
        let (source, place) = index.location(node).ok_or(Errno::ESTALE)?;
        let store = self.stores.get(source).ok_or(Errno::ESTALE)?;
        let how = OpenHow::new()
            // Should it have become a FIFO, that must not hold us up.
            .flags(
                OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
            )
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS,
            );
        let file = openat2(store, OsStr::from_bytes(&place), how)?;
        let stat = fstat(&file)?;
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(Errno::EIO.into());
        }
        Ok(file.into())
    }
}
