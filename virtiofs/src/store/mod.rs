//! Nix stores of the host: paths, databases, closures, registrations.

pub mod closure;
pub mod database;
pub mod path;
pub mod registration;

use std::path::PathBuf;

/// A Nix store of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The directory that holds the store paths.
    pub store: PathBuf,
    /// The directory that holds `db.sqlite`.
    pub database: PathBuf,
}
