//! Seeds for [`super::super::chain`].

use super::{Seed, getattr, init, read};
use crate::{fuse::Opcode, fuzzing::chain::step};

/// The logarithm of the queue's size.
const LOG: u8 = 3;
const SIZE: u16 = 1 << LOG;

const TABLE: u32 = 0;
const AVAILABLE: u32 = 0x100;
const USED: u32 = 0x200;
const INDIRECT: u32 = 0x280;
const REQUEST: u32 = 0x400;
const REPLY: u32 = 0x1000;
/// Bytes of memory that are given.
const IMAGE: usize = 0x500;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TO_TABLE: u16 = 4;

/// Address, length, flags, next.
type Desc = (u32, u32, u16, u16);

/// An input that is being made.
struct Seeding {
    event_idx: bool,
    places: [u32; 3],
    image: Vec<u8>,
    steps: Vec<u8>,
}

impl Seeding {
    /// With a request, and chain 0 for it.
    fn new(request: &[u8], room: u32) -> Self {
        let length = u32::try_from(request.len()).unwrap();
        Self { event_idx: true, places: [TABLE, AVAILABLE, USED], image: vec![0; IMAGE], steps: Vec::new() }
            .put(REQUEST, request)
            .descriptors(TABLE, &[(REQUEST, length, NEXT, 1), (REPLY, room, WRITE, 0)])
    }

