//! What a process of a VM may have: its user and groups, its cgroup, limits, open descriptors.

use nix::sys::resource::{Resource, getrlimit};
use std::{fs::File, os::fd::OwnedFd};

/// What a process is left with. Besides, none gets a core file, new privileges, `laird`'s environment or its open files.
#[derive(Debug, Default)]
pub struct Confinement {
    /// Whom it becomes; none where `laird` is not root, or the program does that itself.
    pub identity: Option<Identity>,
    /// Where it enters its cgroup: [`crate::cgroup::VmCgroup::entrance`].
    pub cgroup: Option<File>,
    /// Limits of the process itself.
    pub limits: Rlimits,
    /// Descriptors that it keeps, under the numbers that they have here.
    pub keep: Vec<OwnedFd>,
}

/// A user and its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Further groups: that of a device that it uses.
    pub groups: Vec<u32>,
}

/// Limits of one process (setrlimit(2)). What is none stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rlimits {
    /// Open descriptors.
    pub files: Option<u64>,
    /// The size of files that it writes, in bytes. A process that writes more is killed.
    pub file_size: Option<u64>,
    /// Memory that it may lock, in bytes.
    pub locked: Option<u64>,
}

impl Rlimits {
    /// `files` descriptors, or as many as this process may allow.
    pub fn with_files(self, files: u64) -> Self {
        let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(files, |(_, hard)| hard);
        let most = if nix::unistd::geteuid().is_root() { files } else { files.min(hard) };
        Self { files: Some(most), ..self }
    }
}
