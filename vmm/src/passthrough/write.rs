//! A write to a file of the kernel, in a process of its own: taking a device from its driver can block for ever, in a way that no signal
//! ends.
//!
//! The process holds a lock while it lives, so that nothing else is written about the same devices, neither by this `laird` nor by a later
//! one. It is waited for until a deadline and never killed: what it began, the kernel does to its end.

use super::{hot_reset, machine::Reason};
use crate::{
    error::chain,
    host::{
        confine::Confinement,
        pci::Address,
        process::{self, Launch, Process, Sink},
    },
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};

/// The word by which `laird` knows that it is to write and nothing else.
pub const WORD: &str = "write-attribute";

/// The pause between two looks at a lock.
const POLL: Duration = Duration::from_millis(20);

/// As much of what the process says as is told, in bytes.
const SAID_MAX: u64 = 1024;

/// The program that writes, and how long it may take.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The program, which is told the word, the file and the text.
    pub program: PathBuf,
    /// How long a write may take.
    pub patience: Duration,
}

impl Writer {
    /// `laird` itself.
    pub fn of_this_program() -> Self {
        // A driver waits for what its device does; resets of GPUs have been seen to take some seconds.
        Self { program: "/proc/self/exe".into(), patience: Duration::from_secs(60) }
    }

    /// Writes `text` to `path`, once no other write holds `lock`.
    pub async fn write(&self, lock: &Path, path: &Path, text: &str) -> Result<(), Reason> {
        let arguments = vec![WORD.into(), path.to_string_lossy().into_owned(), text.into()];
        let (path, text) = (path.to_owned(), text.trim_end().to_owned());
        let stuck =
            Reason::Stuck { path: path.clone(), text: text.clone(), seconds: self.patience.as_secs() };
        self.execute(lock, arguments, stuck, |error| Reason::Refused { path, text, error }).await
    }

    /// Has VFIO reset all that is on a function's bus, of which `groups` are the nodes, its own first.
    pub async fn hot_reset(&self, lock: &Path, function: Address, groups: &[PathBuf]) -> Result<(), Reason> {
        let words = [hot_reset::WORD.into(), function.to_string()].into_iter();
        let nodes = groups.iter().map(|node| node.to_string_lossy().into_owned());
        let path = groups.first().cloned().unwrap_or_default();
        let (address, seconds) = (function.to_string(), self.patience.as_secs());
        let stuck = Reason::StuckReset { address, path: path.clone(), seconds };
        let refused = |error| Reason::Refused { path, text: hot_reset::WORD.into(), error };
        self.execute(lock, words.chain(nodes).collect(), stuck, refused).await
    }

    /// Has a process of its own do what `arguments` say. Where it is not done in time, it is `stuck`; what the process says against it is `refused`.
    async fn execute(
        &self,
        lock: &Path,
        arguments: Vec<String>,
        stuck: Reason,
        refused: impl FnOnce(String) -> Reason,
    ) -> Result<(), Reason> {
        let end = Instant::now() + self.patience;
        let host = |error: String| Reason::Host { error };
        let lock = match locked(lock, end).await {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(stuck),
            Err(error) => return Err(host(format!("cannot lock {}: {error}", lock.display()))),
        };
        let (reader, writer) = process::pipe().map_err(|error| host(error.to_string()))?;
        let launch = Launch {
            program: self.program.clone(),
            arguments,
            environment: vec![],
            output: Sink::Pipe(writer),
            confinement: Confinement { keep: vec![lock.into()], ..Confinement::default() },
        };
        let process = Process::spawn(&launch).map_err(|error| host(chain(&error)))?;
        // Ours are closed: the process alone holds the lock.
        drop(launch);
        // A task of its own, so that somebody collects its status should nobody wait any more.
        let ended = tokio::spawn(async move {
            let how = process.ended().await;
            if process.succeeded() { Ok(()) } else { Err((how, said(reader))) }
        });
        match timeout(end.saturating_duration_since(Instant::now()), ended).await {
            Err(_) => Err(stuck),
            Ok(Err(_)) => Err(host("Internal error: a task ended without a result".into())),
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err((how, said)))) => {
                Err(refused(if said.is_empty() { format!("the process that does it {how}") } else { said }))
            }
        }
    }
}

/// A lock, once nobody else has it; none if that is not before `end`.
async fn locked(path: &Path, end: Instant) -> io::Result<Option<File>> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= end => return Ok(None),
            Err(TryLockError::WouldBlock) => sleep(POLL).await,
        }
    }
}

