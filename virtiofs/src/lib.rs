//! A view of a Nix store for one VM: its closure, its metadata, and the vhost-user-fs device that shows it, read-only.
//!
//! The parts, from the outside in: [`vhost`] talks to the hypervisor and takes requests from the guest's virtqueues,
//! [`fuse`] answers them, [`index`] is the metadata that it answers from, [`files`] reads contents. [`view`] and
//! [`store`] say what is shown; the supervisor uses them too.

pub mod arguments;
mod beneath;
pub(crate) mod buffers;
pub mod control;
pub mod error;
pub mod fd;
pub mod files;
pub mod fuse;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod index;
pub mod sandbox;
pub mod stats;
pub mod store;
pub mod throttle;
pub mod vhost;
pub mod view;
