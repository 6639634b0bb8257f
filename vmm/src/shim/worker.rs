//! A thread that does what may block: writes to disks and to standard error. The queue to it is bounded; what
//! finds it full is the caller's to count, so that neither a full disk nor a hung one reaches a connection.

use std::{
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

/// How often an idle worker looks whether something is due.
const TICK: Duration = Duration::from_secs(1);

/// What a worker is called with.
pub(super) enum Work<T> {
    /// Something to do.
    Item(T),
    /// Nothing came for a while.
    Tick,
    /// Nothing will come any more.
    End,
}

/// A thread and the queue to it.
pub(super) struct Worker<T> {
    queue: Mutex<Option<SyncSender<T>>>,
    ended: Mutex<Receiver<()>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread with a queue of `capacity` items.
    pub(super) fn start(
        name: &str,
        capacity: usize,
        mut work: impl FnMut(Work<T>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, items) = sync_channel(capacity);
        let (end, ended) = sync_channel::<()>(1);
        thread::Builder::new().name(name.into()).spawn(move || {
            loop {
                match items.recv_timeout(TICK) {
                    Ok(item) => work(Work::Item(item)),
                    Err(RecvTimeoutError::Timeout) => work(Work::Tick),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            work(Work::End);
            drop(end);
        })?;
        Ok(Self { queue: Mutex::new(Some(queue)), ended: Mutex::new(ended) })
    }

    /// Hands over one item; `false` if the queue is full.
    pub(super) fn send(&self, item: T) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.as_ref().is_some_and(|queue| queue.try_send(item).is_ok())
    }

    /// Lets the thread finish what is queued, and waits for that, `limit` long at most.
    pub(super) fn finish(&self, limit: Duration) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Either answer will do: the thread ended, or it hangs on a disk and must not hold up the stop.
        let _ = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::channel,
    };

    #[test]
    fn a_worker_that_hangs_takes_no_more() {
        let (go, wait) = channel::<()>();
        let done = Arc::new(AtomicU64::new(0));
        let seen = done.clone();
        let worker = Worker::start("test", 2, move |work| {
            if let Work::Item(()) = work {
                let _ = wait.recv();
                seen.fetch_add(1, Relaxed);
            }
        })
        .unwrap();
        let sent = u64::try_from((0..100).filter(|_| worker.send(())).count()).unwrap();
        assert!((2..=3).contains(&sent), "{sent}");
        drop(go);
        worker.finish(Duration::from_secs(10));
        assert_eq!(done.load(Relaxed), sent);
        assert!(!worker.send(()), "It has ended");
    }
}
