//! What a hypervisor is told and what it tells; [`qemu`] is the driver.
//!
//! All of it is data: a [`Machine`] is everything that a driver may know of a VM. No string of a fleet file
//! reaches a hypervisor but through a field here, and the driver escapes it.

pub mod ports;
pub mod qemu;

use crate::{
    fleet::units::Size,
    host::{facts::Engine, pci::Address},
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The hardware of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The VM's name.
    pub name: String,
    /// What executes it.
    pub engine: Engine,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, shared with the store backend.
    pub memory: Size,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// The vhost-user socket of the store backend.
    pub store_socket: PathBuf,
    /// Its request queues.
    pub store_queues: u16,
    /// The vhost-user socket of the vsock device.
    pub vsock_socket: PathBuf,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// Cards of the host that are passed through.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cards: Vec<Card>,
    /// Whether its ports are in the slots that [`ports::Port::slot`] tells. Those of a machine that an earlier `laird` started are where its
    /// hypervisor has put them.
    #[serde(default)]
    pub known_slots: bool,
    /// Room above the guest's memory for windows of cards, if they need more than the hypervisor has by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hole: Option<Size>,
    /// Where the console appears.
    pub console_socket: PathBuf,
    /// Where the hypervisor listens for its control protocol.
    pub control_socket: PathBuf,
}

impl Machine {
    /// How many ports for cards it is started with.
    pub fn ports(&self) -> usize {
        self.cards.len().saturating_add(ports::SPARE_PORTS)
    }
}

/// A virtio-blk device on a raw image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The serial number by which the guest finds it.
    pub serial: String,
    /// The image.
    pub image: PathBuf,
}

/// A card of the host: in the guest as well its functions are one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Its functions, in order.
    pub functions: Vec<Address>,
}

/// What the hypervisor has reported by itself since the control connection was made. It grows neither with time nor with a guest that
/// reboots in a loop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heard {
    /// How often the guest rebooted itself.
    pub reboots: u64,
    /// The guest powered itself off.
    pub power_off: bool,
    /// The guest's kernel panicked.
    pub panic: bool,
    /// The control connection ended.
    pub lost: bool,
}
