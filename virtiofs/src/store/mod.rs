//! Nix stores on the host: store paths, sources, their databases, closures and registrations.
//!
//! Everything here only reads. A store path is *logical* (`/nix/store/HASH-NAME`) whatever directory holds its files.

mod closure;
mod database;
mod path;
mod registration;
mod source;

pub use closure::{Closure, ClosureError, closure};
pub use database::{DatabaseError, PathInfo};
pub use path::{STORE_DIR, StorePath, StorePathError};
pub use registration::registration;
pub use source::Source;
