//! The metadata of what is served: one immutable [`Manifest`] per store path, and the [`Tree`] of a view.
//!
//! A store path's contents never change, so all its metadata is read once: by `lair-virtiofs index` into an index on disk, which
//! all backends of the host map into memory, or without one by each backend for itself. After that only file contents are read.
//!
//! An index is a directory. `pack-NNNNNNNN` are files of many manifests, written once and never changed. `registry` is a list of
//! records to which more are added at the end: which store path has which slot, which is half of the node ids, and where its
//! manifest is. Readers take no lock and trust no byte that has no checksum.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod build;
mod bytes;
mod directory;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod held;
mod inode;
mod load;
mod manifest;
mod merge;
mod near;
mod pack;
mod parallel;
mod reader;
mod records;
mod registry;
mod slot;
mod table;
mod tree;
mod update;

pub use build::{Identity, IndexError};
pub use directory::FileError;
pub use inode::{Inode, Kind};
pub use load::{Added, Origin, Unindexed};
pub use manifest::{Manifest, ManifestError};
pub use reader::Index;
pub use tree::{Entry, Node, NodeId, Tree};
pub use update::{Summary, UpdateError, update};
