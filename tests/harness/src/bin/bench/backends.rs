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

/// All backends, for the store directory `store` whose paths are in the file `view`. What Lair's needs beforehand is made in
/// `cache`.
pub(crate) fn all(store: &Path, view: &Path, cache: &Path) -> Result<Vec<Backend>> {
    let virtiofsd = PathBuf::from("virtiofsd");
    let version = Command::new(&virtiofsd).arg("--version").output();
    let version = version.context("Cannot run virtiofsd; tests/bench builds it and puts it into PATH")?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    ensure!(version == VIRTIOFSD, "The virtiofsd in PATH is {version:?}, not {VIRTIOFSD:?}");
    let shared = format!("--shared-dir={}", store.display());
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
    Ok(vec![other(DEFAULT, &[]), other(BEST, TUNED), ours(store, view, cache)?])
}

fn ours(store: &Path, view: &Path, cache: &Path) -> Result<Backend> {
    let programs = std::env::var_os("LAIR_BIN")
        .context("LAIR_BIN is not set: it names the directory of the built programs")?;
    let program = Path::new(&programs).join("lair-virtiofs");
    let help = Command::new(&program).arg("--help").output();
    let help = help.with_context(|| format!("Cannot run {}", program.display()))?;
    let mut arguments: Vec<String> = Vec::new();
    let mut add =
        |option: &str, path: &Path| arguments.extend([option.into(), path.to_string_lossy().into_owned()]);
    add("--source", store);
    add("--view", view);
    if String::from_utf8_lossy(&help.stdout).contains("--index") {
        add("--index", cache);
        let output = Command::new(&program).arg("index").args(&arguments).output()?;
        if !output.status.success() {
            bail!("lair-virtiofs index failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(Backend { name: OURS, program, arguments, multiqueue: true })
}
