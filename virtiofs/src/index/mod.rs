//! The metadata of what is served: one immutable [`Manifest`] per store path, and the [`Tree`] of a view.
//!
//! A store path's contents never change, so all its metadata is read once. After that only file contents are read.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod build;
mod bytes;
mod load;
mod manifest;
mod slot;
mod tree;

pub use build::{Identity, IndexError};
pub use manifest::{Inode, Kind, Manifest, ManifestError};
pub use tree::{Entry, Node, NodeId, Tree};