    fn put(mut self, at: u32, bytes: &[u8]) -> Self {
        let at = at as usize;
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn descriptors(self, table: u32, descriptors: &[Desc]) -> Self {
        descriptors.iter().enumerate().fold(self, |seed, (number, (at, len, flags, next))| {
            let bytes = [
                &u64::from(*at).to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ]
            .concat();
            seed.put(table + 16 * number as u32, &bytes)
        })
    }

    fn step(mut self, step: u8, bytes: &[u8]) -> Self {
        self.steps.push(step);
        self.steps.extend(bytes);
        self
    }

    fn offer(self, head: u16) -> Self {
        self.step(step::OFFER, &head.to_le_bytes())
    }

    fn run(self) -> Self {
        self.step(step::RUN, &[])
    }

    fn write(self, at: u32, bytes: &[u8]) -> Self {
        let what = [&at.to_le_bytes()[..], &[u8::try_from(bytes.len()).unwrap()], bytes].concat();
        self.step(step::WRITE, &what)
    }

    /// The device was in use before: both indexes are here.
    fn used(self, index: u16) -> Self {
        self.put(AVAILABLE + 2, &index.to_le_bytes()).put(USED + 2, &index.to_le_bytes())
    }

    fn input(self) -> Vec<u8> {
        let mut input = vec![LOG << 1 | u8::from(self.event_idx)];
        input.extend(self.places.iter().flat_map(|place| place.to_le_bytes()));
        input.extend(u16::try_from(self.image.len()).unwrap().to_le_bytes());
        input.extend(self.image);
        input.extend(self.steps);
        input
    }
}

fn asked() -> Seeding {
    Seeding::new(&getattr(1), 120).used(0xfffe)
}

/// One chain of these descriptors, with something to ask for.
fn chain(descriptors: &[Desc]) -> Vec<u8> {
    asked().descriptors(TABLE, descriptors).offer(0).run().input()
}

fn places(places: [u32; 3]) -> Vec<u8> {
    places.into_iter().flat_map(u32::to_le_bytes).collect()
}

pub(super) fn seeds() -> Vec<Seed> {
    let ask: Desc = (REQUEST, 56, NEXT, 1);
    let listing = read(Opcode::Readdirplus, 1 << 32, 0, 4096);
    let content = read(Opcode::Read, 1 << 32 | 8, 0, 4096);
    let word = u16::to_le_bytes;
    vec![
        ("init", Seeding::new(&init(7, 41, u32::MAX), 80).offer(0).run().input()),
        ("getattr", asked().offer(0).run().input()),
        ("getattr-before-init", Seeding::new(&getattr(1), 120).offer(0).run().input()),
        ("listing", Seeding::new(&listing, 4112).used(1).offer(0).run().input()),
        ("read", Seeding::new(&content, 4112).used(1).offer(0).run().input()),
        (
            "flags-instead-of-events",
            Seeding { event_idx: false, ..asked().offer(0).run().offer(0).run() }.input(),
        ),
        ("same-head-often", (0..SIZE).fold(asked(), |seed, _| seed.offer(0)).run().input()),
        ("one-too-many", (0..=SIZE).fold(asked(), |seed, _| seed.offer(0)).run().input()),
        ("bad-head", asked().offer(0).offer(SIZE).offer(0).run().input()),
        ("index-jump", asked().write(AVAILABLE + 2, &word(0x8000)).run().input()),
        ("index-back", asked().write(AVAILABLE + 2, &word(0xfffd)).run().input()),
        ("loop", chain(&[ask, (REPLY, 16, WRITE | NEXT, 1)])),
        ("next-outside", chain(&[(REQUEST, 56, NEXT, SIZE)])),
        ("read-after-write", chain(&[(REPLY, 16, WRITE | NEXT, 1), ask])),
        (
            "in-pieces",
            chain(&[
                (REQUEST, 40, NEXT, 1),
                (REQUEST + 40, 16, NEXT, 2),
                (REPLY, 16, WRITE | NEXT, 3),
                (REPLY + 16, 50, WRITE | NEXT, 4),
                (REPLY + 99, 54, WRITE, 0),
            ]),
        ),
        ("no-length", chain(&[(REQUEST, 0, NEXT, 1), (REPLY, 0, WRITE, 0)])),
        ("too-long", chain(&[ask, (REPLY, u32::MAX, WRITE, 0)])),
        ("in-a-hole", chain(&[ask, (0x4000, 120, WRITE, 0)])),
        ("across-regions", chain(&[ask, (0x2000 - 60, 120, WRITE, 0)])),
        ("into-a-hole", chain(&[ask, (0x4000 - 60, 120, WRITE, 0)])),
        ("no-room", chain(&[(REQUEST, 56, 0, 0)])),
        ("little-room", chain(&[ask, (REPLY, 15, WRITE, 0)])),
        (
            "indirect",
            asked()
                .descriptors(INDIRECT, &[ask, (REPLY, 120, WRITE, 0)])
                .descriptors(TABLE, &[(INDIRECT, 32, TO_TABLE, 0)])
                .offer(0)
                .run()
                .input(),
        ),
        (
            "indirect-nested",
            asked()
                .descriptors(INDIRECT, &[(INDIRECT, 32, TO_TABLE, 0)])
                .descriptors(TABLE, &[(INDIRECT, 32, TO_TABLE, 0)])
                .offer(0)
                .run()
                .input(),
        ),
        ("indirect-odd", chain(&[(INDIRECT, 17, TO_TABLE, 0)])),
        ("over-the-ring", chain(&[ask, (USED, 120, WRITE, 0)])),
        ("over-the-request", chain(&[ask, (REQUEST, 120, WRITE, 0)])),
        ("rings-that-overlap", Seeding { places: [TABLE, TABLE, TABLE], ..asked().offer(0).run() }.input()),
        ("ring-in-a-hole", Seeding { places: [TABLE, AVAILABLE, 0x4000], ..asked().offer(0).run() }.input()),
        (
            "ring-across-regions",
            Seeding { places: [0x2000 - 64, AVAILABLE, USED], ..asked().offer(0).run() }.input(),
        ),
        (
            "size-changes",
            asked()
                .offer(0)
                .run()
                .step(step::SIZE, &word(4))
                .offer(0)
                .run()
                .step(step::RESTART, &[])
                .run()
                .input(),
        ),
        (
            "moves",
            asked().offer(0).run().step(step::PLACES, &places([0x600, 0x700, 0x800])).offer(0).run().input(),
        ),
        ("restarts", asked().offer(0).run().offer(0).step(step::RESTART, &[]).run().input()),
        ("disabled", asked().step(step::ENABLE, &[0]).offer(0).run().step(step::ENABLE, &[1]).run().input()),
        (
            "memory-goes",
            asked()
                .offer(0)
                .run()
                .step(step::MEMORY, &[1])
                .offer(0)
                .run()
                .step(step::MEMORY, &[3])
                .offer(0)
                .run()
                .input(),
        ),
        (
            "events-change",
            asked()
                .step(step::EVENT_IDX, &[0])
                .offer(0)
                .run()
                .step(step::EVENT_IDX, &[1])
                .offer(0)
                .run()
                .input(),
        ),
    ]
}
