//! One virtqueue: taking requests and publishing replies, strictly one after the other.
//!
//! Because a request is published before the next one is taken, the next request is always the one at the used index. So
//! a queue that starts, starts there, whatever base the frontend gives: a backend that was killed loses no request.

use super::{Service, buffers, chain::Chain};
use crate::{
    fd,
    fuse::{FileRead, Outcome, Request, Session},
};
use nix::errno::Errno;
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use thiserror::Error;
use tracing::warn;
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
pub(super) type Vring = VringMutex<Memory>;

/// The most of a request that is copied. What is served is far shorter; a long WRITE is refused by its header.
const REQUEST_MAX: usize = 8 << 10;

/// What is kept for a queue besides the library's state.
#[derive(Debug, Default)]
pub(super) struct QueueState {
    /// Locked while a request is between taken and published.
    phase: Mutex<Phase>,
}

/// What became of an attempt to serve a request.
enum Step {
    Served,
    Empty,
    Stopped,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Set up anew, or never run.
    #[default]
    Stopped,
    Running,
    /// The guest broke it. Nothing is taken from it until it is set up anew.
    Broken,
}

/// How a guest breaks a queue.
#[derive(Debug, Error)]
enum Broken {
    #[error("The available index is {available} where {next} is next, in a queue of {size}")]
    AvailableIndex { available: u16, next: u16, size: u16 },
    #[error("The ring cannot be used")]
    Ring(#[from] virtio_queue::Error),
    #[error("A ring entry cannot be read")]
    Entry,
}

/// What a queue needs to be served.
pub(super) struct Context<'a> {
    pub(super) service: &'a Service,
    pub(super) session: &'a Session,
    pub(super) memory: &'a Memory,
    /// The connection is over.
    pub(super) stopping: &'a AtomicBool,
    /// For log lines.
    pub(super) number: usize,
}

impl QueueState {
    /// Waits for the request in progress. The queue then is as new.
    pub(super) fn stop(&self) {
        *self.lock() = Phase::Stopped;
    }

    /// Serves all that the guest has made available.
    pub(super) fn run(&self, context: &Context<'_>, vring: &Vring) {
        if let Err(error) = self.drain(context, vring) {
            let mut phase = self.lock();
            // It may have been stopped meanwhile. It cannot have been started again: only this thread does that.
            if *phase == Phase::Running {
                *phase = Phase::Broken;
            }
            context.service.server.stats().broken_queues.add(1);
            if let Some(skipped) = context.service.trouble.admit() {
                let error: &dyn std::error::Error = &error;
                warn!(
                    error,
                    queue = context.number,
                    skipped,
                    "The guest broke a queue; it is served no more"
                );
            }
        }
    }

