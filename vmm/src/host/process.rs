//! Processes that outlive `laird`: spawned into their own process group, watched by pidfd, found again by
//! process id and start time. A process id alone names nothing: the kernel gives it out again.

use super::{child, confine::Confinement};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::Signal,
};
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

/// What of `laird`'s environment its programs get: where programs are, the language and time of what they say, how much they say. Nothing
/// else: there may be secrets in it, and systemd's own sockets.
const ENVIRONMENT: [&str; 7] = ["PATH", "LANG", "LC_ALL", "TZ", "LAIR_LOG", "RUST_LOG", "RUST_BACKTRACE"];

/// A program to start, where its output goes, and what it is left with.
#[derive(Debug)]
pub struct Launch {
    /// The program's path.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Added to its environment.
    pub environment: Vec<(&'static str, String)>,
    /// Where its standard output and error go.
    pub output: Sink,
    /// What it is left with.
    pub confinement: Confinement,
}

/// Where what a program says goes.
#[derive(Debug)]
pub enum Sink {
    /// It is appended to this file.
    File(PathBuf),
    /// Into this pipe.
    Pipe(OwnedFd),
}

impl Sink {
    /// Two handles of it.
    fn open(&self) -> Result<(OwnedFd, OwnedFd), ProcessError> {
        let (first, path) = match self {
            Self::File(path) => {
                let log = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
                (log.map(OwnedFd::from), path.clone())
            }
            Self::Pipe(pipe) => (pipe.try_clone(), "pipe".into()),
        };
        let both = first.and_then(|first| Ok((first.try_clone()?, first)));
        both.map_err(|e| ProcessError::Log(path, e))
    }
}

/// A pipe for what a program says until somebody reads it, with as much room as is allowed without rights: reading end and writing end.
pub fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    const ROOM: i32 = 1 << 20;
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    // With less room it works as well.
    let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(ROOM));
    Ok((reader, writer))
}

