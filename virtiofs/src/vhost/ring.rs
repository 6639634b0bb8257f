//! The split ring of one virtqueue, as the virtio specification (2.7) lays it out in the guest's memory.
//!
//! A [`Ring`] is made for a burst of requests: its addresses are resolved once, so that a request costs a few loads and
//! stores. Everything read from it may change at any time.

use super::{
    chain::{Chain, ChainError, Table},
    regions::Regions,
    trail::fetch,
};
use std::sync::atomic::{Ordering, fence};
use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Bytes of `flags` and `idx`, which begin both rings.
const HEAD: usize = 4;
/// Where `idx` is.
const INDEX: usize = 2;
/// Bytes of an entry of the available ring: the head of a chain.
const AVAILABLE: usize = 2;
/// Bytes of an entry of the used ring: head and length, 32 bits each.
const USED: usize = 8;
/// Bytes of the event index that ends both rings.
const EVENT: usize = 2;

/// A ring lies where it cannot be used.
#[derive(Debug, Error)]
pub(super) enum RingError {
    /// Outside the guest's memory, across two regions of it, or misaligned.
    #[error("The {part} of the ring cannot be used")]
    Place {
        /// The table or one of the rings.
        part: &'static str,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
    /// On itself.
    #[error("The descriptor table, the available ring and the used ring overlap")]
    Overlap,
}

/// A virtqueue in the guest's memory.
pub(super) struct Ring<'m> {
    regions: Regions<'m>,
    descriptors: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
    size: u16,
    event_idx: bool,
    /// The addresses in the guest, by which a move is seen.
    places: [u64; 3],
}

fn failed<E: Into<vm_memory::GuestMemoryError>>(part: &'static str) -> impl FnOnce(E) -> RingError {
    move |source| RingError::Place { part, source: source.into() }
}

impl<'m> Ring<'m> {
    /// The ring that `queue` is set up for. A change of the set-up shows in the next ring that is made.
    pub(super) fn new(mem: &'m GuestMemoryMmap, queue: &Queue) -> Result<Self, RingError> {
        let entries = usize::from(queue.size());
        let part = |part, at, entry: usize, extra: usize| {
            let length = entries.saturating_mul(entry).saturating_add(extra);
            mem.get_slice(GuestAddress(at), length).map_err(failed(part))
        };
        let around = HEAD.saturating_add(EVENT);
        let descriptors = part("descriptor table", queue.desc_table(), Table::ENTRY, 0)?;
        let available = part("available ring", queue.avail_ring(), AVAILABLE, around)?;
        let used = part("used ring", queue.used_ring(), USED, around)?;
        // Who does not use the event indexes may have left no room for them.
        let event = if queue.state().event_idx_enabled { 0 } else { EVENT };
        let lengths =
            [descriptors.len(), available.len().saturating_sub(event), used.len().saturating_sub(event)];
        let mut parts = places(queue).into_iter().zip(lengths);
        while let Some((at, length)) = parts.next() {
            let end = at.saturating_add(length as u64);
            if parts.clone().any(|(other, length)| at < other.saturating_add(length as u64) && other < end) {
                return Err(RingError::Overlap);
            }
        }
        Ok(Self {
            regions: Regions::new(mem),
            descriptors,
            available,
            used,
            size: queue.size(),
            event_idx: queue.state().event_idx_enabled,
            places: places(queue),
        })
    }

    /// Whether it still is the ring of `queue` in `mem`.
    pub(super) fn is_of(&self, mem: &GuestMemoryMmap, queue: &Queue) -> bool {
        std::ptr::eq(self.regions.memory(), mem)
            && self.size == queue.size()
            && self.places == places(queue)
            && self.event_idx == queue.state().event_idx_enabled
    }

    /// How many descriptors it has.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The guest's index: how many chains it has made available, modulo 65,536.
    pub(super) fn available(&self) -> Result<u16, RingError> {
        self.available.load(INDEX, Ordering::Acquire).map_err(failed("available ring"))
    }

    /// The head of the chain that was made available as number `index`. Not checked against the size.
    pub(super) fn head(&self, index: u16) -> Result<u16, RingError> {
        let at = self.entry(index, AVAILABLE);
        self.available.load(at, Ordering::Relaxed).map_err(failed("available ring"))
    }

