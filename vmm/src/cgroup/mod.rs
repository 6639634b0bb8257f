//! cgroup v2: what the processes of one VM may take of the host together, and how they all end together.
//!
//! [`values`] and [`parse`] are pure; the rest reads and writes the files of a hierarchy, whose place is a parameter. See the README
//! beside this file.
//!
//! Why not `cgroups-rs` (0.5): it has no `memory.oom.group`, writes `io.max` a field at a time and reads nothing back, and finds the
//! hierarchy at one fixed place only, so that none of it can be tried on a host without controllers. About ten small files are all that
//! is needed.

mod devices;
#[cfg(test)]
pub(crate) mod fake;
mod file;
mod group;
mod hierarchy;
mod kill;
pub mod parse;
#[cfg(test)]
mod real;
pub mod values;
mod watch;

pub use devices::backing;
pub use group::{Fault, Usage, VmCgroup};
pub use hierarchy::{Hierarchy, NoCgroups, available};
pub use watch::{Event, Watcher};

use parse::ParseError;
use std::{io, path::PathBuf};

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It could not be made.
    #[error("Cannot make the cgroup {0}")]
    Make(PathBuf, #[source] io::Error),
    /// One of its files could not be read.
    #[error("Cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// One of its files is not as the kernel writes it.
    #[error("{0} {1}")]
    Damaged(PathBuf, ParseError),
    /// The kernel refused a value.
    #[error("Cannot write \"{value}\" to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel took a value and made another of it.
    #[error("{path} is \"{found}\" after \"{value}\" was written to it")]
    Altered {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// What it is.
        found: String,
    },
    /// It is still there after all attempts to remove it.
    #[error("cgroup-leak: {path} cannot be removed: {reason}")]
    Leak {
        /// The cgroup.
        path: PathBuf,
        /// What holds it.
        reason: String,
    },
    /// It cannot be watched.
    #[error("Cannot watch {0}")]
    Watch(PathBuf, #[source] io::Error),
}

impl CgroupError {
    /// Whether the cgroup is not there any more.
    pub fn is_gone(&self) -> bool {
        let (Self::Read(_, error) | Self::Watch(_, error) | Self::Write { source: error, .. }) = self else {
            return false;
        };
        file::gone(error)
    }
}
