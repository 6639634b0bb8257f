//! Servers as child processes: a socket that outlives them, and what they use of the machine.

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

/// A listening unix socket that servers inherit. It can be connected to also while none is there; the next one answers.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Makes the socket.
    pub fn new(path: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("Cannot make the socket {}", path.display()))?;
        Ok(Self { path: path.into(), listener })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number by which a server inherits it.
    pub fn number(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Hangs up on those that have connected and that no server has accepted.
    pub fn hang_up(&self) -> Result<()> {
        let waits = || poll(&mut [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO);
        while waits()? > 0 {
            drop(self.listener.accept()?);
        }
        Ok(())
    }

    /// Starts a server that inherits it. Its standard error goes to `log`.
    pub fn serve(&self, command: &mut Command, log: &Path) -> Result<Server> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = File::create(log).with_context(|| format!("Cannot make {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        // One at a time, so that no server inherits another one's.
        static STARTING: Mutex<()> = Mutex::new(());
        let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        fcntl(&self.listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let began = Instant::now();
        let child = command.spawn();
        fcntl(&self.listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let child = child.with_context(|| format!("Cannot start {name}"))?;
        Ok(Server { child, name, log: log.into(), began })
    }
}

/// A running server and its child processes. Dropping it kills them.
#[derive(Debug)]
pub struct Server {
    child: Child,
    name: String,
    log: PathBuf,
    began: Instant,
}

/// What a server has in memory, in bytes: sums over its processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUse {
    /// Anonymous memory that is resident.
    pub rss_anon_bytes: u64,
    /// Pages of files that are resident.
    pub rss_file_bytes: u64,
    /// Resident memory that no other process has mapped.
    pub private_bytes: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl Server {
    /// Its processes, the first being the one that was started.
    pub fn processes(&self) -> Vec<Pid> {
        let mut found = vec![Pid::from_raw(self.child.id().cast_signed())];
        let mut next = 0;
        while let Some(pid) = found.get(next) {
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                found.extend(
                    children.split_whitespace().filter_map(|pid| pid.parse().ok().map(Pid::from_raw)),
                );
            }
            next += 1;
        }
        found
    }

    /// When it was started.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// CPU time that it has used so far.
    pub fn cpu(&self) -> Result<Duration> {
        let times = self
            .processes()
            .into_iter()
            .map(|pid| -> Result<Duration> { Ok(clock_gettime(clock_getcpuclockid(pid)?)?.into()) });
        times.sum::<Result<Duration>>().with_context(|| format!("Cannot read the CPU time of {}", self.name))
    }

    /// What it has in memory.
    pub fn memory(&self) -> Result<MemoryUse> {
        let mut sum = MemoryUse::default();
        for pid in self.processes() {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            sum.rss_anon_bytes += kib(&status, "RssAnon:")?;
            sum.rss_file_bytes += kib(&status, "RssFile:")?;
            sum.private_bytes += kib(&rollup, "Private_Clean:")? + kib(&rollup, "Private_Dirty:")?;
            sum.descriptors += fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        }
        Ok(sum)
    }

    /// What it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.log()),
        }
    }

    /// Kills it (SIGKILL), with all its processes.
    pub fn kill(&mut self) -> Result<()> {
        for pid in self.processes() {
            // One that has ended meanwhile is as good.
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.child.wait().with_context(|| format!("Cannot wait for {}", self.name))?;
        Ok(())
    }

    /// Ends it, after the connection to it has been closed.
    pub fn stop(mut self) -> Result<()> {
        for pid in self.processes() {
            let _ = kill(pid, Signal::SIGTERM);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.kill()?;
                bail!("{} did not end within 5 s of SIGTERM:\n{}", self.name, self.log());
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill();
        }
    }
}

/// A value of a file in `/proc` that is told in KiB, in bytes.
pub fn kib(text: &str, key: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("No {key}"))?;
    let number: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{key}{line}"))?;
    Ok(number << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_with_a_child_is_measured_and_killed_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let socket = Socket::new(&directory.path().join("socket")).unwrap();
        let mut command = Command::new("sh");
        // The shell stays, because it has more to do.
        command.args(["-c", &format!("test -S /proc/self/fd/{0} && sleep 1000; true", socket.number())]);
        let mut server = socket.serve(&mut command, &directory.path().join("log")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let name = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let sleeper = loop {
            match server.processes().as_slice() {
                [_, child] if name(*child) == "sleep\n" => break *child,
                other => assert!(Instant::now() < deadline, "{other:?}: {}", server.log()),
            }
        };
        let used = server.memory().unwrap();
        assert!(used.private_bytes > 0 && used.rss_anon_bytes > 0 && used.rss_file_bytes > 0);
        assert!(used.descriptors >= 8, "{used:?}");
        server.check().unwrap();
        let before = server.cpu().unwrap();
        server.kill().unwrap();
        assert!(before > Duration::ZERO);
        // It may be a zombie for a moment, without memory.
        while fs::read_to_string(format!("/proc/{sleeper}/statm")).is_ok_and(|text| !text.starts_with("0 ")) {
            assert!(Instant::now() < deadline, "the child lives on");
        }
    }
}
