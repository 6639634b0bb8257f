//! Seeds for [`super::super::session`].

use super::{Seed, getattr, init};
use crate::fuzzing::session::{MEMORY, kind, step};

/// Where the hypervisor has the guest's memory.
const USER: u64 = 0x7f00_0000_0000;

const VERSION: u8 = 1;
const NEED_REPLY: u8 = 8;

/// Of each of the two queues.
const SIZE: u32 = 8;

#[derive(Clone, Default)]
struct Seeding(Vec<u8>);

impl Seeding {
    fn message(mut self, request: u8, body: &[u8], kinds: &[u8]) -> Self {
        let length = u8::try_from(body.len()).unwrap();
        self.0.extend([step::MESSAGE, request, VERSION | NEED_REPLY, length, kinds.len() as u8]);
        self.0.extend(kinds);
        self.0.extend(body);
        self
    }

    fn words(self, request: u8, words: &[u32], kinds: &[u8]) -> Self {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.message(request, &body, kinds)
    }

    fn longs(self, request: u8, longs: &[u64], kinds: &[u8]) -> Self {
        let body: Vec<u8> = longs.iter().flat_map(|long| long.to_le_bytes()).collect();
        self.message(request, &body, kinds)
    }

    fn write(mut self, at: u32, bytes: &[u8]) -> Self {
        self.0.push(step::WRITE);
        self.0.extend(at.to_le_bytes());
        self.0.push(u8::try_from(bytes.len()).unwrap());
        self.0.extend(bytes);
        self
    }

    fn kick(mut self, queue: u8) -> Self {
        self.0.extend([step::KICK, queue, step::WAIT]);
        self
    }

    /// The short file becomes shorter.
    fn cut(mut self) -> Self {
        self.0.push(step::CUT);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend([step::BYTES, u8::try_from(bytes.len()).unwrap()]);
        self.0.extend(bytes);
        self
    }

    /// Up to the features.
    fn begun() -> Self {
        Self::default()
            .message(3, &[], &[])
            .message(1, &[], &[])
            .message(15, &[], &[])
            .longs(16, &[1 << 0 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15], &[])
            .longs(2, &[1 << 28 | 1 << 29 | 1 << 30 | 1 << 32], &[])
    }

    fn memory(self) -> Self {
        self.longs(5, &[1, 0, MEMORY, USER, 0], &[kind::MEMORY])
    }

    fn queue(self, queue: u8) -> Self {
        let (at, number) = (USER + u64::from(queue) * 0x1000, u32::from(queue));
        let event = kind::EVENT[usize::from(queue)];
        self.words(8, &[number, SIZE], &[])
            .words(10, &[number, 0], &[])
            .longs(9, &[u64::from(queue), at, at + 0x200, at + 0x100, 0], &[])
            .longs(13, &[u64::from(queue)], &[event])
            .longs(12, &[u64::from(queue)], &[event])
            .words(18, &[number, 1], &[])
    }

    /// All of it.
    fn running() -> Self {
        Self::begun().memory().queue(0).queue(1)
    }

    /// Puts a request into the queue, as number `index`.
    fn ask(self, request: &[u8], room: u32, index: u16) -> Self {
        let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
            [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        };
        let table = [descriptor(0x4000, request.len() as u32, 1, 1), descriptor(0x8000, room, 2, 0)].concat();
        self.write(0x4000, request)
            .write(0x1000, &table)
            .write(0x1104 + 2 * (u32::from(index) % SIZE), &[0, 0])
            .write(0x1102, &(index + 1).to_le_bytes())
            .kick(1)
    }

    fn served() -> Self {
        Self::running().ask(&init(7, 41, u32::MAX), 80, 0).ask(&getattr(1), 120, 1)
    }
}

