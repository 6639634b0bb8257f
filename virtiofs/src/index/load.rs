//! Filling a [`Tree`]: from the view at the start, and with what is granted later.

use super::{
    FileError, Index, IndexError, Tree,
    build::{build, find},
    reader::Found,
    slot::Slots,
};
use crate::{error::chain, store::StorePath, view::View};
use std::{fmt, os::fd::AsFd};
use tracing::warn;

/// Where metadata comes from.
#[derive(Debug)]
pub struct Origin<'a, D> {
    /// The store directories, in their order.
    pub stores: &'a [D],
    /// The index. Without one, or where it has nothing sound, metadata is read from the store directories.
    pub index: Option<&'a mut Index>,
}

/// What was added to a tree.
#[derive(Debug, Default)]
pub struct Added {
    /// How many store paths.
    pub paths: usize,
    /// Those of them for which there is no use of the index, though there is one.
    pub unindexed: Unindexed,
}

/// How many store paths had to be read although there is an index, and why.
#[derive(Debug, Default)]
pub struct Unindexed {
    /// The index does not have them.
    pub missing: usize,
    /// It has others of the same name.
    pub stale: usize,
    /// What it has is damaged.
    pub damaged: usize,
    /// Why none of it can be used.
    pub error: Option<FileError>,
}

impl Unindexed {
    /// How many.
    pub fn count(&self) -> usize {
        self.missing.saturating_add(self.stale).saturating_add(self.damaged)
    }

    /// Says so, in one line, if there are any.
    pub fn log(&self) {
        if self.count() > 0 {
            warn!("Read the metadata of {} store paths without the index: {self}", self.count());
        }
    }
}

impl fmt::Display for Unindexed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { missing, stale, damaged, error } = self;
        write!(f, "{missing} not in it, {stale} changed since, {damaged} damaged in it")?;
        error.as_ref().map_or(Ok(()), |error| write!(f, "; {}", chain(error)))
    }
}

impl Tree {
    /// The metadata of all paths of `view`, each from the first of the store directories that has it.
    pub fn load<D: AsFd>(origin: Origin<'_, D>, view: &View) -> Result<(Self, Added), IndexError> {
        let slots = if origin.index.is_some() { Slots::Downwards } else { Slots::Upwards };
        Self::empty(slots).with(origin, view.paths())
    }

    /// A tree with these paths as well. All or none are added.
    pub fn with<D: AsFd>(
        &self,
        origin: Origin<'_, D>,
        paths: &[StorePath],
    ) -> Result<(Self, Added), IndexError> {
        let Origin { stores, index } = origin;
        let mut added = Added::default();
        let has_index = index.is_some();
        let mut search = match index.map(|index| index.search(paths)).transpose() {
            Ok(search) => search,
            Err(error) => {
                added.unindexed.error = Some(error);
                None
            }
        };
        let mut tree = self.clone();
        for path in paths {
            if tree.contains(path) {
                continue;
            }
            let (source, identity) = find(stores, path)?;
            added.paths = added.paths.saturating_add(1);
            if has_index {
                let found = search.as_mut().map_or(Found::Missing, |search| search.find(path, identity));
                let counter = match found {
                    Found::Sound(record, manifest) if !tree.has_slot(record.slot) => {
                        tree.insert(path, source, manifest, Some((record.slot, record.first_ino)))?;
                        continue;
                    }
                    Found::Missing => &mut added.unindexed.missing,
                    Found::Stale => &mut added.unindexed.stale,
                    Found::Damaged | Found::Sound(..) => &mut added.unindexed.damaged,
                };
                *counter = counter.saturating_add(1);
            }
            let store = stores.get(source).ok_or_else(|| IndexError::Missing { path: path.clone() })?;
            let (manifest, _) = build(store.as_fd(), path)?;
            tree.insert(path, source, manifest, None)?;
        }
        Ok((tree, added))
    }
}
