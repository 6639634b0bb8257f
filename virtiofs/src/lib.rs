//! `lair-virtiofs`: shows a guest its view of a Nix store, read-only, over vhost-user.
//!
//! | module | what is in it |
//! |---|---|
//! | [`store`] | store paths, Nix databases, closures, registrations |
//! | [`view`] | the set of store paths that one guest may see, as a file |
//! | [`index`] | the metadata of store paths in flat arrays |
//! | [`fuse`] | the protocol, and a server that answers from the index; no I/O |
//! | [`vhost`] | the device: virtqueues, connections; and file contents |
//! | [`stats`] | counters of requests |
//! | [`control`] | the control socket |
//! | [`quiet`] | a log that a guest cannot flood |

pub mod control;
pub mod fuse;
pub mod index;
pub mod quiet;
pub mod stats;
pub mod store;
pub mod vhost;
pub mod view;
