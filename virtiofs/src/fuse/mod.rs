//! The FUSE server: bytes of a request in, bytes of a reply out. It knows nothing of virtqueues and opens no files,
//! so it can be driven directly, by tests and fuzzers.
//!
//! Everything in a request comes from the guest and may be hostile. What a request answers depends on the request and the
//! view alone; what is remembered is in [`Session`] and [`Denied`].

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod attr;
mod denied;
mod init;
mod listing;
mod opcode;
mod server;
mod session;
pub mod wire;

pub use denied::{DENIED_MAX, Denied};
pub use opcode::{Opcode, Treatment};
pub use server::{FileRead, Outcome, Request, Server, TreeCache};
pub use session::Session;
