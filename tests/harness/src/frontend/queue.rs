//! The driver's side of one split virtqueue, as Linux has it: indirect descriptors, EVENT_IDX, one descriptor for each page.

use super::{
    event::Event,
    layout::{DESCRIPTOR, Layout, PAGE, QUEUE_SIZE},
    memory::Memory,
    request::Request,
};
use anyhow::{Context, Result, ensure};
use lair_virtiofs::fuse::wire::{InHeader, OutHeader};
use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering, fence},
    },
    time::{Duration, Instant},
};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How long a reply may take. A bound against hanging, not a promise.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How replies are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// Looking at the used ring all the time: what the backend itself needs.
    Polling,
    /// Asleep until the interrupt: what a guest does whose processor has nothing else to do.
    Sleeping,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Whether it is for the reply.
    pub(super) fn is_written(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_WRITE != 0
    }
}

/// An entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Used {
    /// The slot whose request was answered, if the backend keeps to the rules.
    pub head: u32,
    /// Bytes that were written.
    pub length: u32,
}

/// A queue and its slots. It outlives connections.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<Memory>,
    layout: Layout,
    wait: Wait,
    /// The next entry of the available ring; and the index that was published, which is behind it during a batch.
    next: u16,
    published: u16,
    /// The next entry of the used ring.
    used: u16,
    /// The unique number of the last request.
    unique: u64,
    kick: Arc<Event>,
    call: Arc<Event>,
}

impl Queue {
    /// An empty queue in fresh memory.
    pub(super) fn new(memory: Arc<Memory>, layout: Layout, kick: Arc<Event>, call: Arc<Event>) -> Self {
        Self { memory, layout, wait: Wait::Sleeping, next: 0, published: 0, used: 0, unique: 0, kick, call }
    }

