//! What the host is and has: its processes, its programs, its facts.

pub mod facts;
pub mod logging;
pub mod process;
pub mod tools;

use crate::fleet::limits::HostFacts;

/// The host as `laird` found it when it started.
#[derive(Debug, Clone)]
pub struct Host {
    /// Processors and memory.
    pub facts: HostFacts,
    /// What executes guests.
    pub engine: facts::Engine,
    /// Where its programs are.
    pub tools: tools::Tools,
    /// The kernel's id of this boot.
    pub boot_id: String,
}
