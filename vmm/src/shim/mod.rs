//! `lair-shim`: the process beside each VM that carries what must outlive `laird`. See the README.md here.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`], [`protocol`] | what `laird` writes for a shim, and what is said on its sockets |
//! | [`client`] | how `laird` and `vmctl` speak to a shim |
//! | [`serve`] | the shim itself: start, stop |
//! | `state`, `limits` | what all connections share; every bound in one place |
//! | `outgoing`, `target`, `incoming`, `links`, `carry` | links: opened by the guest, reached, ended in the guest; counters; the relay |
//! | `session`, `frames` | operators' sessions |
//! | `agent`, `ticket`, `vsock` | the control channel to the guest's agent |
//! | `console`, `output`, `ring`, `backlog` | the console log, and what the VM's other programs say |
//! | `audit`, `note`, `rate`, `worker` | the audit log and standard error, at a bounded rate, off the relay's thread |
//! | `socket`, `fd`, `message`, `files` | sockets by path, descriptors, first messages, small files |

mod agent;
mod audit;
mod backlog;
mod carry;
pub mod client;
pub mod config;
mod console;
mod control;
mod fd;
mod files;
mod frames;
mod incoming;
mod limits;
mod links;
mod message;
mod note;
mod outgoing;
pub mod output;
pub mod protocol;
pub(crate) mod rate;
mod ring;
pub mod serve;
mod session;
mod socket;
mod state;
mod target;
mod ticket;
mod vsock;
mod worker;

pub use files::FileError;
pub use socket::{LONGEST_PATH, SocketError};
