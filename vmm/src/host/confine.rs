//! What a process of a VM may have: its user and groups, its cgroup, limits, open descriptors.

use nix::sys::resource::{Resource, getrlimit};
use rustix::process::{Pid, Rlimit, prlimit};
use std::{fs::File, io, os::fd::OwnedFd};

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

    /// `bytes` of locked memory, or as many as this process may allow.
    pub fn with_locked(self, bytes: u64) -> Self {
        let hard = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(bytes, |(_, hard)| hard);
        let most = if bytes <= hard || may_raise_limits() { bytes } else { hard };
        if most < bytes {
            tracing::warn!(
                bytes,
                most,
                "a process may lock less memory than it needs: LimitMEMLOCK= of laird's unit, or CAP_SYS_RESOURCE"
            );
        }
        Self { locked: Some(most), ..self }
    }
}

/// Lets a process that runs lock so many bytes of memory.
pub fn let_lock(pid: i32, bytes: u64) -> io::Result<()> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    prlimit(Some(pid), rustix::process::Resource::Memlock, limit)?;
    Ok(())
}

/// Whether this process has CAP_SYS_RESOURCE, bit 24 of its effective capabilities.
fn may_raise_limits() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|bits| bits >> 24 & 1 == 1)
}