    /// The descriptor `head`.
    pub(super) fn descriptor(&self, head: u16) -> Option<VolatileSlice<'m>> {
        self.descriptors.subslice(usize::from(head).saturating_mul(Table::ENTRY), Table::ENTRY).ok()
    }

    /// Fetches where chain number `index` is told, and where it will be told that it was used.
    pub(super) fn fetch(&self, index: u16) {
        let place = |ring: &VolatileSlice<'_>, bytes| {
            ring.ptr_guard().as_ptr().addr().wrapping_add(self.entry(index, bytes))
        };
        fetch::<false>(place(&self.available, AVAILABLE));
        fetch::<true>(place(&self.used, USED));
    }

    /// Makes `chain` the one that begins at `head`. It is empty, or was one of this ring.
    #[inline(always)]
    pub(super) fn find(&self, head: u16, chain: &mut Chain<'m>) -> Result<(), ChainError> {
        chain.find(&self.regions, Table::new(self.descriptors, self.size), head)
    }

    /// Publishes that chain `head` was used as number `index`, with `length` bytes written to it.
    pub(super) fn publish(&self, index: u16, head: u16, length: u32) -> Result<(), RingError> {
        let at = self.entry(index, USED);
        let entry = u64::from(head) | (u64::from(length) << 32);
        let store = || {
            // 4 bytes are what the ring is aligned to.
            self.used.store(low(entry), at, Ordering::Relaxed)?;
            self.used.store(low(entry >> 32), at.saturating_add(4), Ordering::Relaxed)?;
            self.used.store(index.wrapping_add(1), INDEX, Ordering::Release)
        };
        store().map_err(failed("used ring"))
    }

    /// Whether the guest wants an interrupt for what was published as numbers `from` up to, but not including, `to`.
    pub(super) fn wants_interrupt(&self, from: u16, to: u16) -> Result<bool, RingError> {
        if from == to {
            return Ok(false);
        }
        // The guest writes its wish and then looks at the used index; this is the other half of that.
        fence(Ordering::SeqCst);
        let wish = || {
            if self.event_idx {
                let at = self.available.len().saturating_sub(EVENT);
                let event: u16 = self.available.load(at, Ordering::Relaxed)?;
                // Whether `event` is one of those published (specification, 2.7.7.2).
                Ok(to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from))
            } else {
                let flags: u16 = self.available.load(0, Ordering::Relaxed)?;
                Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
            }
        };
        wish().map_err(failed::<vm_memory::VolatileMemoryError>("available ring"))
    }

    /// Asks the guest for a kick when it makes more than `taken` chains available. It may have done so meanwhile: the
    /// available index must be looked at afterwards.
    pub(super) fn want_kick(&self, taken: u16) -> Result<(), RingError> {
        if self.event_idx {
            let at = self.used.len().saturating_sub(EVENT);
            self.used.store(taken, at, Ordering::Relaxed).map_err(failed("used ring"))?;
        } else {
            self.used.store(0u16, 0, Ordering::Relaxed).map_err(failed("used ring"))?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Tells the guest that kicks are needless for now. It may kick nevertheless.
    pub(super) fn want_no_kick(&self) -> Result<(), RingError> {
        if self.event_idx {
            // The event index stays where it is, behind the guest.
            return Ok(());
        }
        let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or_default();
        self.used.store(flags, 0, Ordering::Relaxed).map_err(failed("used ring"))
    }

    fn entry(&self, index: u16, bytes: usize) -> usize {
        // The size is a power of two, so the remainder needs no division; it is never zero.
        let slot = usize::from(index & self.size.wrapping_sub(1));
        slot.saturating_mul(bytes).saturating_add(HEAD)
    }
}

fn places(queue: &Queue) -> [u64; 3] {
    [queue.desc_table(), queue.avail_ring(), queue.used_ring()]
}

#[allow(clippy::cast_possible_truncation)] // That is what it is for.
fn low(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;

    const TABLE: u64 = 0x1000;
    const AVAILABLE_RING: u64 = 0x2000;
    const USED_RING: u64 = 0x3000;
    const SIZE: u16 = 8;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn queue(event_idx: bool) -> Queue {
        let mut queue = Queue::new(1024).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE_RING)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED_RING)).unwrap();
        queue.set_event_idx(event_idx);
        queue
    }

    #[test]
    fn layout() {
        let mem = memory();
        let ring = Ring::new(&mem, &queue(true)).unwrap();
        mem.write_obj(9u16, GuestAddress(AVAILABLE_RING + 2)).unwrap();
        mem.write_obj(5u16, GuestAddress(AVAILABLE_RING + 4)).unwrap();
        mem.write_obj(6u16, GuestAddress(AVAILABLE_RING + 4 + 14)).unwrap();
        assert_eq!(ring.available().unwrap(), 9);
        assert_eq!((ring.head(8).unwrap(), ring.head(7).unwrap()), (5, 6));
        ring.publish(u16::MAX, 3, 0x1234_5678).unwrap();
        let entry: [u32; 2] = mem.read_obj(GuestAddress(USED_RING + 4 + 8 * 7)).unwrap();
        assert_eq!(entry, [3, 0x1234_5678]);
        assert_eq!(mem.read_obj::<u16>(GuestAddress(USED_RING + 2)).unwrap(), 0);
        ring.want_kick(77).unwrap();
        assert_eq!(mem.read_obj::<u16>(GuestAddress(USED_RING + 4 + 8 * 8)).unwrap(), 77);
    }

    #[test]
    fn vq13_event_indexes_of_all_kinds_are_an_answer() {
        let mem = memory();
        let ring = Ring::new(&mem, &queue(true)).unwrap();
        for (event, from, to, expected) in [
            (0, 0, 0, false),
            (0, 0, 1, true),
            (1, 0, 1, false),
            (4, 2, 5, true),
            (5, 2, 5, false),
            (1, 2, 5, false),
            (u16::MAX, u16::MAX, 1, true),
            (0, u16::MAX, 1, true),
            (1, u16::MAX, 1, false),
            (0x8000, 0, 1, false),
        ] {
            mem.write_obj::<u16>(event, GuestAddress(AVAILABLE_RING + 4 + 16)).unwrap();
            assert_eq!(ring.wants_interrupt(from, to).unwrap(), expected, "{event} {from} {to}");
        }
    }

    #[test]
    fn without_event_indexes_flags_are_used() {
        let mem = memory();
        let ring = Ring::new(&mem, &queue(false)).unwrap();
        assert!(ring.wants_interrupt(0, 1).unwrap());
        mem.write_obj(1u16, GuestAddress(AVAILABLE_RING)).unwrap();
        assert!(!ring.wants_interrupt(0, 1).unwrap());
        ring.want_no_kick().unwrap();
        assert_eq!(mem.read_obj::<u16>(GuestAddress(USED_RING)).unwrap(), 1);
        ring.want_kick(0).unwrap();
        assert_eq!(mem.read_obj::<u16>(GuestAddress(USED_RING)).unwrap(), 0);
    }

    #[test]
    fn vu6_a_ring_outside_memory_is_an_error() {
        let mem = memory();
        for (table, available, used) in [
            (1 << 20, AVAILABLE_RING, USED_RING),
            (TABLE, (1 << 20) - 4, USED_RING),
            (TABLE, AVAILABLE_RING, (1 << 20) - 60),
            (!0xf, AVAILABLE_RING, USED_RING),
            (TABLE, TABLE, TABLE),
            (TABLE, TABLE + 126, USED_RING),
            (USED_RING, AVAILABLE_RING, USED_RING + 64),
            (TABLE, AVAILABLE_RING, AVAILABLE_RING + 20),
            (AVAILABLE_RING - 112, AVAILABLE_RING, USED_RING),
        ] {
            let mut queue = queue(true);
            queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
            assert!(Ring::new(&mem, &queue).is_err(), "{table:#x} {available:#x} {used:#x}");
        }
        // As close together as they can be.
        let mut queue = queue(true);
        queue.try_set_avail_ring_address(GuestAddress(TABLE + 128)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(TABLE + 128 + 24)).unwrap();
        assert!(Ring::new(&mem, &queue).is_ok());
    }
}
