//! The thread that writes the log: a disk may hang, and `laird` must not. While nothing is to be written it sleeps.

use super::{Counted, Lost, file::LogFile, limits, line, now, rates::Rates};
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// How often it looks whether a second is over in which attempts were counted.
const TICK: Duration = Duration::from_secs(1);

/// A line for the disk, and who waits for it.
pub(super) struct Line {
    pub(super) bytes: Vec<u8>,
    pub(super) written: oneshot::Sender<()>,
}

/// The thread, and the queue to it.
pub(super) struct Writer {
    queue: Mutex<Option<SyncSender<Line>>>,
    ended: Mutex<Receiver<()>>,
}

impl Writer {
    /// Starts it. It also writes what `rates` counted, and how many lines found the queue full.
    pub(super) fn start(log: LogFile, rates: Arc<Mutex<Rates>>, lost: Arc<AtomicU64>) -> io::Result<Self> {
        let (queue, lines) = sync_channel(limits::AUDIT_QUEUE);
        let (end, ended) = sync_channel::<()>(1);
        thread::Builder::new().name("audit".into()).spawn(move || {
            write(log, &lines, &rates, &lost);
            drop(end);
        })?;
        Ok(Self { queue: Mutex::new(Some(queue)), ended: Mutex::new(ended) })
    }

    /// Hands over a line; `false` if the queue is full.
    pub(super) fn send(&self, line: Line) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.as_ref().is_some_and(|queue| queue.try_send(line).is_ok())
    }

    /// Lets it write what is left, and waits for that, `limit` long at most.
    pub(super) fn finish(&self, limit: Duration) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Either answer will do: it ended, or it hangs on a disk and must not hold up the end.
        let _ = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit);
    }
}

fn write(mut log: LogFile, lines: &Receiver<Line>, rates: &Mutex<Rates>, lost: &AtomicU64) {
    let rates = || rates.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // What is counted is counted by a rate that a line before it began, so while there is none there is nothing to wait for.
        let next = if rates().is_empty() {
            lines.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            lines.recv_timeout(TICK)
        };
        let ended = matches!(next, Err(RecvTimeoutError::Disconnected));
        if let Ok(Line { bytes, written }) = next {
            log.append(&bytes);
            let _ = written.send(());
        }
        let counted = if ended { rates().rest() } else { rates().suppressed(Instant::now()) };
        let time = now();
        for ((whose, verdict), suppressed) in counted {
            let (uid, verb) = whose.unzip();
            log.append(&line(&Counted { time, uid, verb, verdict, suppressed }));
        }
        let lost = lost.swap(0, Relaxed);
        if lost > 0 {
            log.append(&line(&Lost { time, lost }));
        }
        if ended {
            return;
        }
    }
}
