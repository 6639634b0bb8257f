//! The few threads that wait for disks, so that the queues' own threads need not.

use crate::sandbox::restrict_worker;
use std::{
    io,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

/// How many reads wait for disks at the same time. Disks like some, and each costs a stack.
const THREADS: usize = 4;

/// Something that may wait.
type Job = Box<dyn FnOnce() + Send>;

/// Threads that start with the first job, at the latest, and stay. They outlive connections.
#[derive(Debug)]
pub(super) struct Pool {
    sender: Sender<Job>,
    receiver: Arc<Mutex<Receiver<Job>>>,
    started: OnceLock<usize>,
}

impl Pool {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver: Arc::new(Mutex::new(receiver)), started: OnceLock::new() }
    }

    /// Has a job done by one of the threads, or, if none can be made, at once.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.start() == 0 {
            job();
            return;
        }
        // The receiver is ours, so it is there.
        let _ = self.sender.send(Box::new(job));
    }

    /// Starts the threads, if they are not yet. How many could be started.
    pub(super) fn start(&self) -> usize {
        *self.started.get_or_init(|| self.spawn())
    }

    fn spawn(&self) -> usize {
        let spawn = |_| -> io::Result<()> {
            let receiver = self.receiver.clone();
            thread::Builder::new().name("cold reads".into()).spawn(move || work(&receiver)).map(drop)
        };
        (0..THREADS).map_while(|number| spawn(number).ok()).count()
    }
}

fn work(receiver: &Mutex<Receiver<Job>>) {
    restrict_worker();
    loop {
        // The lock is held while waiting: the others wait for it instead, which is as good.
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn jobs_run_beside_each_other() {
        let pool = Pool::new();
        let barrier = Arc::new(Barrier::new(THREADS + 1));
        for _ in 0..THREADS {
            let barrier = barrier.clone();
            pool.run(move || {
                barrier.wait();
            });
        }
        // Comes back only if all of them wait at the same time.
        barrier.wait();
    }
}
