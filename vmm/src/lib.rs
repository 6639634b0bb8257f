//! The supervisor of a Lair host: what `laird`, `vmctl` and `lair-shim` are made of.
//!
//! | module | what is in it |
//! |---|---|
//! | [`fleet`] | the fleet file: schema, loading, validation (pure but for reading files) |
//! | [`host`] | the host: processes, programs, facts |
//! | [`state`] | what is on disk |
//! | [`shim`] | `lair-shim`: links, sessions, console log of one VM; and the protocol to it |

pub mod fleet;
pub mod host;
pub mod shim;
pub mod state;
