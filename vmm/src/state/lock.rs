//! One `laird` for one run directory.

use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Held for as long as it lives; the kernel lets go of it however the process ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another `laird` has it.
    #[error("Another laird is running with the run directory {0}")]
    Held(PathBuf),
    /// The lock's file cannot be used.
    #[error("Cannot lock {0}")]
    Io(PathBuf, #[source] io::Error),
}

/// Takes the lock of a run directory, or says who has it.
pub fn lock(run_dir: &Path) -> Result<Lock, LockError> {
    let path = run_dir.join("laird.lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| LockError::Io(path.clone(), e))?;
    let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => LockError::Held(run_dir.to_owned()),
        other => LockError::Io(path.clone(), other.into()),
    })?;
    // For people who look; it is the lock that counts.
    let pid = format!("{}\n", std::process::id());
    locked
        .set_len(0)
        .and_then(|()| locked.write_all_at(pid.as_bytes(), 0))
        .map_err(|e| LockError::Io(path, e))?;
    Ok(Lock(locked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sv7_a_second_instance_is_refused_until_the_first_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let first = lock(directory.path()).unwrap();
        assert!(matches!(lock(directory.path()), Err(LockError::Held(_))));
        drop(first);
        lock(directory.path()).unwrap();
    }
}
