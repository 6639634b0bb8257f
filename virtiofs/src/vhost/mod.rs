//! The vhost-user-fs device: connections of a hypervisor, virtqueues of its guest.
//!
//! Both peers may be hostile. What a guest does wrong costs it the request (a used length of 0) or the queue (nothing more is
//! taken from it until it is set up anew); what a hypervisor does wrong costs it the connection.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod chain;
mod cold;
mod config;
mod device;
#[cfg(feature = "fuzzing")]
#[allow(clippy::expect_used)] // As in the fuzzers.
pub(crate) mod fuzzing;
mod queue;
mod regions;
mod ring;
mod sample;
mod serve;
mod spin;
mod trail;
mod vring;

pub use config::{Config, ConfigError};
pub use serve::{ServeError, serve};
pub use trail::fetch;

use crate::{
    files::Files,
    fuse::Server,
    stats::{Events, Requests},
    throttle::Throttle,
};
use cold::Pool;
use std::sync::Arc;

/// The largest queue, in descriptors.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// What outlives connections: the index, open files, counters.
#[derive(Debug)]
pub struct Service {
    /// Answers requests.
    pub server: Server,
    /// Reads files.
    pub files: Files,
    /// What is counted, by queue.
    pub requests: Vec<Arc<Requests>>,
    /// What is counted besides.
    pub events: Events,
    /// For lines about what the guest or the hypervisor does wrong.
    pub(crate) trouble: Throttle,
    /// Waits for disks.
    pool: Pool,
}

impl Service {
    /// A service of what `server` knows, with the store directories from which its tree was built.
    /// The device will be what `config` says.
    pub fn new(server: Server, files: Files, config: &Config) -> Self {
        let requests = (0..config.queues()).map(|_| Arc::default()).collect();
        Self {
            server,
            files,
            requests,
            events: Events::default(),
            trouble: Throttle::new(),
            pool: Pool::new(),
        }
    }
}
