//! Filling a [`Tree`]: from the view at the start, and with what is granted later.

use super::{
    FileError, Identity, Index, IndexError, Tree,
    build::{build, find},
    parallel,
    reader::{Found, Search},
    slot::Slots,
};
use crate::{error::chain, store::StorePath, view::View};
use std::{fmt, os::fd::AsFd};
use tracing::warn;

/// How many store paths are looked for before they are added: what is found of them takes memory twice until then.
const BLOCK: usize = 4096;

/// Where metadata comes from.
#[derive(Debug)]
pub struct Origin<'a, D> {
    /// The store directories, in their order.
    pub stores: &'a [D],
    /// The index. Without one, or where it has nothing sound, metadata is read from the store directories.
    pub index: Option<&'a Index>,
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

/// Which of the store directories has a path, who it is there, and what the index has of it.
type Looked = Result<Option<(usize, Identity, Found)>, IndexError>;

impl Tree {
    /// The metadata of all paths of `view`, each from the first of the store directories that has it.
    pub fn load<D: AsFd + Sync>(origin: Origin<'_, D>, view: &View) -> Result<(Self, Added), IndexError> {
        let slots = if origin.index.is_some() { Slots::Downwards } else { Slots::Upwards };
        Self::empty(slots).with(origin, view.paths())
    }

    /// A tree with these paths as well. All or none are added.
    pub fn with<D: AsFd + Sync>(
        &self,
        origin: Origin<'_, D>,
        paths: &[StorePath],
    ) -> Result<(Self, Added), IndexError> {
        let Origin { stores, index } = origin;
        let mut added = Added::default();
        let mut search = match index.map(|index| index.search(paths)).transpose() {
            Ok(search) => search,
            Err(error) => {
                added.unindexed.error = Some(error);
                None
            }
        };
        let mut tree = self.clone();
        for block in paths.chunks(BLOCK) {
            let look = |part: &[StorePath]| self.look_for(stores, search.as_ref(), part);
            let looked = parallel::map(block, look);
            tree.reserve(block.len());
            for (path, looked) in block.iter().zip(looked.into_iter().flatten()) {
                let Some((source, identity, mut found)) = looked?.filter(|_| !tree.contains(path)) else {
                    continue;
                };
                added.paths = added.paths.saturating_add(1);
                if index.is_some() {
                    if matches!(found, Found::Damaged)
                        && let Some(search) = &mut search
                    {
                        found = search.find_again(path, identity);
                    }
                    let counter = match found {
                        Found::Sound { slot, first_ino, manifest } if !tree.has_slot(slot) => {
                            tree.insert(path, source, manifest, Some((slot, first_ino)))?;
                            continue;
                        }
                        Found::Missing => &mut added.unindexed.missing,
                        Found::Stale => &mut added.unindexed.stale,
                        Found::Damaged | Found::Sound { .. } => &mut added.unindexed.damaged,
                    };
                    *counter = counter.saturating_add(1);
                }
                let store = stores.get(source).ok_or_else(|| IndexError::Missing { path: path.clone() })?;
                let (manifest, _) = build(store.as_fd(), path)?;
                tree.insert(path, source, manifest, None)?;
            }
        }
        Ok((tree, added))
    }

    /// Where these paths are, and what the index has of them. `None` for those that are in the tree already.
    fn look_for<D: AsFd>(
        &self,
        stores: &[D],
        search: Option<&Search<'_>>,
        paths: &[StorePath],
    ) -> Vec<Looked> {
        let place = |path| (!self.contains(path)).then(|| find(stores, path)).transpose();
        // All system calls first: after one, memory takes longer to get at for a while.
        let places: Vec<_> = paths.iter().map(place).collect();
        let look = |(path, place): (_, Result<Option<_>, _>)| {
            let Some((source, identity)) = place? else { return Ok(None) };
            let found = search.map_or(Found::Missing, |search| search.find(path, identity));
            Ok(Some((source, identity, found)))
        };
        paths.iter().zip(places).map(look).collect()
    }
}