    /// Chooses how replies are waited for.
    pub fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
        if wait == Wait::Polling {
            // As far ahead as can be: one interrupt in 65,536 replies.
            self.index(self.layout.used_event()).store(self.used.wrapping_sub(1), Ordering::Relaxed);
        }
    }

    fn index(&self, at: usize) -> &AtomicU16 {
        self.memory.atomic(at)
    }

    /// Writes a request and its descriptors into a slot. Returns its unique number, by which its reply is told from what was
    /// there before.
    pub fn put(&mut self, slot: u16, request: &Request) -> u64 {
        // Linux counts in steps of two.
        self.unique += 2;
        let unique = self.unique;
        let (memory, layout) = (&*self.memory, self.layout);
        // All at once: what the frontend takes is in every figure of a backend, and so should be little. Otherwise each line in turn would
        // be waited for, which the backend has read last.
        layout.request_lines(slot).iter().for_each(|&line| memory.fetch::<true>(line));
        memory.fetch::<true>(layout.available_entry(self.next));
        let argument_length = request.arguments.len() as u32;
        let header = InHeader {
            len: size_of::<InHeader>() as u32 + argument_length,
            opcode: request.opcode as u32,
            unique,
            nodeid: request.node,
            ..InHeader::default()
        };
        memory.put(layout.request(slot), &header);
        memory.write(layout.arguments(slot), &request.arguments);

        let table = layout.indirect(slot);
        let mut count = 0;
        let mut add = |address: usize, length: u32, write: bool, last: bool| {
            let flags =
                (if write { VRING_DESC_F_WRITE } else { 0 }) | (if last { 0 } else { VRING_DESC_F_NEXT });
            let next = if last { 0 } else { count as u16 + 1 };
            let descriptor = Descriptor { address: address as u64, length, flags: flags as u16, next };
            memory.put(table + DESCRIPTOR * count, &descriptor);
            count += 1;
        };
        add(layout.request(slot), size_of::<InHeader>() as u32, false, false);
        if argument_length > 0 {
            add(layout.arguments(slot), argument_length, false, false);
        }
        let data = request.data as usize;
        add(layout.reply(slot), size_of::<OutHeader>() as u32, true, request.body == 0 && data == 0);
        if request.body > 0 {
            add(layout.body(slot), request.body, true, data == 0);
        }
        for begin in (0..data).step_by(PAGE) {
            let length = (data - begin).min(PAGE);
            add(layout.page(slot, begin / PAGE), length as u32, true, begin + length == data);
        }
        let indirect = Descriptor {
            address: table as u64,
            length: (DESCRIPTOR * count) as u32,
            flags: VRING_DESC_F_INDIRECT as u16,
            next: 0,
        };
        memory.put(layout.table() + DESCRIPTOR * usize::from(slot), &indirect);
        unique
    }

    /// Spoils what is where the reply to `request` goes, so that what was there before cannot pass for an answer.
    pub fn spoil(&self, slot: u16, request: &Request) {
        self.memory.fill(self.layout.body(slot), request.body as usize, 0xa5);
        let pages = (request.data as usize).div_ceil(PAGE);
        (0..pages).for_each(|page| self.memory.fill(self.layout.page(slot, page), PAGE, 0xa5));
    }

    /// Puts a slot's request into the available ring, which the backend sees with [`Queue::publish`].
    pub fn offer(&mut self, slot: u16) {
        self.memory.put(self.layout.available_entry(self.next), &slot);
        self.next = self.next.wrapping_add(1);
    }

    /// Lets the backend see what was offered, and kicks it if it wants that.
    pub fn publish(&mut self) -> Result<()> {
        let (old, new) = (self.published, self.next);
        self.published = new;
        self.index(self.layout.available_index()).store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.index(self.layout.available_event()).load(Ordering::Relaxed);
        // The rule of virtio 1.2, section 2.7.10.
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick.signal()?;
        }
        Ok(())
    }

    /// The next reply, if there is one.
    pub fn take(&mut self) -> Option<Used> {
        if self.index(self.layout.used_index()).load(Ordering::Acquire) == self.used {
            return None;
        }
        let used = self.memory.get(self.layout.used_entry(self.used));
        self.used = self.used.wrapping_add(1);
        Some(used)
    }

    /// Waits for a reply.
    pub fn wait(&mut self) -> Result<()> {
        match self.wait {
            Wait::Polling => self.spin(),
            Wait::Sleeping => self.sleep(),
        }
    }

    fn spin(&self) -> Result<()> {
        let index = self.index(self.layout.used_index());
        let begin = Instant::now();
        loop {
            for _ in 0..10_000 {
                if index.load(Ordering::Acquire) != self.used {
                    // Of a single request, this is what comes next; of others, it costs nothing.
                    self.memory.fetch::<false>(self.layout.reply(0));
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            ensure!(begin.elapsed() < PATIENCE, "No reply within {} s", PATIENCE.as_secs());
        }
    }

    fn sleep(&mut self) -> Result<()> {
        loop {
            self.index(self.layout.used_event()).store(self.used, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.index(self.layout.used_index()).load(Ordering::Acquire) != self.used {
                return Ok(());
            }
            ensure!(self.call.sleep(PATIENCE)?, "No interrupt within {} s", PATIENCE.as_secs());
        }
    }

    /// Sends one request from slot 0 of a queue that is otherwise empty, and waits for the reply's header.
    pub fn exchange(&mut self, request: &Request) -> Result<OutHeader> {
        let unique = self.put(0, request);
        self.offer(0);
        self.publish()?;
        let used = loop {
            match self.take() {
                Some(used) => break used,
                None => self.wait()?,
            }
        };
        ensure!(used.head == 0, "Slot {} was answered instead of slot 0", used.head);
        self.header(&used, unique)
    }

    /// The header of a reply, if it is one to the request with this unique number.
    pub fn header(&self, used: &Used, unique: u64) -> Result<OutHeader> {
        let header: OutHeader = self.memory.get(self.layout.reply(self.slot(used)?));
        ensure!(
            header.unique == unique && header.len == used.length,
            "Request {unique} got a reply with the header {header:?} and {} bytes",
            used.length
        );
        Ok(header)
    }

    /// The slot that was answered.
    pub fn slot(&self, used: &Used) -> Result<u16> {
        u16::try_from(used.head).context("A used entry that is no descriptor")
    }

    /// The body of a slot's reply.
    pub fn body<T: FromBytes>(&self, slot: u16) -> T {
        self.memory.get(self.layout.body(slot))
    }

    /// All of a reply behind its header.
    pub fn payload(&self, slot: u16, request: &Request, header: &OutHeader) -> Vec<u8> {
        let length = (header.len as usize).saturating_sub(size_of::<OutHeader>());
        let mut bytes = vec![0; length.min((request.body + request.data) as usize)];
        let (body, data) = bytes.split_at_mut(length.min(request.body as usize));
        self.memory.read(self.layout.body(slot), body);
        self.data(slot, data);
        bytes
    }

    /// The data of a slot's reply, page by page into `data`.
    pub fn data(&self, slot: u16, data: &mut [u8]) {
        for (page, chunk) in data.chunks_mut(PAGE).enumerate() {
            self.memory.read(self.layout.page(slot, page), chunk);
        }
    }

    /// Reads a file to where the data of a slot is, with one system call and without the backend.
    pub fn pread(&self, slot: u16, file: &File, position: u64, length: usize) -> Result<usize> {
        self.memory.pread(file, position, self.layout.data(slot), length)
    }
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR);
const _: () = assert!(QUEUE_SIZE.is_power_of_two());