fn said(pipe: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // What it started may live on and hold the other end.
    if fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok() {
        let _ = File::from(pipe).take(SAID_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// The whole of the process, if its arguments are those of one. It makes one write(2), as the kernel wants it.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1);
    let word = arguments.next()?;
    let done = if word == WORD {
        let (path, text) = (arguments.next()?, arguments.next()?);
        let text = text.to_string_lossy();
        // Not made if it is missing.
        let file = OpenOptions::new().write(true).open(path);
        file.and_then(|mut file| file.write(text.as_bytes())).map(drop).map_err(|error| error.to_string())
    } else if word == hot_reset::WORD {
        hot_reset::told(arguments)
    } else {
        return None;
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A writer that does what a script says; `$2` is the file, `$3` the text.
    fn writer(directory: &Path, script: &str) -> Writer {
        let program = directory.join("writer");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Writer { program, patience: Duration::from_secs(30) }
    }

    #[tokio::test]
    async fn a_write_is_done_or_told_why_not() {
        let directory = tempfile::tempdir().unwrap();
        let (lock, file) = (directory.path().join("locks/lock"), directory.path().join("file"));
        let good = writer(directory.path(), "test $1 = write-attribute && printf %s \"$3\" >\"$2\"");
        good.write(&lock, &file, "vfio-pci\n").await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "vfio-pci\n");
        let bad = writer(directory.path(), "echo 'Device or resource busy (os error 16)' >&2; exit 1");
        let error = bad.write(&lock, &file, "x\n").await.unwrap_err();
        let told = Reason::Refused {
            path: file,
            text: "x".into(),
            error: "Device or resource busy (os error 16)".into(),
        };
        assert_eq!(error, told);
        let missing = Writer { program: "/nonexistent".into(), ..bad };
        assert!(matches!(missing.write(&lock, Path::new("/x"), "x").await, Err(Reason::Host { .. })));
    }

    #[tokio::test]
    async fn vf5_a_write_that_does_not_return_is_left_alone_and_holds_off_others() {
        let directory = tempfile::tempdir().unwrap();
        let (lock, file) = (directory.path().join("lock"), directory.path().join("file"));
        fs::write(directory.path().join("hang"), "").unwrap();
        let script = format!(
            "echo $$ >>{0}/began; while test -e {0}/hang; do sleep 0.05; done; printf %s \"$3\" >\"$2\"",
            directory.path().display()
        );
        let hasty = Writer { patience: Duration::from_millis(300), ..writer(directory.path(), &script) };
        for _ in 0..2 {
            let error = hasty.write(&lock, &file, "x").await.unwrap_err();
            assert!(matches!(error, Reason::Stuck { .. }), "{error}");
        }
        // The second one was not even begun.
        assert_eq!(fs::read_to_string(directory.path().join("began")).unwrap().lines().count(), 1);
        assert!(!file.exists());
        // It was not killed: what it began, it ends.
        fs::remove_file(directory.path().join("hang")).unwrap();
        let patient = Writer { patience: Duration::from_secs(30), ..hasty };
        patient.write(&lock, &file, "y").await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "y");
    }

    #[tokio::test]
    async fn vf5_a_hot_reset_that_does_not_return_is_told_as_one() {
        let directory = tempfile::tempdir().unwrap();
        let hang = directory.path().join("hang");
        fs::write(&hang, "").unwrap();
        let script = format!("test $1 = hot-reset; while test -e {}; do sleep 0.05; done", hang.display());
        let hasty = Writer { patience: Duration::from_millis(300), ..writer(directory.path(), &script) };
        let (lock, function) = (directory.path().join("lock"), "0000:01:00.0".parse().unwrap());
        let error = hasty.hot_reset(&lock, function, &["/dev/vfio/7".into()]).await.unwrap_err();
        fs::remove_file(hang).unwrap();
        insta::assert_snapshot!(error, @"the hot reset of 0000:01:00.0 by /dev/vfio/7 has not returned within 0 s, and is not tried again");
        // A later laird reads it as it was written.
        let text = serde_json::to_string(&error).unwrap();
        assert_eq!(serde_json::from_str::<Reason>(&text).unwrap(), error);
    }

    #[test]
    fn the_process_writes_once_and_makes_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let run = |path: &Path, text: &str| {
            let words = ["laird".into(), WORD.into(), path.as_os_str().to_owned(), text.into()];
            run(words).map(|code| format!("{code:?}"))
        };
        assert_eq!(run(&file, "x"), Some(format!("{:?}", ExitCode::FAILURE)));
        assert!(!file.exists());
        fs::write(&file, "").unwrap();
        assert_eq!(run(&file, "x"), Some(format!("{:?}", ExitCode::SUCCESS)));
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
        assert_eq!(super::run(["laird".into(), "--fleet".into()]), None);
        assert_eq!(super::run(["laird".into()]), None);
    }
}
