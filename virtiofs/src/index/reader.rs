//! An index as backends use it: read-only, with no lock, its packs mapped once.

use super::{
    Identity, Manifest,
    directory::{Directory, FileError},
    pack::Pack,
    registry::{self, Known, Record},
};
use crate::store::StorePath;
use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// An index on disk: see the module's documentation.
#[derive(Debug)]
pub struct Index {
    directory: Directory,
    /// Those that were needed so far. Several threads may need them at the same time.
    packs: Mutex<HashMap<u32, Pack>>,
}

/// The search for some store paths, with what the registry says of them.
pub(super) struct Search<'a> {
    index: &'a Index,
    paths: &'a [StorePath],
    known: Known<'a>,
    again: bool,
}

/// What an index has of a store path.
pub(super) enum Found {
    /// This, and it is sound. `slot` and `first_ino` are what the registry gave it.
    Sound { slot: u32, first_ino: u64, manifest: Manifest },
    /// Nothing.
    Missing,
    /// Only of another one that had the same name.
    Stale,
    /// Something that is damaged.
    Damaged,
}

/// Its directory, beneath which it opens files whenever something is granted.
impl AsFd for Index {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Index {
    /// Opens the index in this directory. It may be empty.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Directory::open(path).map(Self::new)
    }

    pub(super) fn new(directory: Directory) -> Self {
        Self { directory, packs: Mutex::default() }
    }

    /// Reads what the registry says of these paths.
    pub(super) fn search<'a>(&'a self, paths: &'a [StorePath]) -> Result<Search<'a>, FileError> {
        let known = self.known(paths)?;
        Ok(Search { index: self, paths, known, again: false })
    }

    fn known<'a>(&self, paths: &'a [StorePath]) -> Result<Known<'a>, FileError> {
        // Those that are gone on disk would else stay mapped for good.
        self.packs().retain(|_, pack| pack.is_used());
        let bytes = registry::read(&self.directory)?.unwrap_or_default();
        Ok(Known::of(paths, &bytes).0)
    }

    /// What there is of this path. The newest that is sound counts.
    pub(super) fn find(&self, known: &Known<'_>, path: &StorePath, identity: Identity) -> Found {
        let mut found = Found::Missing;
        for record in known.records(path) {
            if record.identity != identity {
                if !matches!(found, Found::Damaged) {
                    found = Found::Stale;
                }
                continue;
            }
            match self.manifest(record) {
                Some(manifest) => {
                    return Found::Sound { slot: record.slot, first_ino: record.first_ino, manifest };
                }
                None => found = Found::Damaged,
            }
        }
        found
    }

    /// The manifest of a record; `None` if it is damaged or gone.
    pub(super) fn manifest(&self, record: &Record) -> Option<Manifest> {
        let manifest =
            self.pack(record.place.pack)?.manifest(record.place.offset, record.place.length).ok()?;
        let same = manifest.checksum() == record.manifest && manifest.len() == record.inodes;
        same.then_some(manifest)
    }

    fn pack(&self, number: u32) -> Option<Pack> {
        let mut packs = self.packs();
        if let Some(pack) = packs.get(&number) {
            return Some(pack.clone());
        }
        let pack = Pack::open(&self.directory, number).ok()??;
        packs.insert(number, pack.clone());
        Some(pack)
    }

    fn packs(&self) -> MutexGuard<'_, HashMap<u32, Pack>> {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Search<'_> {
    /// What there is of one of the paths.
    pub(super) fn find(&self, path: &StorePath, identity: Identity) -> Found {
        self.index.find(&self.known, path, identity)
    }

    /// The same for one that was found to be damaged, since its pack may have been merged with others after the registry was read.
    pub(super) fn find_again(&mut self, path: &StorePath, identity: Identity) -> Found {
        if !self.again {
            self.again = true;
            if let Ok(known) = self.index.known(self.paths) {
                self.known = known;
            }
        }
        self.find(path, identity)
    }
}
