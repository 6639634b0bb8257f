//! The few threads that wait for disks, so that the queues' own threads need not.

use crate::sandbox::restrict_worker;
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

/// How many reads wait for disks at the same time. Disks like some, and each costs a stack.
const THREADS: usize = 4;

/// Something that may wait.
type Job = Box<dyn FnOnce() + Send>;

/// Threads that stay once they are started. They outlive connections.
#[derive(Debug)]
pub(super) struct Pool {
    sender: Sender<Job>,
    receiver: Arc<Mutex<Receiver<Job>>>,
    started: Mutex<bool>,
}

impl Pool {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver: Arc::new(Mutex::new(receiver)), started: Mutex::new(false) }
    }

    /// Has a job done by one of the threads, as soon as there are any. Never by the caller, who may hold what the job needs.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The receiver is ours, so it is there.
        let _ = self.sender.send(Box::new(job));
    }

    /// Starts the threads, if they are not yet. An error if there can be none.
    pub(super) fn start(&self) -> io::Result<()> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if !*started {
            self.spawn()?;
            // Fewer will do.
            let _ = (1..THREADS).try_for_each(|_| self.spawn());
            *started = true;
        }
        Ok(())
    }

    fn spawn(&self) -> io::Result<()> {
        let receiver = self.receiver.clone();
        thread::Builder::new().name("cold reads".into()).spawn(move || work(&receiver)).map(drop)
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
    use std::sync::{Barrier, mpsc::TryRecvError};

    #[test]
    fn jobs_run_beside_each_other() {
        let pool = Pool::new();
        pool.start().unwrap();
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

    #[test]
    fn a_job_waits_for_the_threads_and_holds_nobody_up() {
        let pool = Pool::new();
        let (sender, receiver) = channel();
        let caller = thread::current().id();
        pool.run(move || sender.send(thread::current().id() != caller).unwrap());
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        pool.start().unwrap();
        assert_eq!(receiver.recv(), Ok(true));
    }
}
