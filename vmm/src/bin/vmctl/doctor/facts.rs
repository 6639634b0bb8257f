//! What is known of a host before it is judged.

use lair_vmm::{
    api::gpus::GpusReply,
    cgroup::NoCgroups,
    fleet::{limits::HostFacts, schema},
    host::{facts::NoKvm, tools::Tool},
};
use std::path::PathBuf;

/// All that is looked at.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) root: bool,
    pub(super) user: String,
    pub(super) fleet: FleetFile,
    pub(super) kvm: Result<(), NoKvm>,
    pub(super) host: Result<HostFacts, String>,
    pub(super) swaps: Vec<Swap>,
    /// Whether the kernel looks for equal pages.
    pub(super) ksm: bool,
    /// As `uname -r` says it.
    pub(super) kernel: String,
    pub(super) command_line: String,
    /// Whether VFIO takes devices on hosts that cannot keep their interrupts apart.
    pub(super) unsafe_interrupts: bool,
    pub(super) iommu_groups: usize,
    /// Whether `/dev/vfio/vfio` is there.
    pub(super) vfio: bool,
    /// Whether VFIO takes devices that no IOMMU holds back.
    pub(super) no_iommu_mode: bool,
    pub(super) vfio_pci: Driver,
    pub(super) gpus: Result<GpusReply, String>,
    /// The controllers of the topmost cgroup.
    pub(super) cgroups: Result<Vec<String>, NoCgroups>,
    pub(super) landlock: bool,
    pub(super) seccomp: bool,
    /// Others that have numbers of the range for VMs' processes.
    pub(super) clashes: Vec<String>,
    /// The group `lair` and who is in it.
    pub(super) group: Option<Vec<String>>,
    /// The hard limit for open descriptors: of the unit where there is one, otherwise of this process.
    pub(super) descriptors: u64,
    pub(super) programs: Vec<Program>,
    pub(super) run: Directory,
    pub(super) state: Directory,
    /// Directories of VMs that are on another file system than the state directory.
    pub(super) elsewhere: Vec<PathBuf>,
    /// Whether journald listens.
    pub(super) journal: bool,
    /// Whether systemd runs this host.
    pub(super) systemd: bool,
    pub(super) unit: Option<Unit>,
    pub(super) laird: Laird,
}

/// A driver of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Driver {
    Loaded,
    /// Its module is there.
    Loadable,
    Missing,
}

/// The fleet file.
#[derive(Debug)]
pub(super) struct FleetFile {
    pub(super) path: PathBuf,
    pub(super) content: FleetContent,
    /// What it says of the host; what holds without it otherwise.
    pub(super) host: schema::Host,
}

/// What is in the fleet file.
#[derive(Debug)]
pub(super) enum FleetContent {
    Missing,
    /// The first problem, and how many more there are: it is no fleet file.
    Wrong(String, usize),
    /// The same, where it is a fleet file and the host lacks what it names.
    Lacking(String, usize),
    /// So many VMs.
    Good(usize),
}

/// A swap area.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Swap {
    pub(super) path: String,
    /// In bytes.
    pub(super) size: u64,
}

/// A program that Lair runs.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) tool: Tool,
    pub(super) found: Found,
}

/// What came of looking for a program.
#[derive(Debug)]
pub(super) enum Found {
    Nowhere,
    /// Where it is, and what it says its version is.
    At(PathBuf, String),
    /// Where it is, and why it does not run.
    Broken(PathBuf, String),
}

/// A directory of `laird`.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) seen: Seen,
}

/// What there is of a directory.
#[derive(Debug)]
pub(super) enum Seen {
    /// Nothing; what there is above it is told.
    Missing(Space),
    NoDirectory,
    Unknown(String),
    There {
        uid: u32,
        mode: u32,
        ours: bool,
        space: Space,
    },
}

/// A file system.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space {
    /// For those who are not root, in bytes.
    pub(super) free: u64,
    pub(super) read_only: bool,
    /// Whether it is gone with this boot.
    pub(super) memory: bool,
}

/// What systemd knows of the unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) active: String,
    pub(super) kill_mode: String,
    pub(super) delegate: bool,
    pub(super) descriptors: u64,
}

/// What comes of asking `laird`.
#[derive(Debug)]
pub(super) enum Laird {
    /// Its version.
    Answers(String),
    Down(PathBuf),
    Denied(PathBuf),
    Odd(String),
}
