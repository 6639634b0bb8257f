//! The vhost-user-fs device: connections of a hypervisor, virtqueues of its guest.
//!
//! Both peers may be hostile. What a guest does wrong costs it the request (a used length of 0) or the queue (nothing more is
//! taken from it until it is set up anew); what a hypervisor does wrong costs it the connection.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod chain;
mod cold;
mod config;
mod device;
mod queue;
mod ring;
mod serve;
mod spin;

pub use config::{Config, ConfigError};
pub use serve::{ServeError, serve};

use crate::{files::Files, fuse::Server, throttle::Throttle};
use cold::Pool;

/// The largest queue, in descriptors.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// What outlives connections: the index, open files, counters.
#[derive(Debug)]
pub struct Service {
    /// Answers requests.
    pub server: Server,
    /// Reads files.
    pub files: Files,
    /// For lines about what the guest or the hypervisor does wrong.
    pub(crate) trouble: Throttle,
    /// Waits for disks.
    pool: Pool,
}

impl Service {
    /// A service of what `server` knows, with the store directories from which its tree was built.
    pub fn new(server: Server, files: Files) -> Self {
        Self { server, files, trouble: Throttle::new(), pool: Pool::new() }
    }
}
