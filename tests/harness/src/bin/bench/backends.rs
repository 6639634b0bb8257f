//! The backends that are compared, each with the same store.

use anyhow::{Context, Result, bail, ensure};
use lair_harness::{
    frontend::{
        connection::{Base, Connection, Guest},
        layout::Shape,
        queue::Queue,
    },
    process::{Server, Socket},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The version of virtiofsd that is compared.
const VIRTIOFSD: &str = "virtiofsd 1.14.0";

/// virtiofsd as it may be set up for a store that does not change: caches kept, no thread pool (which makes it slower), no
/// sandbox, no system call filter, no submounts to look for. File handles are what spares it a descriptor for each inode.
const TUNED: &[&str] = &[
    "--cache=always",
    "--readonly",
    "--sandbox=none",
    "--seccomp=none",
    "--inode-file-handles=prefer",
    "--thread-pool-size=0",
    "--no-announce-submounts",
];

/// A backend's name in results.
pub(crate) const DEFAULT: &str = "virtiofsd";
pub(crate) const BEST: &str = "virtiofsd-tuned";
pub(crate) const OURS: &str = "lair-virtiofs";

/// A backend that can be started.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    /// Whether it has more than one request queue.
    pub(crate) multiqueue: bool,
}

/// A backend that runs and serves a guest.
pub(crate) struct Running {
    /// Before the server, so that it sees the end of the connection first.
    connection: Connection,
    pub(crate) server: Server,
}

impl Backend {
    /// What is run, without the socket.
    pub(crate) fn command_line(&self) -> String {
        let mut words = vec![self.program.to_string_lossy().into_owned()];
        words.extend(self.arguments.iter().cloned());
        words.join(" ")
    }

    pub(crate) fn command(&self, socket: &Socket, queues: usize) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(["--fd", &socket.number().to_string()]);
        if self.multiqueue {
            command.args(["--queues", &queues.to_string()]).env("RUST_LOG", "warn");
        }
        command
    }

    /// Starts it below `directory` for a guest of this shape.
    pub(crate) fn start(&self, directory: &Path, shape: Shape) -> Result<(Running, Vec<Queue>)> {
        let (guest, queues) = Guest::new(shape)?;
        let directory = tempfile::tempdir_in(directory)?;
        let socket = Socket::new(&directory.path().join("fs.sock"))?;
        let log = directory.path().join("log");
        let mut server = socket.serve(&mut self.command(&socket, shape.queues), &log)?;
        match guest.connect(socket.path(), Base::Used) {
            Ok(connection) => Ok((Running { connection, server }, queues)),
            Err(error) => {
                server.check()?;
                Err(error.context(format!("{} said: {}", self.name, server.log())))
            }
        }
    }
}

impl Running {
    pub(crate) fn stop(self) -> Result<()> {
        drop(self.connection);
        self.server.stop()
    }
}

/// What is shown, and what Lair's makes beforehand.
#[derive(Debug)]
pub(crate) struct Files {
    /// The store directory.
    pub(crate) store: PathBuf,
    /// A list of its paths.
    pub(crate) view: PathBuf,
    /// A directory for Lair's index.
    pub(crate) index: PathBuf,
}

/// All backends.
pub(crate) fn all(files: &Files) -> Result<Vec<Backend>> {
    let virtiofsd = PathBuf::from("virtiofsd");
    let version = Command::new(&virtiofsd).arg("--version").output();
    let version = version.context("Cannot run virtiofsd; tests/bench builds it and puts it into PATH")?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    ensure!(version == VIRTIOFSD, "The virtiofsd in PATH is {version:?}, not {VIRTIOFSD:?}");
    let shared = format!("--shared-dir={}", files.store.display());
    let other = |name, options: &[&str]| Backend {
        name,
        program: virtiofsd.clone(),
        arguments: [&[shared.as_str(), "--log-level=error"], options]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect(),
        multiqueue: false,
    };
    Ok(vec![other(DEFAULT, &[]), other(BEST, TUNED), ours(OURS, &programs()?, files)?])
}

/// Where the built programs are.
pub(crate) fn programs() -> Result<PathBuf> {
    let programs = std::env::var_os("LAIR_BIN");
    programs.map(PathBuf::from).context("LAIR_BIN is not set: it names the directory of the built programs")
}

/// Lair's own, of these programs.
pub(crate) fn ours(name: &'static str, programs: &Path, files: &Files) -> Result<Backend> {
    fs::create_dir_all(&files.index)?;
    let program = programs.join("lair-virtiofs");
    let mut arguments: Vec<String> = Vec::new();
    for (option, path) in [("--source", &files.store), ("--view", &files.view), ("--index", &files.index)] {
        arguments.extend([option.into(), path.to_string_lossy().into_owned()]);
    }
    let output = Command::new(&program).arg("index").args(&arguments).output();
    let output = output.with_context(|| format!("Cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("{} index failed: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(Backend { name, program, arguments, multiqueue: true })
}
