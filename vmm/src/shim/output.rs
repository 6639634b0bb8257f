//! What the VM's other programs say: the shim has the reading ends of their standard output and error, and keeps the end of each in a
//! bounded ring.
//!
//! The pipes are read whatever a disk does: a hypervisor whose pipe is full stops. They outlive `laird`, as the shim does.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    backlog::Backlog,
    fd::{self, PipeError},
    limits,
    ring::Ring,
    worker::{Work, Worker},
};
use std::{
    io::{self, Write},
    os::fd::RawFd,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, task::JoinSet};

/// The largest piece that is read at once, in bytes: what a pipe holds.
const PIECE: usize = 64 << 10;

/// A pipe that was handed over and the file for what comes out of it, written as `N=FILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The descriptor of the reading end.
    pub fd: RawFd,
    /// The log; the file before it has `.1` appended.
    pub path: PathBuf,
}

/// Why there is no such log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It is not written as it has to be.
    #[error("\"{0}\" is not N=FILE with the number of an open descriptor")]
    Syntax(String),
    /// The descriptor is not what it has to be.
    #[error(transparent)]
    Pipe(#[from] PipeError),
    /// The system refused.
    #[error("Cannot keep logs")]
    System(#[from] io::Error),
}

impl FromStr for Log {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        let syntax = || LogError::Syntax(text.into());
        let (fd, path) = text.split_once('=').ok_or_else(syntax)?;
        let fd = fd.parse().map_err(|_| syntax())?;
        if path.is_empty() { Err(syntax()) } else { Ok(Self { fd, path: path.into() }) }
    }
}

/// The logs and their writer. One thread writes them all: a disk that hangs does so for each.
pub(super) struct Logs {
    pipes: Vec<(Receiver, usize)>,
    backlogs: Arc<Vec<Mutex<Backlog>>>,
    /// Its queue holds no more than the word that there is something.
    worker: Arc<Worker<()>>,
}

impl Logs {
    /// Takes over the pipes. To be called once, in a runtime.
    pub(super) fn start(logs: &[Log]) -> Result<Self, LogError> {
        let numbers: Vec<_> = logs.iter().map(|log| log.fd).collect();
        let mut pipes = Vec::new();
        for (index, pipe) in fd::inherited_pipes(&numbers)?.into_iter().enumerate() {
            pipes.push((Receiver::from_owned_fd(pipe)?, index));
        }
        let mut rings: Vec<_> = logs
            .iter()
            .map(|log| (log.path.clone(), Ring::new(log.path.clone(), limits::OUTPUT_FILE)))
            .collect();
        let backlogs: Arc<Vec<_>> =
            Arc::new(logs.iter().map(|_| Mutex::new(Backlog::new(limits::OUTPUT_BACKLOG))).collect());
        let sources = backlogs.clone();
        let worker = Worker::start("output", 1, move |_: Work<()>| {
            for ((path, ring), source) in rings.iter_mut().zip(sources.iter()) {
                let (lost, bytes) = source.lock().unwrap_or_else(PoisonError::into_inner).take();
                let note = if lost > 0 { format!("\n[{lost} bytes are lost here]\n") } else { String::new() };
                for piece in [note.as_bytes(), &bytes] {
                    if let Err(error) = ring.append(piece) {
                        let _ = writeln!(io::stderr(), "Cannot write to log {}: {error}", path.display());
                    }
                }
            }
        })?;
        Ok(Self { pipes, backlogs, worker: Arc::new(worker) })
    }

    /// Reads until the shim ends, also when all others have.
    pub(super) async fn follow(&mut self) {
        let mut readers = JoinSet::new();
        for (pipe, index) in self.pipes.drain(..) {
            readers.spawn(read(pipe, self.backlogs.clone(), index, self.worker.clone()));
        }
        while readers.join_next().await.is_some() {}
        std::future::pending().await
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        self.worker.finish(limits::STOP);
    }
}

async fn read(mut pipe: Receiver, backlogs: Arc<Vec<Mutex<Backlog>>>, index: usize, worker: Arc<Worker<()>>) {
    let mut buffer = vec![0; PIECE];
    let Some(backlog) = backlogs.get(index) else { return };
    while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
        backlog.lock().unwrap_or_else(PoisonError::into_inner).push(buffer.get(..read).unwrap_or_default());
        // A full queue has the word already.
        let _ = worker.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_a_number_and_a_file() {
        let log: Log = "7=/var/lib/lair/a=b.log".parse().unwrap();
        assert_eq!(log, Log { fd: 7, path: "/var/lib/lair/a=b.log".into() });
        for wrong in ["", "7", "7=", "x=/log", "=/log", "99999999999=/log"] {
            assert!(wrong.parse::<Log>().is_err(), "{wrong}");
        }
    }
}
