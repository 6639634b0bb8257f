//! Processes that outlive `laird`: spawned into their own process group, watched by pidfd, found again by
//! process id and start time. A process id alone names nothing: the kernel gives it out again.

use nix::sys::signal::Signal;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::{
    fs::OpenOptions,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};
use tokio::io::unix::AsyncFd;

/// What identifies a process for as long as this kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process id, which may be given to another process once this one has ended.
    pub pid: i32,
    /// Clock ticks between the kernel's start and the process's: field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

/// A program to start and where its output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The program's path.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Added to its environment.
    pub environment: Vec<(&'static str, String)>,
    /// The file to which its standard output and error are appended.
    pub log: PathBuf,
}

/// Why a process could not be started or found again.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program's log could not be opened.
    #[error("Cannot open the log {0}")]
    Log(PathBuf, #[source] io::Error),
    /// The program could not be executed.
    #[error("Cannot start {0}")]
    Spawn(PathBuf, #[source] io::Error),
    /// The process ended before it could be watched.
    #[error("Process {0} cannot be watched")]
    Watch(i32, #[source] io::Error),
    /// `/proc/PID/stat` is not what the kernel writes.
    #[error("/proc/{0}/stat cannot be read")]
    Stat(i32, #[source] io::Error),
    /// There is no such process any more: its id is free, or another's.
    #[error("Process {} of start time {} has ended", .0.pid, .0.start_time)]
    Gone(ProcessId),
}

impl ProcessError {
    /// Whether it means that there is no such process any more, and not that it cannot be looked at.
    pub fn is_end(&self) -> bool {
        match self {
            Self::Gone(_) => true,
            Self::Watch(_, error) | Self::Stat(_, error) => {
                error.raw_os_error() == Some(nix::libc::ESRCH) || error.kind() == io::ErrorKind::NotFound
            }
            Self::Log(..) | Self::Spawn(..) => false,
        }
    }
}

/// A running process that is ours, as a child or by adoption.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    /// Only a parent learns the exit status, and must collect it.
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Starts a program in a process group of its own with no standard input.
    pub fn spawn(launch: &Launch) -> Result<Self, ProcessError> {
        use std::os::unix::process::CommandExt;
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(&launch.log)
            .map_err(|e| ProcessError::Log(launch.log.clone(), e))?;
        let again = log.try_clone().map_err(|e| ProcessError::Log(launch.log.clone(), e))?;
        let child = Command::new(&launch.program)
            .args(&launch.arguments)
            .envs(launch.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(again)
            .stderr(log)
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(|e| ProcessError::Spawn(launch.program.clone(), e))?;
        // A child that is not yet waited for keeps its process id, so the pidfd is the child's.
        let pid = child.id().cast_signed();
        let pidfd = open_pidfd(pid)?;
        let start_time = start_time(pid)?;
        Ok(Self { id: ProcessId { pid, start_time }, pidfd, child: Mutex::new(Some(child)) })
    }

    /// Finds a process again that an earlier `laird` started.
    pub fn adopt(id: ProcessId) -> Result<Self, ProcessError> {
        let pidfd = open_pidfd(id.pid)?;
        // Compared after the pidfd is open: from then on the process id cannot pass to another.
        if start_time(id.pid)? != id.start_time {
            return Err(ProcessError::Gone(id));
        }
        Ok(Self { id, pidfd, child: Mutex::new(None) })
    }

    /// What identifies the process.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends a signal; to a process that has ended it is not an error.
    pub fn signal(&self, signal: Signal) {
        let number = rustix::process::Signal::from_named_raw(signal as i32);
        if let Some(number) = number {
            let _ = pidfd_send_signal(self.pidfd.get_ref(), number);
        }
    }

    /// Whether it has ended with status 0. An adopted process never tells.
    pub fn succeeded(&self) -> bool {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child
            .as_mut()
            .is_some_and(|child| child.try_wait().ok().flatten().is_some_and(|status| status.success()))
    }

    /// Waits until the process has ended; says how, in words.
    pub async fn ended(&self) -> String {
        if self.pidfd.readable().await.is_err() {
            return "cannot be watched".into();
        }
        match self.child.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with status {code}"),
                (None, Some(signal)) => match Signal::try_from(signal) {
                    Ok(signal) => format!("killed by {signal}"),
                    Err(_) => format!("killed by signal {signal}"),
                },
                (None, None) => "ended".into(),
            },
            // Only the parent learns the status, and that `laird` is gone.
            _ => "ended with an unknown status".into(),
        }
    }
}

fn open_pidfd(pid: i32) -> Result<AsyncFd<OwnedFd>, ProcessError> {
    let watch = |e: io::Error| ProcessError::Watch(pid, e);
    let Some(number) = rustix::process::Pid::from_raw(pid) else {
        return Err(watch(io::ErrorKind::InvalidInput.into()));
    };
    let fd = pidfd_open(number, PidfdFlags::empty()).map_err(|e| watch(e.into()))?;
    #[expect(
        deprecated,
        reason = "unsound only for types that lie about their descriptor; an OwnedFd does not"
    )]
    AsyncFd::new(fd).map_err(watch)
}

pub(crate) fn start_time(pid: i32) -> Result<u64, ProcessError> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| ProcessError::Stat(pid, e))?;
    parse_start_time(&stat).ok_or_else(|| ProcessError::Stat(pid, io::ErrorKind::InvalidData.into()))
}

/// Field 22. The second field is the program's name in brackets, which may itself hold blanks and brackets, so
/// counting starts behind the last one.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The kernel's id of this boot.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, directory: &Path) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![],
            log: directory.join("log"),
        }
    }

    #[test]
    fn start_time_is_read_behind_a_hostile_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 2 3";
        assert_eq!(parse_start_time(stat), Some(4242));
        assert_eq!(parse_start_time("7 (sh"), None);
        assert_eq!(parse_start_time(""), None);
    }

    #[tokio::test]
    async fn a_child_tells_how_it_ended_and_where_it_wrote() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::spawn(&shell("echo out; echo err >&2; exit 3", directory.path())).unwrap();
        assert_eq!(process.ended().await, "exited with status 3");
        assert_eq!(std::fs::read_to_string(directory.path().join("log")).unwrap(), "out\nerr\n");
    }

    #[tokio::test]
    async fn hv9_a_process_is_adopted_only_with_its_start_time() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::spawn(&shell("exec sleep 60", directory.path())).unwrap();
        let id = process.id();
        let adopted = Process::adopt(id).unwrap();
        let other = ProcessId { start_time: id.start_time + 1, ..id };
        assert!(matches!(Process::adopt(other), Err(ProcessError::Gone(_))));
        adopted.signal(Signal::SIGKILL);
        assert_eq!(process.ended().await, "killed by SIGKILL");
    }
}
