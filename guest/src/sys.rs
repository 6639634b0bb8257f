//! What needs `unsafe` in this program: work between fork and exec, and real-time signals.
#![allow(unsafe_code)] // The two calls below have no safe counterpart in std or nix.

use nix::{errno::Errno, libc, sys::stat::Mode};
use seccompiler::BpfProgram;
use std::io;

/// Makes the command start in a session of its own, as likely a victim of the OOM killer as any program (the agent
/// is spared, and its children would inherit that), and behind `filter`.
pub(crate) fn isolate(command: &mut tokio::process::Command, filter: Option<BpfProgram>) {
    let prepare = move || -> io::Result<()> {
        nix::unistd::setsid()?;
        // Not there in a test's sandbox; nothing depends on it.
        if let Ok(file) =
            nix::fcntl::open(c"/proc/self/oom_score_adj", nix::fcntl::OFlag::O_WRONLY, Mode::empty())
        {
            let _ = nix::unistd::write(&file, b"0");
        }
        if let Some(filter) = &filter {
            seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child. It makes system calls only and takes no lock: the paths are
    // literals, the filter was built before, and its copy is in the child's memory.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Sends systemd as PID 1 the real-time signal `SIGRTMIN + offset` (systemd(1), "Signals").
pub(crate) fn signal_systemd(offset: i32) -> io::Result<()> {
    // SAFETY: kill takes numbers and touches no memory.
    let result = unsafe { libc::kill(1, libc::SIGRTMIN() + offset) };
    Ok(Errno::result(result).map(drop)?)
}
