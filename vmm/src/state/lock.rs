//! One `laird` for one run directory.

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
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

/// How long another's lock is waited for. A `laird` that was killed has lent it to a child that it had forked and that has not
/// executed its program yet.
const FORKED: Duration = Duration::from_secs(2);

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
    let began = Instant::now();
    let mut file = file;
    let locked = loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => break locked,
            Err((file, Errno::EWOULDBLOCK)) if began.elapsed() < FORKED => file,
            Err((_, Errno::EWOULDBLOCK)) => return Err(LockError::Held(run_dir.to_owned())),
            Err((_, other)) => return Err(LockError::Io(path.clone(), other.into())),
        };
        sleep(Duration::from_millis(20));
    };
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

    #[test]
    fn sv1_a_child_of_a_laird_that_was_killed_holds_up_the_next_one_for_a_moment_only() {
        let directory = tempfile::tempdir().unwrap();
        let child = lock(directory.path()).unwrap();
        let let_go = std::thread::spawn(move || {
            sleep(FORKED / 4);
            drop(child);
        });
        lock(directory.path()).unwrap();
        let_go.join().unwrap();
    }
}
