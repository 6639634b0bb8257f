//! One virtqueue: taking requests, answering them, publishing the replies in the order of the requests.
//!
//! Because replies are published in order, the requests that are left are always those from the used index on. So a queue that
//! starts, starts there, whatever base the frontend gives: a backend that was killed loses no request. All requests may be
//! answered twice without harm.
//!
//! What is in memory is answered at once, by the queue's own thread. A read that has to wait for a disk goes to the [`Pool`];
//! meanwhile the requests behind it are answered too, and their replies wait to be published.

use super::{
    Service,
    chain::{Chain, ChainError},
    ring::{Ring, RingError},
    sample::{Sample, TIMED},
    spin::{Pace, WINDOW},
    trail::Trail,
    vring::Vring,
};
use crate::{
    buffers,
    files::{Part, Read, Recent, Waiting},
    fuse::{FileRead, Opcode, Outcome, Request, Session, TreeCache},
    index::Tree,
    stats::Requests,
};
use nix::errno::Errno;
use std::{
    collections::VecDeque,
    hint::spin_loop,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};
use thiserror::Error;
use tracing::warn;
use vhost_user_backend::{VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The most of a request that is copied. What is served is far shorter; a long WRITE is refused by its header.
const REQUEST_MAX: usize = 8 << 10;

/// After so many requests the guest is told, and others get a look at the queue.
const BURST: u32 = 32;

/// After so many bytes of replies likewise: copying them takes longer than an interrupt.
const BURST_BYTES: u32 = 256 << 10;

/// How often the available index is looked at before the clock is.
const POLLS: u32 = 32;

/// The high-priority queue, which only brings FORGET: nobody waits for it.
const HIPRIO: usize = 0;

/// One virtqueue of a connection.
pub(super) struct Queue {
    pub(super) service: Arc<Service>,
    pub(super) session: Arc<Session>,
    pub(super) memory: Memory,
    /// How often the memory was replaced. Asking this is cheaper than asking for the memory.
    pub(super) moves: Arc<AtomicU64>,
    /// The connection is over.
    pub(super) stopping: Arc<AtomicBool>,
    /// Those of all queues.
    pub(super) vrings: Arc<OnceLock<Vec<Vring>>>,
    /// For log lines, and for which queues poll.
    pub(super) number: usize,
    /// Only to be added to with the state locked.
    pub(super) stats: Arc<Requests>,
    /// Locked before the vring is.
    pub(super) state: Mutex<State>,
}

/// What is kept for a queue besides the library's state, whose next available index is always the next used one here: what is
/// taken but not published would be taken again after a stop.
pub(super) struct State {
    phase: Phase,
    /// Its size in descriptors, which is fixed while it runs.
    size: u16,
    /// Counts starts and stops, so that a read that began before one is not published after it.
    epoch: u64,
    /// Requests taken and not yet published, the oldest first. Empty unless that one waits for a disk.
    pending: VecDeque<Pending>,
    pace: Pace,
    sample: Sample,
    /// Where it is, once it has run.
    vring: Option<Vring>,
    scratch: Box<Scratch>,
}

/// Private memory for one request and its reply, so that serving allocates nothing.
struct Scratch {
    request: [u8; REQUEST_MAX],
    reply: Vec<u8>,
    trail: Trail,
    recent: Recent,
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

/// A request that was taken.
#[derive(Debug, Clone, Copy)]
struct Pending {
    head: u16,
    answer: Answer,
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    /// So many bytes of the chain were used.
    Used(u32),
    /// It waits for a disk, since then.
    Waits(FileRead, Instant),
}

/// How a burst ended.
enum Burst {
    /// There may be more.
    More,
    /// Nothing is left. The guest was not asked for a kick.
    Empty(Watch),
    /// The queue is somewhere else by now.
    Moved,
    /// The queue does not run.
    Stopped,
}

/// What to look for next.
struct Watch {
    /// The number of the next request.
    next: u16,
    /// Whether to poll for it.
    polls: bool,
    /// Since when, once that is known.
    since: Option<Instant>,
}

/// How a guest breaks a queue.
#[derive(Debug, Error)]
enum Broken {
    #[error("The available index is {available} where {next} is next, in a queue of {size}")]
    AvailableIndex { available: u16, next: u16, size: u16 },
    #[error("A chain begins at descriptor {head}, in a queue of {size}")]
    Head { head: u16, size: u16 },
    #[error("The size of the queue changed from {from} to {to} while it ran")]
    Size { from: u16, to: u16 },
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Queue {
    /// Gives up what is not published. The queue then is as new.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.phase = Phase::Stopped;
        state.forget();
    }

    /// Serves all that the guest has made available.
    pub(super) fn run(self: &Arc<Self>, vring: &Vring) {
        if let Err(error) = self.serve(vring) {
            self.broke(&error);
        }
    }

    fn broke(&self, error: &Broken) {
        let mut state = self.lock();
        // It may have been stopped meanwhile.
        if state.phase == Phase::Running {
            state.phase = Phase::Broken;
            state.forget();
        }
        drop(state);
        self.service.events.broken_queues.add(1);
        if let Some(skipped) = self.service.trouble.admit() {
            let error: &dyn std::error::Error = error;
            warn!(error, queue = self.number, skipped, "The guest broke a queue; it is served no more");
        }
    }

    fn serve(self: &Arc<Self>, vring: &Vring) -> Result<(), Broken> {
        if !self.start(vring)? {
            return Ok(());
        }
        loop {
            let memory = self.memory.memory();
            let ring = Ring::new(&memory, vring.get_ref().get_queue())?;
            if !self.serve_ring(vring, &ring)? {
                return Ok(());
            }
        }
    }

    /// Serves until nothing is left, or the ring is no longer the queue's. Whether it is the latter.
    fn serve_ring(self: &Arc<Self>, vring: &Vring, ring: &Ring<'_>) -> Result<bool, Broken> {
        let mut found = false;
        let mut tree = self.service.server.cache();
        loop {
            match self.burst(vring, ring, &mut tree, found)? {
                Burst::More => found = false,
                Burst::Moved => return Ok(true),
                Burst::Stopped => return Ok(false),
                Burst::Empty(mut watch) => {
                    found = self.poll(ring, &mut watch)?;
                    if !found && !self.sleep(vring, ring, &watch)? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Makes a stopped queue run. `false` if it cannot.
    fn start(&self, place: &Vring) -> Result<bool, Broken> {
        // Whether any queue was in use before this connection: this one may be used for the first time.
        let resumes = || self.vrings.get().is_some_and(|vrings| vrings.iter().any(Vring::was_in_use));
        if !self.session.is_live() && resumes() {
            self.session.resume();
        }
        let mut state = self.lock();
        match state.phase {
            Phase::Running => {
                state.pace.wakes(Instant::now());
                return Ok(true);
            }
            Phase::Broken => return Ok(false),
            Phase::Stopped => {}
        }
        let mut vring = place.get_mut();
        if !runs(&vring) {
            return Ok(false);
        }
        let queue = vring.get_queue_mut();
        let used = queue.next_used();
        queue.set_next_avail(used);
        state.phase = Phase::Running;
        state.size = queue.size();
        state.vring = Some(place.clone());
        state.forget();
        // What was published before may never have been told.
        let _ = vring.signal_used_queue();
        Ok(true)
    }

    /// Serves what is available or, by polling, soon becomes so, up to a limit, and tells the guest. `found`: polling found it.
    fn burst(
        self: &Arc<Self>,
        vring: &Vring,
        ring: &Ring<'_>,
        tree: &mut TreeCache,
        found: bool,
    ) -> Result<Burst, Broken> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.phase != Phase::Running || self.stopping.load(Ordering::Relaxed) {
            return Ok(Burst::Stopped);
        }
        let mut vring = vring.get_mut();
        if !runs(&vring) {
            return Ok(Burst::Stopped);
        }
        state.check_size(vring.get_queue())?;
        let moves = self.moves.load(Ordering::Acquire);
        if !ring.is_of(&self.memory.memory(), vring.get_queue()) {
            return Ok(Burst::Moved);
        }
        if found {
            state.scratch.trail.fetch();
            state.pace.hit();
        }
        ring.want_no_kick()?;
        let mut begin = vring.get_queue().next_used();
        let mut used = begin;
        let (mut count, mut bytes) = (0u32, 0u32);
        // Of the last request.
        let (mut chain, mut last) = (Chain::default(), None);
        let end = loop {
            if count >= BURST || bytes >= BURST_BYTES {
                break Burst::More;
            }
            let Some(head) = state.take(ring, used)? else {
                let polls = self.number != HIPRIO && state.pace.polls();
                let mut watch = Watch { next: state.next(used), polls, since: None };
                // What waits for a disk needs the lock. Otherwise letting go of it would only cost time.
                if !state.pending.is_empty() {
                    break Burst::Empty(watch);
                }
                self.published(ring, &mut vring, begin, used)?;
                begin = used;
                // The guest has its reply, so there is time now.
                if let Some(head) = last.take() {
                    state.scratch.trail.keep(ring.descriptor(head), &chain);
                }
                if !self.poll(ring, &mut watch)? {
                    break Burst::Empty(watch);
                }
                ring.fetch(used);
                state.scratch.trail.fetch();
                state.pace.hit();
                // Memory is changed without these locks; the queue is not.
                if self.moves.load(Ordering::Acquire) != moves {
                    break Burst::Moved;
                }
                continue;
            };
            count = count.saturating_add(1);
            let since = state.sample.is_timed().then(Instant::now);
            last = Some(head);
            let (opcode, answer) =
                self.answer(&mut state.scratch, ring, tree.load(), head, &mut chain, since);
            match answer {
                Answer::Used(length) => {
                    if state.pending.is_empty() {
                        ring.publish(used, head, length)?;
                        used = used.wrapping_add(1);
                    } else {
                        state.pending.push_back(Pending { head, answer });
                    }
                    bytes = bytes.saturating_add(length);
                    if let Some(since) = since {
                        self.stats.of(opcode).latency.add(since.elapsed(), TIMED);
                    }
                }
                Answer::Waits(read, _) => {
                    state.pending.push_back(Pending { head, answer });
                    self.warm(state, used, &read);
                }
            }
        };
        self.published(ring, &mut vring, begin, used)?;
        Ok(end)
    }

    /// Has a part of a file read by the pool; then the request is answered.
    fn warm(self: &Arc<Self>, state: &State, used: u16, read: &FileRead) {
        self.stats.cold_reads.add(1);
        let behind = u16::try_from(state.pending.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let index = used.wrapping_add(behind);
        let (queue, service, epoch, read) = (Arc::downgrade(self), self.service.clone(), state.epoch, *read);
        self.service.pool.run(move || {
            let Service { server, files, .. } = &*service;
            files.warm(&server.tree(), read.node, read.offset, u64::from(read.length));
            // The connection may be over.
            if let Some(queue) = Weak::upgrade(&queue) {
                queue.finish(epoch, index).unwrap_or_else(|error| queue.broke(&error));
            }
        });
    }

    /// Answers a request whose contents are in memory by now, and publishes it with what it held up.
    fn finish(&self, epoch: u64, index: u16) -> Result<(), Broken> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(vring) =
            state.vring.clone().filter(|_| state.phase == Phase::Running && state.epoch == epoch)
        else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let mut vring = vring.get_mut();
        if !runs(&vring) {
            // When it runs again, what is not published is taken again.
            state.phase = Phase::Stopped;
            state.forget();
            return Ok(());
        }
        state.check_size(vring.get_queue())?;
        let ring = Ring::new(&memory, vring.get_queue())?;
        let begin = vring.get_queue().next_used();
        let place = usize::from(index.wrapping_sub(begin));
        let Some(&Pending { head, answer: Answer::Waits(read, since) }) = state.pending.get(place) else {
            return Ok(());
        };
        let mut chain = Chain::default();
        let answer = match ring.find(head, &mut chain) {
            Ok(()) => {
                let Scratch { reply, recent, .. } = &mut *state.scratch;
                read.header(reply);
                self.read(&self.service.server.tree(), reply, recent, &chain, &read, Waiting::Allowed)
            }
            Err(error) => self.bad_chain(&error),
        };
        if let Some(pending) = state.pending.get_mut(place) {
            pending.answer = answer;
        }
        self.stats.of(Some(Opcode::Read)).latency.add(since.elapsed(), 1);
        let mut used = begin;
        while let Some(Pending { head, answer: Answer::Used(length) }) = state.pending.front() {
            ring.publish(used, *head, *length)?;
            used = used.wrapping_add(1);
            state.pending.pop_front();
        }
        self.published(&ring, &mut vring, begin, used)
    }

    /// Records what was published, and interrupts the guest if it wants that.
    fn published(
        &self,
        ring: &Ring<'_>,
        vring: &mut VringState<Memory>,
        from: u16,
        to: u16,
    ) -> Result<(), Broken> {
        let queue = vring.get_queue_mut();
        queue.set_next_used(to);
        queue.set_next_avail(to);
        if ring.wants_interrupt(from, to)? {
            // A full eventfd has told the guest already.
            let _ = vring.signal_used_queue();
        }
        Ok(())
    }

    /// Polls for the next request, if that is thought to pay. Whether there is something to do.
    fn poll(&self, ring: &Ring<'_>, watch: &mut Watch) -> Result<bool, Broken> {
        if !watch.polls {
            return Ok(false);
        }
        loop {
            for _ in 0..POLLS {
                if ring.available()? != watch.next {
                    return Ok(true);
                }
                spin_loop();
            }
            let now = Instant::now();
            let since = *watch.since.get_or_insert(now);
            if self.stopping.load(Ordering::Relaxed) || now.saturating_duration_since(since) > WINDOW {
                return Ok(false);
            }
        }
    }

    /// Asks for a kick. Whether there is something to do after all.
    fn sleep(&self, vring: &Vring, ring: &Ring<'_>, watch: &Watch) -> Result<bool, Broken> {
        let mut state = self.lock();
        let vring = vring.get_ref();
        if state.phase != Phase::Running || !ring.is_of(&self.memory.memory(), vring.get_queue()) {
            return Ok(true);
        }
        let now = Instant::now();
        if watch.polls {
            state.pace.miss(now.saturating_duration_since(watch.since.unwrap_or(now)));
        }
        ring.want_kick(watch.next)?;
        let more = ring.available()? != watch.next;
        if !more {
            state.pace.sleeps(now);
        }
        Ok(more)
    }

    /// Answers a request, or says what it waits for. `since`: when it was taken, if it is timed; then its opcode is told as well.
    fn answer<'m>(
        &self,
        scratch: &mut Scratch,
        ring: &Ring<'m>,
        tree: &Tree,
        head: u16,
        chain: &mut Chain<'m>,
        since: Option<Instant>,
    ) -> (Option<Opcode>, Answer) {
        if let Err(error) = ring.find(head, chain) {
            return (None, self.bad_chain(&error));
        }
        let Scratch { request, reply, recent, .. } = scratch;
        let count = buffers::copy_in(&chain.readable, request);
        let bytes = request.get(..count).unwrap_or_default();
        let request = Request { bytes, total: u64::from(chain.request) };
        let server = &self.service.server;
        let answer = match server.handle(tree, &self.session, &self.stats, request, room(chain), reply) {
            Outcome::Silent => Answer::Used(0),
            Outcome::Reply => reply_with(chain, reply),
            Outcome::Read(read) => self.read(tree, reply, recent, chain, &read, Waiting::Refused { since }),
        };
        (since.and_then(|_| request.opcode()), answer)
    }

    fn bad_chain(&self, error: &ChainError) -> Answer {
        self.stats.bad_chains.add(1);
        if let Some(skipped) = self.service.trouble.admit() {
            warn!(%error, queue = self.number, skipped, "The guest sent a bad descriptor chain");
        }
        Answer::Used(0)
    }

    /// Replies with what is in a file. `reply` begins with the header for that.
    #[inline(always)]
    fn read(
        &self,
        tree: &Tree,
        reply: &mut Vec<u8>,
        recent: &mut Recent,
        chain: &Chain<'_>,
        read: &FileRead,
        waiting: Waiting,
    ) -> Answer {
        let Service { server, files, trouble, .. } = &*self.service;
        match self.read_into(tree, recent, chain, read, reply.len(), waiting) {
            Ok(Read::WouldWait) => Answer::Waits(*read, Instant::now()),
            Ok(Read::Done) => match reply_with(chain, reply) {
                Answer::Used(header) => Answer::Used(header.saturating_add(read.length)),
                answer => answer,
            },
            Err(errno) => {
                self.stats.read_failures.add(1);
                if let Some(skipped) = trouble.admit() {
                    let path = files.describe(tree, read.node);
                    warn!(path, errno = %errno, skipped, "Cannot read a file of the store");
                }
                server.error(errno, read.unique, room(chain), reply);
                reply_with(chain, reply)
            }
        }
    }

    fn read_into(
        &self,
        tree: &Tree,
        recent: &mut Recent,
        chain: &Chain<'_>,
        read: &FileRead,
        header: usize,
        waiting: Waiting,
    ) -> Result<Read, Errno> {
        let files = &self.service.files;
        let length = usize::try_from(read.length).map_err(|_| Errno::EINVAL)?;
        let to = Part::of(&chain.writable, room(chain), header, length).ok_or(Errno::EINVAL)?;
        match recent.get(files, tree, read.node, waiting == Waiting::Allowed)? {
            Some(file) => file.read(read.offset, to, waiting),
            None => Ok(Read::WouldWait),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// That of one of so many queues.
    pub(super) fn one_of(queues: usize) -> Self {
        let recent = Recent::one_of(queues);
        let scratch =
            Scratch { request: [0; REQUEST_MAX], reply: Vec::new(), trail: Trail::default(), recent };
        Self {
            phase: Phase::default(),
            size: 0,
            epoch: 0,
            pending: VecDeque::new(),
            pace: Pace::default(),
            sample: Sample::default(),
            vring: None,
            scratch: Box::new(scratch),
        }
    }

    /// Gives up what is not published.
    fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.pending.clear();
    }

    /// Whether the queue has the size that it started with.
    fn check_size(&self, queue: &virtio_queue::Queue) -> Result<(), Broken> {
        let (from, to) = (self.size, queue.size());
        if from == to { Ok(()) } else { Err(Broken::Size { from, to }) }
    }

    /// The number of the next request to take, where `used` is the next to publish.
    fn next(&self, used: u16) -> u16 {
        // There are no more than the queue is large.
        used.wrapping_add(u16::try_from(self.pending.len()).unwrap_or(u16::MAX))
    }

    /// Takes the head of the next request.
    fn take(&self, ring: &Ring<'_>, used: u16) -> Result<Option<u16>, Broken> {
        let (next, size) = (self.next(used), ring.size());
        let available = ring.available()?;
        if available == next {
            return Ok(None);
        }
        // All that the guest may have in flight at once.
        if available.wrapping_sub(used) > size {
            return Err(Broken::AvailableIndex { available, next, size });
        }
        match ring.head(next)? {
            head if head < size => Ok(Some(head)),
            // It cannot be returned.
            head => Err(Broken::Head { head, size }),
        }
    }
}

fn runs(state: &VringState<Memory>) -> bool {
    state.get_queue().ready() && state.is_enabled()
}

fn room(chain: &Chain<'_>) -> usize {
    usize::try_from(chain.room).unwrap_or(usize::MAX)
}

fn reply_with(chain: &Chain<'_>, reply: &[u8]) -> Answer {
    Answer::Used(u32::try_from(buffers::copy_out(&chain.writable, reply)).unwrap_or_default())
}
