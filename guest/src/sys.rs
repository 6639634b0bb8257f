//! What needs `unsafe` in this program: work between fork and exec, descriptors in the runtime, and real-time signals.
#![allow(unsafe_code)] // The calls below have no safe counterpart in std or nix.

use nix::{
    errno::Errno,
    libc,
    sys::{
        resource::{Resource, setrlimit},
        signal::{self, SigHandler, Signal},
        stat::Mode,
    },
};
use seccompiler::BpfProgram;
use std::{io, os::fd::OwnedFd};
use tokio::io::unix::AsyncFd;

/// The most descriptors of the agent: two for a connection of a link, up to six for a command.
const AGENT_DESCRIPTORS: u64 = 16_384;

/// What every program starts with, and how far it may raise that: systemd's values. More at the start would break
/// programs that use select(2).
const DESCRIPTORS: (u64, u64) = (1024, 524_288);

/// Gives the agent its descriptors: the kernel's 1024 are fewer than its connections.
pub(crate) fn raise_descriptor_limit() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, AGENT_DESCRIPTORS, DESCRIPTORS.1)
}

/// Makes the command start in a session of its own and behind `filter`, with the usual limit of descriptors, no signal ignored, and as
/// likely a victim of the OOM killer as any program: what the agent has for itself, or from whoever started it, is not for its children.
pub(crate) fn isolate(command: &mut tokio::process::Command, filter: Option<BpfProgram>) {
    let prepare = move || -> io::Result<()> {
        nix::unistd::setsid()?;
        for signal in Signal::iterator() {
            // SAFETY: no handler is set. That of SIGKILL and SIGSTOP cannot be, and need not.
            let _ = unsafe { signal::signal(signal, SigHandler::SigDfl) };
        }
        // Neither is worth a command that does not start.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS.0, DESCRIPTORS.1);
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

/// Makes the command's standard input its controlling terminal. It must come after [`isolate`], which gives it the
/// session that such a terminal belongs to.
pub(crate) fn control_terminal(command: &mut tokio::process::Command) {
    let prepare = || -> io::Result<()> { Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?) };
    // SAFETY: the closure runs in the forked child and makes one system call.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Has the runtime tell when a descriptor is ready.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: what is registered owns its descriptor and always gives the same one, until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Sends systemd as PID 1 the real-time signal `SIGRTMIN + offset` (systemd(1), "Signals").
pub(crate) fn signal_systemd(offset: i32) -> io::Result<()> {
    // SAFETY: kill takes numbers and touches no memory.
    let result = unsafe { libc::kill(1, libc::SIGRTMIN() + offset) };
    Ok(Errno::result(result).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::process::Command;

    /// The signals that `command` finds ignored, as bits.
    async fn ignored(mut command: Command) -> u64 {
        let output = command.arg("/proc/self/status").output().await.unwrap();
        let status = String::from_utf8(output.stdout).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[tokio::test]
    async fn a_command_ignores_no_signal() {
        // As a shell does for what it starts in the background.
        // SAFETY: no handler is set.
        let before = unsafe { signal::signal(Signal::SIGINT, SigHandler::SigIgn) }.unwrap();
        let mut isolated = Command::new("cat");
        isolate(&mut isolated, None);
        let (inherited, isolated) = (ignored(Command::new("cat")).await, ignored(isolated).await);
        // SAFETY: it is what was there.
        unsafe { signal::signal(Signal::SIGINT, before) }.unwrap();
        assert_eq!(inherited & 0b10, 0b10, "SIGINT is the second");
        assert_eq!(isolated & 0x7fff_ffff, 0, "{isolated:x}");
    }
}
