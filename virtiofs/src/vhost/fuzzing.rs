//! What fuzzers drive of this module.

use super::{
    Config, ServeError, Service,
    queue::{Queue, State},
    serve,
    vring::Vring,
};
use crate::fuse::Session;
use std::{
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, OnceLock, atomic::AtomicBool},
};
use vhost::vhost_user::Listener;
use vhost_user_backend::VringT;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// One queue of a device, run by whoever has it.
pub(crate) struct OneQueue {
    queue: Arc<Queue>,
    vring: Vring,
}

/// Where its parts are: the descriptor table, the available and the used ring.
pub(crate) type Places = [u64; 3];

impl OneQueue {
    pub(crate) fn new(service: &Arc<Service>, memory: GuestMemoryMmap) -> Self {
        // As a connection does it.
        service.pool.start().expect("room for some threads");
        let memory = GuestMemoryAtomic::new(memory);
        let vring = Vring::new(memory.clone(), super::QUEUE_SIZE_MAX).expect("a size that is allowed");
        let queue = Queue {
            service: service.clone(),
            session: Arc::new(Session::new()),
            memory,
            moves: Arc::default(),
            stopping: Arc::new(AtomicBool::new(false)),
            vrings: Arc::new(OnceLock::from(vec![vring.clone()])),
            // It never polls.
            number: 0,
            stats: Arc::default(),
            state: Mutex::new(State::one_of(1)),
        };
        Self { queue: Arc::new(queue), vring }
    }

    /// As SET_VRING_NUM does it.
    pub(crate) fn set_size(&self, size: u16) {
        self.vring.set_queue_size(size);
    }

    /// As SET_VRING_ADDR does it. Whether it was taken.
    pub(crate) fn set_places(&self, [table, available, used]: Places) -> bool {
        if self.vring.set_queue_info(table, available, used).is_err() {
            return false;
        }
        let index = self.vring.queue_used_idx();
        index.map(|index| self.vring.set_queue_next_used(index)).is_ok()
    }

    pub(crate) fn set_event_idx(&self, enabled: bool) {
        self.vring.set_queue_event_idx(enabled);
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.vring.set_enabled(enabled);
    }

    /// As SET_VRING_KICK does it.
    pub(crate) fn start(&self) {
        self.vring.set_queue_ready(true);
    }

    /// As GET_VRING_BASE does it.
    pub(crate) fn stop(&self) -> u16 {
        self.vring.set_queue_ready(false);
        self.queue.stop();
        self.vring.queue_next_avail()
    }

    pub(crate) fn set_memory(&self, memory: GuestMemoryMmap) {
        self.queue.memory.lock().expect("nobody panics").replace(memory);
    }

    /// As a kick does it.
    pub(crate) fn run(&self) {
        self.queue.run(&self.vring);
    }

    /// How many reads were not in memory. They are answered by another thread.
    pub(crate) fn cold_reads(&self) -> u64 {
        self.queue.stats.cold_reads.get()
    }
}

/// Serves one connection of those who connect to `listener`.
pub(crate) fn serve_one(
    listener: &UnixListener,
    service: &Arc<Service>,
    config: &Config,
) -> Result<(), ServeError> {
    let clone = || listener.try_clone().map_err(ServeError::Socket);
    serve::connection(&mut Listener::from(clone()?), &clone()?, service, config)
}