pub(super) fn seeds() -> Vec<Seed> {
    let region = |gpa: u64| [0, gpa, 4096, USER + (1 << 40) + gpa, 0];
    let used = Seeding::served;
    vec![
        ("served", used()),
        ("disconnects", Seeding::running()),
        ("handshake", Seeding::begun()),
        ("nothing", Seeding::default().bytes(&[3, 0, 0, 0, 1])),
        ("not-a-message", Seeding::default().bytes(&[0xff; 64])),
        ("stops", used().words(11, &[1, 0], &[]).ask(&getattr(1), 120, 2).queue(1).kick(1)),
        ("resets", used().message(34, &[], &[]).ask(&getattr(1), 120, 2).words(18, &[1, 1], &[]).kick(1)),
        ("other-size", used().words(8, &[1, 4], &[]).ask(&getattr(1), 120, 2)),
        ("other-place", used().longs(9, &[1, USER + 0x2000, USER + 0x2200, USER + 0x2100, 0], &[]).kick(1)),
        ("disabled", used().words(18, &[1, 0], &[]).ask(&getattr(1), 120, 2).words(18, &[1, 1], &[])),
        (
            "memory-goes",
            used()
                .longs(38, &[0, 0, MEMORY, USER, 0], &[])
                .ask(&getattr(1), 120, 2)
                .longs(37, &[0, 0, MEMORY, USER, 0], &[kind::MEMORY])
                .kick(1),
        ),
        (
            "memory-comes",
            used().longs(37, &region(1 << 30), &[kind::SHORT]).longs(38, &region(1 << 30), &[]).kick(1),
        ),
        (
            "memory-that-is-cut",
            used().longs(37, &region(1 << 30), &[kind::SHORT]).cut().ask(&getattr(1), 120, 2),
        ),
        ("memory-that-is-none", used().longs(37, &region(1 << 30), &[kind::PIPE])),
        ("memory-that-is-short", Seeding::begun().longs(5, &[1, 0, MEMORY, USER, 0], &[kind::SHORT])),
        (
            "memory-that-overlaps",
            Seeding::begun().longs(5, &[2, 0, 4096, USER, 0, 2048, 4096, USER + 4096, 0], &[kind::MEMORY; 2]),
        ),
        (
            "memory-in-two",
            Seeding::begun()
                .longs(
                    5,
                    &[2, 0, 0x8000, USER, 0, 0x8000, MEMORY - 0x8000, USER + 0x8000, 0x8000],
                    &[kind::MEMORY; 2],
                )
                .queue(1)
                .ask(&getattr(1), 120, 0),
        ),
        ("memory-without-descriptors", Seeding::begun().longs(5, &[1, 0, MEMORY, USER, 0], &[])),
        (
            "kinds-of-kicks",
            Seeding::begun()
                .memory()
                .queue(1)
                .longs(12, &[1], &[kind::PIPE])
                .longs(12, &[1], &[kind::SOCKET])
                .longs(12, &[1], &[kind::NULL]),
        ),
        (
            "kinds-of-calls",
            used()
                .longs(13, &[1], &[kind::SOCKET])
                .ask(&getattr(1), 120, 2)
                .longs(13, &[1], &[kind::NULL])
                .longs(13, &[1 | 256], &[]),
        ),
        (
            "surplus-descriptors",
            used().longs(38, &region(1 << 30), &[kind::MEMORY; 32]).message(1, &[], &[kind::NULL; 8]),
        ),
        (
            "configuration",
            Seeding::begun()
                .words(24, &[0, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[])
                .words(24, &[36, 4, 0, 0], &[])
                .message(17, &[], &[])
                .message(36, &[], &[]),
        ),
        (
            "not-offered",
            Seeding::begun().longs(16, &[u64::MAX], &[]).longs(6, &[4096, 0], &[kind::MEMORY]).longs(
                31,
                &[4096, 0, 0x40_0002],
                &[],
            ),
        ),
        ("features-later", used().longs(2, &[1 << 28 | 1 << 30 | 1 << 32], &[]).ask(&getattr(1), 120, 2)),
        (
            "without-protocol-features",
            Seeding::default()
                .message(3, &[], &[])
                .message(1, &[], &[])
                .longs(2, &[1 << 32], &[])
                .memory()
                .queue(1)
                .ask(&getattr(1), 120, 0),
        ),
        ("rings-nowhere", Seeding::begun().memory().longs(9, &[1, 0x1000, 0x1200, 0x1100, 0], &[])),
        (
            "rings-in-one-place",
            Seeding::begun()
                .memory()
                .longs(9, &[1, USER, USER, USER, 0], &[])
                .longs(12, &[1], &[kind::EVENT[0]])
                .words(18, &[1, 1], &[]),
        ),
    ]
    .into_iter()
    .map(|(name, Seeding(input))| (name, input))
    .collect()
}
