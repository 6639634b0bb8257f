//! What this program may do once it serves: read what lies beneath the directories that it was given, answer those who
//! connect, and nothing else.
//!
//! All that needs more is done before: sockets made, directories opened, metadata read. Then [`Sandbox::close`] gives the
//! rest up for good, and [`restrict_worker`] gives up more in the threads that touch what a guest wrote. Nothing turns it off.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod calls;
mod files;
mod identity;
mod limits;
mod seccomp;
mod threads;

pub use identity::{Identity, IdentityError};
pub use seccomp::{restrict_like_worker, restrict_worker};

use crate::beneath;
use landlock::RulesetCreated;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::prctl,
    unistd::{getegid, geteuid},
};
use seccomp::Filters;
use seccompiler::BackendError;
use std::{
    fmt::Debug,
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    time::Instant,
};
use thiserror::Error;
use tracing::{info, warn};

/// Why the sandbox cannot be closed. Nothing may be served then.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The kernel has no Landlock.
    #[error(
        "This kernel offers no Landlock, and without it nothing is served; what is needed is Linux 5.13 or later with \
         CONFIG_SECURITY_LANDLOCK, and landlock in the list of security modules (kernel parameter lsm=)"
    )]
    NoLandlock,
    /// Landlock refused the rules.
    #[error("Cannot confine file accesses (Landlock)")]
    Landlock(#[source] landlock::RulesetError),
    /// The kernel has no seccomp, or refused a filter.
    #[error(
        "Cannot confine system calls (seccomp), and without that nothing is served; what is needed is a kernel with \
         CONFIG_SECCOMP_FILTER, and a container runtime that allows seccomp(2)"
    )]
    Seccomp(#[source] io::Error),
    /// The lists make no filter.
    #[error("Cannot compile the filters of system calls for this architecture")]
    Filters(#[source] BackendError),
    /// Fewer files may be open than can be needed.
    #[error(
        "{needed} files can be needed open at once, and this process may have {hard}; raise its hard limit (ulimit -Hn, \
         LimitNOFILE= of systemd)"
    )]
    OpenFiles {
        /// How many are needed.
        needed: u64,
        /// How many are allowed.
        hard: u64,
        /// Why that cannot be changed.
        source: Errno,
    },
    /// A limit cannot be set.
    #[error("Cannot limit {what} to {value}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// How much was to be allowed.
        value: u64,
        /// Why.
        source: Errno,
    },
    /// What the kernel tells of this process cannot be read.
    #[error("Cannot read what /proc/self says of memory and threads")]
    Proc(#[source] io::Error),
    /// Landlock and capabilities belong to threads, and there is more than this one.
    #[error("Cannot confine a process with {0} threads; it has to be done while there is one")]
    Threads(usize),
    /// Privileges cannot be given up.
    #[error("Cannot give up {what}")]
    Privileges {
        /// Which.
        what: &'static str,
        /// Why.
        source: Errno,
    },
    /// The ids cannot be changed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Whoever the program has become, it may not enter a directory.
    #[error(
        "uid {uid} with gid {gid} may not enter {path}, which it is to serve; allow it to all, or give another --uid and --gid"
    )]
    Directory {
        /// Who.
        uid: u32,
        /// Their group.
        gid: u32,
        /// The directory.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
}

/// All that can be checked and made beforehand, for directories with these descriptors.
#[derive(Debug)]
pub struct Sandbox<'a> {
    directories: Vec<(&'a Path, BorrowedFd<'a>)>,
    identity: Identity,
    ruleset: RulesetCreated,
    filters: Filters,
}

impl<'a> Sandbox<'a> {
    /// Prepares a sandbox in which files beneath `directories` (their names and descriptors) can be read by `identity`. Finds
    /// out whether the kernel can do it. Changes nothing yet.
    pub fn prepare(
        directories: impl IntoIterator<Item = (&'a Path, BorrowedFd<'a>)>,
        identity: Identity,
    ) -> Result<Self, SandboxError> {
        let directories: Vec<_> = directories.into_iter().collect();
        let ruleset = files::only_beneath(directories.iter().map(|(_, fd)| *fd))?;
        let filters = Filters::compile().map_err(SandboxError::Filters)?;
        Ok(Self { directories, identity, ruleset, filters })
    }

    /// Gives up all else, for all of the process and for good. To be called while it has one thread; an error leaves it half
    /// closed, so that it can only end.
    pub fn close(self) -> Result<(), SandboxError> {
        let begin = Instant::now();
        threads::only_this_one()?;
        limits::set(self.directories.len())?;
        let give_up = |what| move |source| SandboxError::Privileges { what, source };
        prctl::set_no_new_privs().map_err(give_up("gaining privileges"))?;
        self.identity.assume()?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        // After the change of ids, which sets it as the host's settings have it.
        prctl::set_dumpable(false).map_err(give_up("being traced"))?;
        self.ruleset.restrict_self().map_err(SandboxError::Landlock)?;
        self.filters.apply().map_err(SandboxError::Seccomp)?;
        for (path, fd) in self.directories {
            beneath::open(fd, &[], OFlag::O_PATH | OFlag::O_DIRECTORY)
                .map_err(|source| SandboxError::Directory { uid, gid, path: path.into(), source })?;
        }
        match self.identity {
            Identity::Own { .. } => {}
            Identity::Shared => {
                warn!("uid {uid} is shared with whatever else runs as it; give --uid and --gid")
            }
            Identity::Unchanged => {
                info!("uid {uid} stays, with what it may do; only root can give this program one of its own")
            }
        }
        info!(uid, gid, microseconds = begin.elapsed().as_micros(), "Closed the sandbox");
        Ok(())
    }
}
