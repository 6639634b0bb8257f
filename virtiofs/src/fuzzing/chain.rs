//! One virtqueue in a guest's memory, set up and changed as an input says, run by the real queue.
//!
//! An input is: flags (1 event indexes; from bit 1 the size's logarithm), where table, available and used ring are (32 bits each),
//! the length of what the memory begins with (16 bits) and that, then steps until its end. Memory is two regions that touch and
//! a third one behind a hole.

use super::{
    input::Input,
    model::{Ring, Snapshot},
    world::World,
};
use crate::vhost::fuzzing::{OneQueue, Places};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The regions of memory.
pub(super) const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x2000), (0x8000, 0x1000)];

/// The most steps of one input.
const STEPS: usize = 64;

/// What is done to the queue. On the wire a step is its number and what belongs to it.
pub(super) mod step {
    /// A kick.
    pub(in super::super) const RUN: u8 = 0;
    /// The guest writes: address (32 bits), length (8 bits), bytes.
    pub(in super::super) const WRITE: u8 = 1;
    /// The guest makes a chain available as a driver does: its head (16 bits).
    pub(in super::super) const OFFER: u8 = 2;
    /// SET_VRING_NUM: the size (16 bits).
    pub(in super::super) const SIZE: u8 = 3;
    /// SET_VRING_ADDR: three addresses (32 bits each).
    pub(in super::super) const PLACES: u8 = 4;
    /// GET_VRING_BASE, and everything set up anew.
    pub(in super::super) const RESTART: u8 = 5;
    /// SET_VRING_ENABLE: whether (8 bits).
    pub(in super::super) const ENABLE: u8 = 6;
    /// REM_MEM_REG or ADD_MEM_REG: how many of the regions are there (8 bits).
    pub(in super::super) const MEMORY: u8 = 7;
    /// Event indexes or not (8 bits).
    pub(in super::super) const EVENT_IDX: u8 = 8;
    /// How many there are.
    pub(super) const COUNT: u8 = 9;
}

/// The queue, and what a driver knows of it.
struct Bench {
    queue: OneQueue,
    memory: GuestMemoryMmap,
    /// How many of the regions there are.
    regions: usize,
    size: u16,
    /// The size at the last start.
    started: u16,
    places: Places,
    /// The places are such that the device took them.
    placed: bool,
    enabled: bool,
    /// It was given up, and not set up anew.
    broken: bool,
    /// It ran since it was set up anew.
    running: bool,
    /// Where the device goes on.
    next: u16,
    /// It ran since it was told its places, so that what it says of them is true.
    exact: bool,
}

/// Does what an input says.
pub fn chain(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let size = 1u16 << (flags >> 1 & 15).min(10);
    let places = [input.u32(), input.u32(), input.u32()].map(u64::from);
    let mut bench = Bench::new(size, places, flags & 1 != 0, &mut input);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % step::COUNT {
            step::RUN => {
                if !bench.run() {
                    return;
                }
            }
            step::WRITE => {
                let at = GuestAddress(u64::from(input.u32()));
                let count = usize::from(input.u8());
                let _ = bench.memory.write(input.bytes(count), at);
            }
            step::OFFER => bench.offer(input.u16()),
            step::SIZE => {
                let size = input.u16();
                bench.queue.set_size(size);
                if size.is_power_of_two() && size <= 1024 {
                    bench.size = size;
                }
            }
            step::PLACES => bench.place([input.u32(), input.u32(), input.u32()].map(u64::from)),
            step::RESTART => {
                let base = bench.queue.stop();
                assert!(!bench.exact || base == bench.next, "{base} is no base, {} is", bench.next);
                (bench.broken, bench.running) = (false, false);
                bench.place(bench.places);
                bench.queue.start();
            }
            step::ENABLE => {
                bench.enabled = input.u8() & 1 != 0;
                bench.queue.set_enabled(bench.enabled);
            }
            step::MEMORY => bench.shrink(usize::from(input.u8() & 3)),
            _ => bench.queue.set_event_idx(input.u8() & 1 != 0),
        }
    }
    bench.run();
}

impl Bench {
    fn new(size: u16, places: Places, event_idx: bool, input: &mut Input<'_>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&REGIONS.map(|(at, len)| (GuestAddress(at), len))).unwrap();
        let length = usize::from(input.u16());
        let _ = memory.write(input.bytes(length), GuestAddress(0));
        let queue = OneQueue::new(&World::get().service, memory.clone());
        queue.set_size(size);
        queue.set_event_idx(event_idx);
        queue.set_enabled(true);
        queue.start();
        let mut bench = Self {
            queue,
            memory,
            regions: REGIONS.len(),
            size,
            started: size,
            places,
            placed: false,
            enabled: true,
            broken: false,
            running: false,
            next: 0,
            exact: false,
        };
        bench.place(places);
        bench
    }

    fn place(&mut self, places: Places) {
        self.exact = false;
        self.places = places;
        self.placed = self.queue.set_places(places);
        if let Some(used) = self.word(places[2] + 2)
            && self.placed
        {
            self.next = used;
        }
    }

    /// Takes regions away, or puts them back with what was in them.
    fn shrink(&mut self, count: usize) {
        self.regions = count.clamp(1, REGIONS.len());
        let ranges: Vec<_> =
            REGIONS.iter().take(self.regions).map(|&(at, len)| (GuestAddress(at), len)).collect();
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for (at, len) in ranges {
            let mut bytes = vec![0; len];
            if self.memory.read_slice(&mut bytes, at).is_ok() {
                memory.write_slice(&bytes, at).unwrap();
            }
        }
        self.queue.set_memory(memory.clone());
        self.memory = memory;
    }

    fn word(&self, at: u64) -> Option<u16> {
        self.memory.read_obj(GuestAddress(at)).ok()
    }

    fn offer(&mut self, head: u16) {
        let at = self.places[1];
        let Some(index) = self.word(at + 2) else { return };
        let slot = u64::from(index % self.size.max(1));
        let _ = self.memory.write_obj(head, GuestAddress(at + 4 + 2 * slot));
        let _ = self.memory.write_obj(index.wrapping_add(1), GuestAddress(at + 2));
    }

    /// Lets the queue run, and checks what came of it. `false` if that cannot be told, now and later.
    fn run(&mut self) -> bool {
        let events = &World::get().service.events.broken_queues;
        let (before, cold) = (events.get(), self.queue.cold_reads());
        let snapshot = Snapshot::of(&self.memory, &REGIONS[..self.regions]);
        self.queue.run();
        let broke = events.get() != before;
        if !self.placed || self.queue.cold_reads() != cold {
            return false;
        }
        let after = Snapshot::of(&self.memory, &REGIONS[..self.regions]);
        if self.broken || !self.enabled {
            assert!(!broke || self.running && !self.broken, "a queue broke that did not run");
            assert!(after == snapshot, "a queue that does not run was served");
            self.broken |= broke;
            return true;
        }
        if !self.running {
            (self.running, self.started) = (true, self.size);
        }
        let ring = Ring { places: self.places, size: self.size };
        let Some(expected) = snapshot.expect(&ring, self.next, self.size == self.started) else {
            // Replies landed on rings, tables or requests: the guest has done that to itself, and only it knows what came of it.
            return false;
        };
        assert_eq!(broke, expected.breaks, "at {} in {ring:?}", self.next);
        after.check(&snapshot, &ring, self.next, &expected);
        (self.broken, self.exact) = (broke, !broke);
        self.next = self.next.wrapping_add(expected.taken.len() as u16);
        true
    }
}