/// Why a process could not be started or found again.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program's log could not be opened.
    #[error("Cannot open the log {0}")]
    Log(PathBuf, #[source] io::Error),
    /// The program could not be executed.
    #[error("Cannot start {0}{hint}", hint = hint(.1))]
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

/// What to do about it.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE) => " (laird may open no more files: LimitNOFILE= of its unit, ulimit -n)",
        Some(Errno::ENFILE) => " (the host may open no more files: fs.file-max)",
        Some(Errno::EAGAIN) => {
            " (there may be no more processes: TasksMax= of laird's unit, ulimit -u, kernel.pid_max)"
        }
        Some(Errno::EACCES) => " (whom it runs as must be able to reach it and what it is made of)",
        Some(Errno::ENOMEM) => " (the host has no memory left)",
        _ => "",
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
    /// Starts a program in a process group of its own with no standard input, confined before it runs.
    pub fn spawn(launch: &Launch) -> Result<Self, ProcessError> {
        use std::os::unix::process::CommandExt;
        let (output, error) = launch.output.open()?;
        let mut command = Command::new(&launch.program);
        let passed = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        command
            .args(&launch.arguments)
            .env_clear()
            .envs(passed)
            .envs(launch.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(error)
            .current_dir("/")
            .process_group(0);
        child::confine(&mut command, &launch.confinement);
        let child = command.spawn().map_err(|e| ProcessError::Spawn(launch.program.clone(), e))?;
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
    // A program's name need not be text.
    let stat = std::fs::read(format!("/proc/{pid}/stat")).map_err(|e| ProcessError::Stat(pid, e))?;
    parse_start_time(&String::from_utf8_lossy(&stat))
        .ok_or_else(|| ProcessError::Stat(pid, io::ErrorKind::InvalidData.into()))
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
    use crate::host::confine::{Identity, Rlimits};

    fn shell(script: &str, directory: &Path) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![],
            output: Sink::File(directory.join("log")),
            confinement: Confinement::default(),
        }
    }

    fn log(launch: &Launch) -> &Path {
        match &launch.output {
            Sink::File(path) => path,
            Sink::Pipe(_) => panic!("a pipe"),
        }
    }

    async fn said(launch: &Launch) -> String {
        let process = Process::spawn(launch).unwrap();
        let how = process.ended().await;
        let text = std::fs::read_to_string(log(launch)).unwrap();
        assert_eq!(how, "exited with status 0", "{text}");
        text
    }

    #[tokio::test]
    async fn a_child_has_no_more_than_it_was_given() {
        let directory = tempfile::tempdir().unwrap();
        // Open in this process, and would be passed on.
        let (leaked, kept) =
            (std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/zero").unwrap());
        nix::fcntl::fcntl(&leaked, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&kept);
        let script = format!(
            "echo core $(ulimit -c) files $(ulimit -n); grep NoNewPrivs: /proc/self/status; \
             cat /proc/self/oom_score_adj; readlink /proc/self/fd/{number}; env; ls /proc/self/fd"
        );
        let launch = Launch {
            environment: vec![("LAIR_VM", "a b".into())],
            confinement: Confinement {
                keep: vec![kept.into()],
                limits: Rlimits { file_size: Some(1 << 20), locked: Some(0), ..Rlimits::default() }
                    .with_files(77),
                ..Confinement::default()
            },
            ..shell(&script, directory.path())
        };
        let text = said(&launch).await;
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..4], ["core 0 files 77", "NoNewPrivs:\t1", "0", "/dev/zero"], "{text}");
        assert!(lines.contains(&"LAIR_VM=a b"), "{text}");
        let names: Vec<_> =
            lines.iter().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        let of_the_shell = ["PWD", "SHLVL", "_", "OLDPWD", "LAIR_VM"];
        assert!(names.iter().all(|name| ENVIRONMENT.contains(name) || of_the_shell.contains(name)), "{text}");
        // Standard input, output and error, what was kept, and the directory that ls reads.
        let open: Vec<i32> = lines.iter().filter_map(|line| line.parse().ok()).skip(1).collect();
        assert_eq!(open.len(), 5, "{text}");
        assert!(!open.contains(&std::os::fd::AsRawFd::as_raw_fd(&leaked)), "{text}");
    }

    #[tokio::test]
    async fn cf2_a_child_becomes_its_own_user_with_no_way_back() {
        if !nix::unistd::geteuid().is_root() {
            return println!("SKIPPED: only root can start processes of other users");
        }
        let directory = tempfile::tempdir().unwrap();
        let script = "echo $(id -u) $(id -g) $(id -G) $(umask); grep ^Cap[IPEA] /proc/self/status; touch /root/lair-was-here; \
                      touch mine 2>/dev/null || true; kill -0 1 && echo signalled";
        let identity = Identity { uid: 70_001, gid: 70_000, groups: vec![70_009] };
        let launch = Launch {
            confinement: Confinement { identity: Some(identity), ..Confinement::default() },
            ..shell(&format!("{script}; true"), directory.path())
        };
        let text = said(&launch).await;
        let (ids, rest) = text.split_once('\n').unwrap();
        assert_eq!(ids, "70001 70000 70000 70009 0007");
        let capabilities: Vec<_> = rest.lines().filter(|line| line.starts_with("Cap")).collect();
        assert_eq!(capabilities.len(), 4, "{text}");
        assert!(capabilities.iter().all(|line| line.ends_with("0000000000000000")), "{text}");
        assert!(rest.contains("Permission denied") && !rest.contains("signalled"), "{text}");
        assert!(!Path::new("/root/lair-was-here").exists());
    }

    #[tokio::test]
    async fn cf2_a_child_listens_on_what_it_could_not_have_made() {
        if !nix::unistd::geteuid().is_root() {
            return println!("SKIPPED: only root can start processes of other users");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handed.sock");
        let listener = super::super::listen::listen(&path, 0o600, None).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let identity = Identity { uid: 70_001, gid: 70_000, groups: vec![] };
        let launch = Launch {
            confinement: Confinement {
                identity: Some(identity),
                keep: vec![listener.into()],
                ..Confinement::default()
            },
            ..shell(&format!("readlink /proc/self/fd/{number}; exec sleep 600"), directory.path())
        };
        let process = Process::spawn(&launch).unwrap();
        // The socket is the child's alone now, and still there.
        let log = log(&launch).to_owned();
        drop(launch);
        while std::fs::read_to_string(&log).unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        process.signal(Signal::SIGKILL);
        assert_eq!(process.ended().await, "killed by SIGKILL");
        // A child that another test is about to start has a copy, until it is started.
        let began = std::time::Instant::now();
        while std::os::unix::net::UnixStream::connect(&path).is_ok() {
            assert!(began.elapsed() < std::time::Duration::from_secs(10), "somebody listens still");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert!(std::fs::read_to_string(directory.path().join("log")).unwrap().starts_with("socket:"));
    }

    #[tokio::test]
    async fn a_child_that_cannot_enter_its_cgroup_does_not_run() {
        let directory = tempfile::tempdir().unwrap();
        let refuses = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let launch = Launch {
            confinement: Confinement { cgroup: Some(refuses), ..Confinement::default() },
            ..shell("echo ran", directory.path())
        };
        let error = Process::spawn(&launch).unwrap_err();
        assert!(
            matches!(&error, ProcessError::Spawn(_, cause) if cause.raw_os_error() == Some(Errno::ENOSPC as i32)),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(log(&launch)).unwrap(), "");
        // What is taken is one word, the kernel's for "this process".
        let taken = directory.path().join("cgroup.procs");
        let launch = Launch {
            confinement: Confinement {
                cgroup: Some(std::fs::File::create(&taken).unwrap()),
                ..Confinement::default()
            },
            ..shell("echo ran", directory.path())
        };
        assert_eq!(said(&launch).await, "ran\n");
        assert_eq!(std::fs::read_to_string(&taken).unwrap(), "0");
    }

    #[test]
    fn hv8_a_program_that_cannot_be_started_is_told_with_what_to_do() {
        let told = |errno: Errno| crate::error::chain(&ProcessError::Spawn("/bin/qemu".into(), errno.into()));
        let all = [Errno::EMFILE, Errno::ENFILE, Errno::EAGAIN, Errno::ENOMEM, Errno::EACCES].map(told);
        insta::assert_snapshot!(all.join("\n"));
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
