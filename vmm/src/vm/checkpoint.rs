//! Named points in a VM's life at which a test can kill `laird`. A release build has none.

/// A point has been reached.
#[cfg(not(debug_assertions))]
pub(crate) fn reach(_name: &str) {}

/// A point has been reached. With `LAIR_CHECKPOINTS=FILE` its name is appended to that file; with `LAIR_KILL_AT=N` the process kills
/// itself at the Nth point, as hard as anybody could.
#[cfg(debug_assertions)]
pub(crate) fn reach(name: &str) {
    use std::{
        io::Write,
        sync::atomic::{AtomicU64, Ordering::Relaxed},
    };
    static REACHED: AtomicU64 = AtomicU64::new(1);
    let variable = |name: &str| std::env::var(name).ok();
    let number = REACHED.fetch_add(1, Relaxed);
    if let Some(file) = variable("LAIR_CHECKPOINTS")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(file)
    {
        let _ = writeln!(file, "{name}");
    }
    if variable("LAIR_KILL_AT").and_then(|at| at.parse().ok()) == Some(number) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    }
}
