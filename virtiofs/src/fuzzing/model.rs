//! What a virtqueue should do, worked out as simply as can be from what is in memory before it runs.

use super::reply;
use crate::vhost::fuzzing::Places;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The largest request that is copied, as the queue has it.
const REQUEST_MAX: u64 = 8 << 10;

/// Where a ring is.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) places: Places,
    pub(super) size: u16,
}

impl Ring {
    /// The table, the available and the used ring.
    fn parts(&self) -> [Range<u64>; 3] {
        let size = u64::from(self.size);
        let [table, available, used] = self.places;
        [table..table + 16 * size, available..available + 6 + 2 * size, used..used + 6 + 8 * size]
    }
}

/// What guest memory held: regions, in their order.
#[derive(PartialEq, Eq)]
pub(super) struct Snapshot(Vec<(u64, Vec<u8>)>);

/// What should come of a run.
pub(super) struct Expected {
    /// The heads that are taken, and their chains if they are any.
    pub(super) taken: Vec<(u16, Option<Buffers>)>,
    /// Whether the queue then is given up.
    pub(super) breaks: bool,
}

/// The buffers of a chain.
#[derive(Default)]
pub(super) struct Buffers {
    readable: Vec<Range<u64>>,
    writable: Vec<Range<u64>>,
    tables: Vec<Range<u64>>,
}

fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start || a.is_empty() || b.is_empty()
}

fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

