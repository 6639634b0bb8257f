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
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::Ordering::Relaxed,
    time::Instant,
};
use tokio::{io::AsyncReadExt, net::UnixStream, time::sleep};

/// Pieces of the console that wait for the disk.
const QUEUE: usize = 16;

/// The largest piece, in bytes.
const PIECE: usize = 64 << 10;

/// The console log's writer.
pub(super) struct ConsoleLog {
    worker: Worker<Vec<u8>>,
}

impl ConsoleLog {
    /// A log at `path` with at most `limit` bytes in each of its two files.
    pub(super) fn start(path: PathBuf, limit: u64) -> io::Result<Self> {
        let shown = path.display().to_string();
        let mut ring = Ring::new(path, limit);
        let worker = Worker::start("console", QUEUE, move |work: Work<Vec<u8>>| {
            if let Work::Item(bytes) = work
                && let Err(error) = ring.append(&bytes)
            {
                let _ = writeln!(io::stderr(), "Cannot write to console log {shown}: {error}");
            }
        })?;
        Ok(Self { worker })
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
    let mut lost = 0_u64;
    // The end and an error are the same here: the hypervisor is gone or goes on with another connection.
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        let length = u64::try_from(read).unwrap_or(u64::MAX);
        shim.console_bytes.fetch_add(length, Relaxed);
        let mut piece = Vec::with_capacity(read);
        if lost > 0 {
            piece.extend_from_slice(format!("\n[{lost} bytes of the console are lost here]\n").as_bytes());
        }
        piece.extend_from_slice(buffer.get(..read).unwrap_or_default());
        lost = if log.worker.send(piece) { 0 } else { lost.saturating_add(length) };
    }
}
