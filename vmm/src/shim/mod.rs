//! `lair-shim`: the process beside each VM that carries what must outlive `laird`. See the README.md here.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`], [`protocol`] | what `laird` writes for a shim, and what is said on its sockets |
//! | [`client`] | how `laird` and `vmctl` speak to a shim |
//! | [`serve`] | the shim itself: start, stop |
//! | `state`, `limits` | what all connections share; every bound in one place |
//! | `outgoing`, `target`, `incoming`, `links`, `carry`, `parting` | links: opened by the guest, reached, ended in the guest; counters; the relay; its end |
//! | `session`, `exec`, `console_view`, `frames`, `half` | operators' sessions: admitted, a command in the guest, the console |
//! | `recorder`, `asciicast`, `retention` | recordings of terminals |
//! | `agent`, `ticket`, `vsock` | the control channel to the guest's agent |
//! | `guest`, `clock`, `devices` | what the guest says of itself; whether its clock is right; the devices that were passed through to it |
//! | `credentials` | the guest's secrets: given once in a boot, and when they change |
//! | `console`, `output`, `journal` | the console: its log, and what sessions share of it; what the VM's other programs say; the guest's journal |
//! | `ring`, `backlog` | bounded files, and what waits for them |
//! | `audit`, `note`, `rate`, `worker` | the audit log and standard error, at a bounded rate, off the relay's thread |
//! | `socket`, `fd`, `message`, `files` | sockets by path, descriptors, first messages, small files |

mod agent;
mod asciicast;
mod audit;
mod backlog;
mod carry;
pub mod client;
mod clock;
pub mod config;
mod console;
mod console_view;
mod control;
mod credentials;
mod devices;
mod exec;
mod fd;
mod files;
mod frames;
mod guest;
mod half;
mod incoming;
mod journal;
mod limits;
mod links;
mod message;
mod note;
mod outgoing;
pub mod output;
mod parting;
pub mod protocol;
pub(crate) mod rate;
mod recorder;
mod retention;
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
