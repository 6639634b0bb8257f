//! Why a step fails.

use crate::{
    cgroup::CgroupError,
    fleet::limits::OverBudget,
    host::{ids::IdsError, listen::ListenError, process::ProcessError, thread::ThreadError, tools::Missing},
    hypervisor::{ports::NoPort, qemu::qmp::QmpError},
    passthrough::{DevicesError, window::NoRoom},
    shim::client::ClientError,
    state::{dirs::DirsError, file::WriteError},
    vm::{generation::GenerationError, part::Part, plan::PlanError},
};
use lair_guest::initramfs;
use std::{io, path::PathBuf, time::Duration};

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The fleet file has no such VM any more.
    #[error("The fleet file has no VM of this name")]
    NotInFleet,
    /// The view cannot be made.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A directory cannot be used.
    #[error(transparent)]
    Dirs(#[from] DirsError),
    /// There is no thread for it.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// There are no users for it.
    #[error(transparent)]
    Ids(#[from] IdsError),
    /// It cannot be limited.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It does not get its devices.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// It has no room for its devices.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It has no port for its devices.
    #[error("It cannot have its devices while it runs: {0}")]
    NoPort(#[from] NoPort),
    /// There is no memory for its devices.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// Its hypervisor may not lock the guest's memory.
    #[error("Cannot let process {pid} lock {bytes} bytes of memory")]
    Lock {
        /// The hypervisor.
        pid: i32,
        /// How much it needs to lock.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket for it cannot be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A program is missing.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A volume cannot be made.
    #[error("Cannot make the volume {path}: {reason}")]
    Volume {
        /// The image.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The view's metadata cannot be indexed.
    #[error("Cannot index the view {view}: {reason}")]
    Index {
        /// The view file.
        view: PathBuf,
        /// What was said about it.
        reason: String,
    },
    /// The initramfs cannot be made.
    #[error("Cannot make the initramfs")]
    Initramfs(#[from] initramfs::InitramfsError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file cannot be read.
    #[error("Cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// A process cannot be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A process ended at once, or does not do what it is for.
    #[error("{part} did not start: {reason}{log}")]
    NotUp {
        /// Which.
        part: Part,
        /// What was seen.
        reason: String,
        /// The end of its log, on lines of its own.
        log: String,
    },
    /// QEMU does not obey.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The shim does not obey.
    #[error(transparent)]
    Shim(#[from] ClientError),
    /// It takes too long.
    #[error("It was not done within {0:?}, and was given up")]
    Overdue(Duration),
    /// Something else was asked for meanwhile.
    #[error("It was cancelled")]
    Cancelled,
    /// A task of ours was lost.
    #[error("Internal error: a task ended without a result")]
    Lost,
}
