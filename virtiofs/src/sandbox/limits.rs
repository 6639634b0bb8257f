//! Resource limits. None of them may be raised again without privileges.

use super::SandboxError;
use crate::{
    files::{OPEN_MAX, RECENT_MAX},
    vhost::Config,
};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{SysconfVar, sysconf},
};
use std::io;

/// Memory regions of a guest, each with a descriptor: as many as the vhost-user library takes.
const REGIONS: u64 = 509;

/// Descriptors of each queue: for its kicks, calls and errors, and for its worker's end and epoll.
const PER_QUEUE: u64 = 6;

/// Descriptors of the program itself, of a connection, and of a message that is just being received (32).
const OTHERS: u64 = 256;

/// How much private memory may come to what there is at the start, in bytes. What is shared does not count: neither guest
/// memory nor mapped files and indexes. Each thread's stack counts 2 MiB, touched or not.
const DATA: u64 = 256 << 20;

/// Sets the limits of a process that keeps `directories` descriptors open besides.
pub(super) fn set(directories: usize) -> Result<(), SandboxError> {
    // The request queues, and that of high priority.
    let queues = PER_QUEUE.saturating_mul(u64::from(Config::REQUEST_QUEUES_MAX).saturating_add(1));
    let open = OPEN_MAX.get().saturating_add(RECENT_MAX) as u64;
    let files = [open, REGIONS, queues, OTHERS, directories as u64];
    open_files(files.into_iter().fold(0, u64::saturating_add))?;
    limit(Resource::RLIMIT_DATA, "private memory in bytes", data_in_use()?.saturating_add(DATA))?;
    limit(Resource::RLIMIT_CORE, "core dumps", 0)?;
    limit(Resource::RLIMIT_MEMLOCK, "locked memory", 0)
}

/// Exactly as many as are needed, which may be more than were allowed if root, or whoever may, started the program.
fn open_files(needed: u64) -> Result<(), SandboxError> {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(needed, |(_, hard)| hard);
    setrlimit(Resource::RLIMIT_NOFILE, needed, needed).map_err(|source| SandboxError::OpenFiles {
        needed,
        hard,
        source,
    })
}

/// One who may have less already keeps that.
fn limit(resource: Resource, what: &'static str, value: u64) -> Result<(), SandboxError> {
    let value = getrlimit(resource).map_or(value, |(_, hard)| value.min(hard));
    setrlimit(resource, value, value).map_err(|source| SandboxError::Limit { what, value, source })
}

/// Bytes of private memory that count against RLIMIT_DATA: proc(5), the sixth field of statm, in pages.
fn data_in_use() -> Result<u64, SandboxError> {
    let text = std::fs::read_to_string("/proc/self/statm").map_err(SandboxError::Proc)?;
    let field = text.split_whitespace().nth(5).and_then(|field| field.parse::<u64>().ok());
    let pages = field.ok_or_else(|| SandboxError::Proc(io::ErrorKind::InvalidData.into()))?;
    let page =
        sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|n| u64::try_from(n).ok()).unwrap_or(4096);
    Ok(pages.saturating_mul(page))
}
