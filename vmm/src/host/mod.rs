//! What the host is and has: its processes, its programs, its facts.

mod child;
pub mod confine;
pub mod facts;
pub mod ids;
pub mod listen;
pub mod logging;
pub mod memory;
pub mod mounts;
pub mod pci;
pub mod process;
pub mod thread;
pub mod tools;

use crate::{cgroup::Hierarchy, fleet::limits::HostFacts, passthrough::Devices, vm::limits::Happened};
use std::sync::Arc;
use tokio::sync::broadcast;

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
    /// Where VMs get their cgroups; none where the fleet file does without limits.
    pub cgroups: Option<Hierarchy>,
    /// Users and groups of VMs' processes; none where all share the user of `laird`, since that is not root.
    pub ids: Option<Arc<ids::Ids>>,
    /// How many bits an address of its memory has, if that is known.
    pub address_bits: Option<u32>,
    /// Where its devices are seen.
    pub sysfs: pci::Sysfs,
    /// Those that VMs have.
    pub devices: Arc<Devices>,
    /// What happens to VMs' cgroups.
    pub happened: broadcast::Sender<Happened>,
}

/// A way for [`Host::happened`]: whoever listens too slowly misses the oldest.
pub fn happenings() -> broadcast::Sender<Happened> {
    broadcast::channel(64).0
}

/// A host for tests, which has no programs, and devices that nobody has taken.
#[cfg(test)]
pub(crate) fn example(facts: HostFacts, dirs: &crate::state::dirs::Dirs) -> Host {
    let (sysfs, boot_id) = (pci::Sysfs::of_this_host(), "boot".to_owned());
    let writer = crate::passthrough::write::Writer::of_this_program();
    Host {
        facts,
        engine: facts::Engine::Tcg,
        tools: tools::Tools { directories: vec![] },
        cgroups: None,
        ids: None,
        address_bits: None,
        devices: Devices::open(sysfs.clone(), dirs, &boot_id, writer),
        sysfs,
        boot_id,
        happened: happenings(),
    }
}
