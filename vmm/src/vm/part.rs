//! What a start is made of: its steps, the processes that it leaves running, and the stages of an end.

use serde::{Deserialize, Serialize};

/// The steps of a start, in order. Each is idempotent; [`super::machine::Action::CleanUp`] undoes them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Computes the closure of the roots and writes the view and its registration.
    View,
    /// Makes the directories.
    Directories,
    /// Has the view's metadata indexed.
    Index,
    /// Makes and formats volumes that are missing.
    Volumes,
    /// Writes the initramfs.
    Initramfs,
    /// Takes the devices that it asks for: bound, reset, verified.
    Devices,
    /// Starts `lair-virtiofs`.
    StoreBackend,
    /// Starts `vhost-device-vsock`.
    VsockDevice,
    /// Starts the hypervisor, paused.
    Hypervisor,
    /// Starts `lair-shim`.
    Shim,
    /// Lets the guest run, once its console is connected.
    Resume,
}

impl Step {
    /// The first step.
    pub const FIRST: Self = Self::View;

    /// The step after this one.
    pub fn next(self) -> Option<Self> {
        match self {
            Self::View => Some(Self::Directories),
            Self::Directories => Some(Self::Index),
            Self::Index => Some(Self::Volumes),
            Self::Volumes => Some(Self::Initramfs),
            Self::Initramfs => Some(Self::Devices),
            Self::Devices => Some(Self::StoreBackend),
            Self::StoreBackend => Some(Self::VsockDevice),
            Self::VsockDevice => Some(Self::Hypervisor),
            Self::Hypervisor => Some(Self::Shim),
            Self::Shim => Some(Self::Resume),
            Self::Resume => None,
        }
    }

    /// One word, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Directories => "directories",
            Self::Index => "index",
            Self::Volumes => "volumes",
            Self::Initramfs => "initramfs",
            Self::Devices => "devices",
            Self::StoreBackend => "store_backend",
            Self::VsockDevice => "vsock_device",
            Self::Hypervisor => "hypervisor",
            Self::Shim => "shim",
            Self::Resume => "resume",
        }
    }

    /// Whether processes of the VM run during it. What fails before is the host's or the fleet file's fault, and would fail
    /// again.
    pub fn runs_processes(self) -> bool {
        self.part().is_some() || self == Self::Resume
    }

    /// The process that it starts.
    pub fn part(self) -> Option<Part> {
        match self {
            Self::StoreBackend => Some(Part::StoreBackend),
            Self::VsockDevice => Some(Part::VsockDevice),
            Self::Hypervisor => Some(Part::Hypervisor),
            Self::Shim => Some(Part::Shim),
            Self::View
            | Self::Directories
            | Self::Index
            | Self::Volumes
            | Self::Initramfs
            | Self::Devices
            | Self::Resume => None,
        }
    }
}

/// The processes of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// QEMU.
    Hypervisor,
    /// `lair-virtiofs`.
    StoreBackend,
    /// `vhost-device-vsock`.
    VsockDevice,
    /// `lair-shim`.
    Shim,
}

impl Part {
    /// All of them: without any of these a guest does not run.
    pub const ALL: [Self; 4] = [Self::Hypervisor, Self::StoreBackend, Self::VsockDevice, Self::Shim];

    /// One word for logs' names and tags.
    pub fn word(self) -> &'static str {
        match self {
            Self::Hypervisor => "hypervisor",
            Self::StoreBackend => "store",
            Self::VsockDevice => "vsock",
            Self::Shim => "shim",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Hypervisor => "the hypervisor",
            Self::StoreBackend => "lair-virtiofs",
            Self::VsockDevice => "vhost-device-vsock",
            Self::Shim => "lair-shim",
        })
    }
}

/// How hard a guest is asked to end. Each stage has a deadline, after which the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The agent is asked to power off.
    Agent,
    /// The power button is pressed.
    PowerButton,
    /// The hypervisor is told to end (SIGTERM).
    Terminate,
    /// The hypervisor is killed (SIGKILL).
    Kill,
}

impl Stage {
    /// The next harder stage.
    pub fn next(self) -> Option<Self> {
        match self {
            Self::Agent => Some(Self::PowerButton),
            Self::PowerButton => Some(Self::Terminate),
            Self::Terminate => Some(Self::Kill),
            Self::Kill => None,
        }
    }
}
