//! Filling a [`Tree`]: from the view at the start, and with what is granted later.

use super::{
    IndexError, Tree,
    build::{build, find},
    slot::Slots,
};
use crate::{store::StorePath, view::View};
use std::os::fd::AsFd;

impl Tree {
    /// Reads the metadata of all paths of `view`, each from the first of the store directories that has it.
    pub fn build<D: AsFd>(stores: &[D], view: &View) -> Result<Self, IndexError> {
        Self::empty(Slots::Upwards).with(stores, view.paths()).map(|(tree, _)| tree)
    }

    /// A tree with these paths as well, and how many of them were not there yet. All or none are added.
    pub fn with<D: AsFd>(&self, stores: &[D], paths: &[StorePath]) -> Result<(Self, usize), IndexError> {
        let mut tree = self.clone();
        for path in paths {
            if tree.contains(path) {
                continue;
            }
            let (source, _) = find(stores, path)?;
            let store = stores.get(source).ok_or_else(|| IndexError::Missing { path: path.clone() })?;
            let (manifest, _) = build(store.as_fd(), path)?;
            tree.insert(path, source, manifest, None)?;
        }
        let added = tree.entries().len().saturating_sub(self.entries().len());
        Ok((tree, added))
    }
}
