//! The console log: everything that the guest writes to its console, in a bounded [`Ring`].
//!
//! The console is read whatever the disk does: a guest whose console is full stops.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    limits,
    ring::Ring,
    socket,
    state::Shim,
    worker::{Work, Worker},
};
use std::{
    collections::VecDeque,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::Instant,
};
use tokio::{io::AsyncReadExt, net::UnixStream, time::sleep};

/// How much of the console waits for the disk, in bytes.
const BACKLOG: usize = 1 << 20;

/// The largest piece, in bytes.
const PIECE: usize = 64 << 10;

/// What the disk has not got yet. When it is full the oldest goes: the end of a flood is what explains it.
#[derive(Default)]
struct Backlog {
    pieces: VecDeque<Vec<u8>>,
    length: usize,
    lost: usize,
}

impl Backlog {
    fn push(&mut self, piece: Vec<u8>) {
        self.length = self.length.saturating_add(piece.len());
        self.pieces.push_back(piece);
        while self.length > BACKLOG
            && let Some(oldest) = self.pieces.pop_front()
        {
            self.length = self.length.saturating_sub(oldest.len());
            self.lost = self.lost.saturating_add(oldest.len());
        }
    }

    /// All of it, with a line in place of what was lost.
    fn take(&mut self) -> Vec<Vec<u8>> {
        let Self { pieces, lost, .. } = std::mem::take(self);
        let note =
            (lost > 0).then(|| format!("\n[{lost} bytes of the console are lost here]\n").into_bytes());
        note.into_iter().chain(pieces).collect()
    }
}

/// The console log's writer.
pub(super) struct ConsoleLog {
    backlog: Arc<Mutex<Backlog>>,
    /// Its queue holds no more than the word that there is something.
    worker: Worker<()>,
}

impl ConsoleLog {
    /// A log at `path` with at most `limit` bytes in each of its two files.
    pub(super) fn start(path: PathBuf, limit: u64) -> io::Result<Self> {
        let shown = path.display().to_string();
        let mut ring = Ring::new(path, limit);
        let backlog = Arc::new(Mutex::new(Backlog::default()));
        let source = backlog.clone();
        let worker = Worker::start("console", 1, move |_: Work<()>| {
            let pieces = source.lock().unwrap_or_else(PoisonError::into_inner).take();
            for piece in pieces {
                if let Err(error) = ring.append(&piece) {
                    let _ = writeln!(io::stderr(), "Cannot write to console log {shown}: {error}");
                }
            }
        })?;
        Ok(Self { backlog, worker })
    }

    fn append(&self, piece: Vec<u8>) {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner).push(piece);
        // A full queue has the word already.
        let _ = self.worker.send(());
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        self.worker.finish(limits::STOP);
    }
}

/// Reads the hypervisor's console socket until the shim ends, connecting again and again.
pub(super) async fn follow(shim: &Shim, path: &Path, log: &ConsoleLog) {
    let (shortest, longest) = limits::BACK_OFF;
    let mut pause = shortest;
    loop {
        if let Ok(stream) = socket::connect(path, limits::DIAL).await {
            let since = Instant::now();
            shim.guest().mark("console");
            shim.observe(|seen| seen.console = true);
            copy(shim, stream, log).await;
            shim.observe(|seen| seen.console = false);
            if since.elapsed() >= limits::LASTING {
                pause = shortest;
            }
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(longest);
    }
}

async fn copy(shim: &Shim, mut stream: UnixStream, log: &ConsoleLog) {
    let mut buffer = vec![0; PIECE];
    // The end and an error are the same here: the hypervisor is gone or goes on with another connection.
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        shim.console_bytes.fetch_add(u64::try_from(read).unwrap_or(u64::MAX), Relaxed);
        log.append(buffer.get(..read).unwrap_or_default().to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hv6_the_oldest_bytes_are_lost_and_counted() {
        let mut backlog = Backlog::default();
        for n in 0..40 {
            backlog.push(vec![n; PIECE]);
        }
        let taken = backlog.take();
        assert_eq!(taken.len(), 17);
        assert_eq!(taken[0], b"\n[1572864 bytes of the console are lost here]\n");
        assert_eq!((taken[1][0], taken[16][0]), (24, 39));
        assert!(backlog.take().is_empty());
    }
}