    fn drain(&self, context: &Context<'_>, vring: &Vring) -> Result<(), Broken> {
        if !self.start(context, vring)? {
            return Ok(());
        }
        loop {
            vring.disable_notification()?;
            let stopped = loop {
                match self.one(context, vring)? {
                    Step::Served => {}
                    Step::Empty => break false,
                    Step::Stopped => break true,
                }
            };
            // A queue that was stopped may have been set up anew by now. Then another event says so.
            if stopped || !vring.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Makes a stopped queue run. `false` if it cannot.
    fn start(&self, context: &Context<'_>, vring: &Vring) -> Result<bool, Broken> {
        let mut phase = self.lock();
        let mut state = vring.get_mut();
        match *phase {
            Phase::Running => return Ok(true),
            Phase::Broken => return Ok(false),
            Phase::Stopped if !runs(&state) => return Ok(false),
            Phase::Stopped => {}
        }
        // The descriptors are the hypervisor's; a blocking one could hold the worker, and with it the connection.
        state.get_kick().iter().for_each(fd::set_nonblocking);
        state.get_call().iter().for_each(fd::set_nonblocking);
        let queue = state.get_queue_mut();
        let used = queue.next_used();
        queue.set_next_avail(used);
        if used != 0 {
            context.session.resume();
        }
        *phase = Phase::Running;
        // What was published before may never have been told.
        let _ = state.signal_used_queue();
        Ok(true)
    }

    /// Serves one request.
    fn one(&self, context: &Context<'_>, vring: &Vring) -> Result<Step, Broken> {
        let phase = self.lock();
        if *phase != Phase::Running || context.stopping.load(Ordering::Relaxed) {
            return Ok(Step::Stopped);
        }
        let memory = context.memory.memory();
        let (head, table, size) = {
            let mut state = vring.get_mut();
            if !runs(&state) {
                return Ok(Step::Stopped);
            }
            match take(&mut state, &memory)? {
                Some(head) => (head, state.get_queue().desc_table(), state.get_queue().size()),
                None => return Ok(Step::Empty),
            }
        };
        let used = match Chain::walk(&memory, table, size, head) {
            Ok(chain) => answer(context, &chain),
            Err(error) => {
                context.service.server.stats().bad_chains.add(1);
                if let Some(skipped) = context.service.trouble.admit() {
                    warn!(%error, queue = context.number, skipped, "The guest sent a bad descriptor chain");
                }
                0
            }
        };
        vring.add_used(head, used)?;
        if vring.needs_notification()? {
            // A full eventfd has told the guest already.
            let _ = vring.signal_used_queue();
        }
        Ok(Step::Served)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn runs(state: &VringState<Memory>) -> bool {
    state.get_queue().ready() && state.is_enabled()
}

fn take(state: &mut VringState<Memory>, memory: &GuestMemoryMmap) -> Result<Option<u16>, Broken> {
    let queue = state.get_queue_mut();
    let (next, size) = (queue.next_avail(), queue.size());
    let available = queue.avail_idx(memory, Ordering::Acquire)?.0;
    match available.wrapping_sub(next) {
        0 => Ok(None),
        pending if pending > size => Err(Broken::AvailableIndex { available, next, size }),
        _ => {
            let head = queue.iter(memory)?.next().ok_or(Broken::Entry)?.head_index();
            Ok(Some(head))
        }
    }
}

/// Answers a request into the guest's buffers. How many bytes of them were used.
fn answer(context: &Context<'_>, chain: &Chain<'_>) -> u32 {
    let Service { server, files, trouble } = context.service;
    let bytes = buffers::copy_in(&chain.readable, REQUEST_MAX);
    let request = Request { bytes: &bytes, total: u64::from(chain.request) };
    let room = usize::try_from(chain.room).unwrap_or(usize::MAX);
    let mut reply = Vec::new();
    match server.handle(context.session, request, room, &mut reply) {
        Outcome::Silent => return 0,
        Outcome::Reply => {}
        Outcome::Read(read) => match read_into(context.service, chain, &read, reply.len()) {
            Ok(used) => {
                buffers::copy_out(&chain.writable, &reply);
                return used;
            }
            Err(errno) => {
                server.stats().read_failures.add(1);
                if let Some(skipped) = trouble.admit() {
                    let path = files.describe(&server.tree(), read.node);
                    warn!(path, errno = %errno, skipped, "Cannot read a file of the store");
                }
                server.error(errno, read.unique, room, &mut reply);
            }
        },
    }
    u32::try_from(buffers::copy_out(&chain.writable, &reply)).unwrap_or_default()
}

fn read_into(service: &Service, chain: &Chain<'_>, read: &FileRead, header: usize) -> Result<u32, Errno> {
    let file = service.files.get(&service.server.tree(), service.server.stats(), read.node)?;
    let length = usize::try_from(read.length).map_err(|_| Errno::EINVAL)?;
    buffers::read_file(&file, read.offset, length, &chain.writable, header)?;
    u32::try_from(header).ok().and_then(|header| header.checked_add(read.length)).ok_or(Errno::EINVAL)
}