impl Snapshot {
    pub(super) fn of(memory: &GuestMemoryMmap, regions: &[(u64, usize)]) -> Self {
        let region = |&(at, len): &(u64, usize)| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            (at, bytes)
        };
        Self(regions.iter().map(region).collect())
    }

    /// What is in a region from an address on.
    fn from(&self, at: u64) -> Option<&[u8]> {
        let rest = |(begin, bytes): &&(u64, Vec<u8>)| {
            at.checked_sub(*begin).is_some_and(|offset| offset < bytes.len() as u64)
        };
        self.0.iter().find(rest).map(|(begin, bytes)| &bytes[(at - begin) as usize..])
    }

    /// What is in a range of addresses, if all of it is memory, in however many regions.
    fn pieces(&self, range: &Range<u64>) -> Option<Vec<&[u8]>> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let piece = self.from(at)?;
            let piece = &piece[..piece.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX))];
            pieces.push(piece);
            at += piece.len() as u64;
        }
        Some(pieces)
    }

    /// Whether it is all in one region.
    fn has(&self, range: &Range<u64>) -> bool {
        self.from(range.start).is_some_and(|bytes| bytes.len() as u64 >= range.end - range.start)
    }

    fn bytes(&self, range: Range<u64>) -> Option<Vec<u8>> {
        self.pieces(&range).map(|pieces| pieces.concat())
    }

    fn word(&self, at: u64) -> u16 {
        self.bytes(at..at + 2).map_or(0, |bytes| number(&bytes) as u16)
    }

    /// The first bytes of ranges.
    fn gather(&self, ranges: &[Range<u64>], most: u64) -> Vec<u8> {
        ranges
            .iter()
            .filter_map(|range| self.pieces(range))
            .flatten()
            .flatten()
            .take(most as usize)
            .copied()
            .collect()
    }

    /// What should come of a run that begins at index `next`. `None` if what is written changes what this depends on.
    pub(super) fn expect(&self, ring: &Ring, next: u16, same_size: bool) -> Option<Expected> {
        let broken = Some(Expected { taken: Vec::new(), breaks: true });
        let parts = ring.parts();
        let overlap = |shorter: u64| {
            let end = |part: &Range<u64>, by| part.start..part.end - by;
            let [table, available, used] =
                [end(&parts[0], 0), end(&parts[1], shorter), end(&parts[2], shorter)];
            !apart(&table, &available) || !apart(&table, &used) || !apart(&available, &used)
        };
        if !parts.iter().all(|part| self.has(part)) || overlap(2) {
            return broken;
        }
        if overlap(0) {
            // Which is right without event indexes, and wrong with them.
            return None;
        }
        if !same_size {
            return broken;
        }
        let available = self.word(ring.places[1] + 2);
        let count = available.wrapping_sub(next);
        if count > ring.size {
            return broken;
        }
        let mut expected = Expected { taken: Vec::new(), breaks: false };
        for index in 0..count {
            let slot = u64::from(next.wrapping_add(index) % ring.size);
            let head = self.word(ring.places[1] + 4 + 2 * slot);
            if head >= ring.size {
                expected.breaks = true;
                break;
            }
            expected.taken.push((head, self.walk(ring, head)));
        }
        expected.is_clear(&parts).then_some(expected)
    }

    /// Walks a chain. `None` if it breaks a rule.
    fn walk(&self, ring: &Ring, head: u16) -> Option<Buffers> {
        let mut buffers = Buffers::default();
        let (mut table, mut size, mut indirect) = (ring.places[0], u64::from(ring.size), false);
        let (mut index, mut sum) = (u64::from(head), 0);
        for _ in 0..1024 {
            if index >= size {
                return None;
            }
            let [mut at, mut len, mut flags, mut next] = self.descriptor(table + 16 * index)?;
            if flags & 4 != 0 {
                let range = at..at.checked_add(len)?;
                if indirect
                    || flags & 1 != 0
                    || len == 0
                    || len % 16 != 0
                    || len > 16 * 65_535
                    || !self.has(&range)
                {
                    return None;
                }
                (table, size, indirect) = (at, len / 16, true);
                buffers.tables.push(range);
                [at, len, flags, next] = self.descriptor(table)?;
                if flags & 4 != 0 {
                    return None;
                }
            }
            let write = flags & 2 != 0;
            sum += len;
            if (!write && !buffers.writable.is_empty()) || sum > u64::from(u32::MAX) {
                return None;
            }
            if len > 0 {
                self.pieces(&(at..at.checked_add(len)?))?;
            }
            let list = if write { &mut buffers.writable } else { &mut buffers.readable };
            // Nothing is nowhere.
            list.push(if len > 0 { at..at + len } else { 0..0 });
            if flags & 1 == 0 {
                return Some(buffers);
            }
            index = next;
        }
        None
    }

    fn descriptor(&self, at: u64) -> Option<[u64; 4]> {
        let bytes = self.bytes(at..at + 16)?;
        Some([0..8, 8..12, 12..14, 14..16].map(|range| number(&bytes[range])))
    }

    /// Checks what a run made of `before`.
    pub(super) fn check(&self, before: &Self, ring: &Ring, next: u16, expected: &Expected) {
        let [_, _, used] = ring.parts();
        // Where nothing was taken, it is as the guest has it.
        if !expected.breaks && !expected.taken.is_empty() {
            let end = next.wrapping_add(expected.taken.len() as u16);
            assert_eq!(self.word(used.start + 2), end, "the used index");
        }
        let mut written = Vec::new();
        for (index, (head, chain)) in expected.taken.iter().enumerate() {
            let slot = u64::from(next.wrapping_add(index as u16) % ring.size);
            let entry = used.start + 4 + 8 * slot;
            let entry = self.bytes(entry..entry + 8).unwrap();
            assert_eq!(number(&entry[..4]), u64::from(*head), "the head of reply {index}");
            let length = number(&entry[4..]);
            let Some(chain) = chain else {
                assert_eq!(length, 0, "a bad chain was used");
                continue;
            };
            let room = total(&chain.writable);
            assert!(length <= room, "{length} bytes used in room for {room}");
            let request = before.gather(&chain.readable, REQUEST_MAX);
            let reply = self.gather(&chain.writable, length);
            let reply = (length > 0).then_some(reply.as_slice());
            reply::check(&request, total(&chain.readable), room as usize, reply);
            let mut left = length;
            for range in &chain.writable {
                let count = left.min(range.end - range.start);
                written.push(range.start..range.start + count);
                left -= count;
            }
        }
        for ((at, now), (_, then)) in self.0.iter().zip(&before.0) {
            for (offset, _) in now.iter().zip(then).enumerate().filter(|(_, (now, then))| now != then) {
                let at = at + offset as u64;
                let allowed = used.contains(&at) || written.iter().any(|range| range.contains(&at));
                assert!(allowed, "{at:#x} was written to");
            }
        }
    }
}

impl Expected {
    /// Whether nothing that may be written lies on anything that matters.
    fn is_clear(&self, parts: &[Range<u64>; 3]) -> bool {
        let chains = || self.taken.iter().filter_map(|(_, chain)| chain.as_ref());
        let read: Vec<_> = chains().flat_map(|chain| chain.readable.iter().chain(&chain.tables)).collect();
        let written: Vec<_> = chains().flat_map(|chain| &chain.writable).collect();
        let mut sorted: Vec<_> = written.iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_by_key(|range| range.start);
        sorted.windows(2).all(|pair| apart(pair[0], pair[1]))
            && written
                .iter()
                .all(|w| parts.iter().all(|part| apart(w, part)) && read.iter().all(|r| apart(w, r)))
            && read.iter().all(|r| apart(r, &parts[2]))
    }
}
