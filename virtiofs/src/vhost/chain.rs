//! Walking a descriptor chain. The library's own iterator ends at the first mistake as if the chain ended there; here a
//! mistake is an error, so that a request is either whole or refused.

use super::{QUEUE_SIZE_MAX, regions::Regions};
use smallvec::SmallVec;
use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

/// Buffers of the guest. Those of a READ of 128 KiB fit on the stack.
pub(super) type Buffers<'a> = SmallVec<[VolatileSlice<'a>; 36]>;

/// The guest's buffers of one request, neighbours merged. What they hold may change at any time.
#[derive(Debug, Default)]
pub(super) struct Chain<'a> {
    /// The request.
    pub(super) readable: SmallVec<[VolatileSlice<'a>; 4]>,
    /// Room for the reply.
    pub(super) writable: Buffers<'a>,
    /// Its indirect table.
    pub(super) indirect: Option<VolatileSlice<'a>>,
    /// Bytes of the request.
    pub(super) request: u32,
    /// Bytes of room.
    pub(super) room: u32,
    /// The first descriptor's number in the queue's own table.
    head: u16,
    /// Its first descriptors in their order, and how many it has.
    seen: [Option<Seen<'a>>; SEEN],
    count: usize,
}

/// A descriptor as it was read, and where.
#[derive(Debug, Clone, Copy)]
struct Seen<'a> {
    place: VolatileSlice<'a>,
    value: Raw,
}

/// A descriptor's bytes.
type Raw = u128;

impl<'a> Seen<'a> {
    #[inline(always)]
    fn read(place: VolatileSlice<'a>) -> Option<Self> {
        let value = place.get_ref(0).ok()?.load();
        Some(Self { place, value })
    }

    /// Whether the same would be read now.
    #[inline(always)]
    fn is_still(&self) -> bool {
        self.place.get_ref::<Raw>(0).is_ok_and(|place| place.load() == self.value)
    }

    #[inline(always)]
    fn descriptor(&self) -> Option<Descriptor> {
        Descriptor::from_slice(self.value.as_slice()).copied()
    }
}

/// The most descriptors of a chain that is known again: all requests but large READs have fewer.
const SEEN: usize = 8;

/// How a chain breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum ChainError {
    #[error("A descriptor is outside its table of {0}")]
    Index(u16),
    #[error("A descriptor table is outside the guest's memory")]
    Table,
    #[error("A chain has more than {QUEUE_SIZE_MAX} descriptors, or goes round in circles")]
    Length,
    #[error("A chain has more than 4 GiB")]
    Bytes,
    #[error("A buffer is outside the guest's memory")]
    Buffer,
    #[error("A buffer to read from follows one to write to")]
    Order,
    #[error("An indirect table is not one: {0} bytes, or within another, or in mid-chain")]
    Indirect(u32),
}

/// A descriptor table: a queue's own, or an indirect one.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    slice: VolatileSlice<'a>,
    size: u16,
    indirect: bool,
}

impl<'a> Table<'a> {
    /// Bytes of a descriptor.
    pub(super) const ENTRY: usize = size_of::<Descriptor>();

    /// A queue's own table of `size` descriptors.
    pub(super) fn new(slice: VolatileSlice<'a>, size: u16) -> Self {
        Self { slice, size, indirect: false }
    }

    #[inline(always)]
    fn get(&self, index: u16) -> Result<Seen<'a>, ChainError> {
        if index >= self.size {
            return Err(ChainError::Index(self.size));
        }
        let place = self.slice.subslice(usize::from(index).saturating_mul(Self::ENTRY), Self::ENTRY);
        place.ok().and_then(Seen::read).ok_or(ChainError::Table)
    }

    fn indirect(&self, regions: &Regions<'a>, desc: &Descriptor) -> Result<Self, ChainError> {
        let wrong = ChainError::Indirect(desc.len());
        let length = usize::try_from(desc.len()).map_err(|_| wrong)?;
        if self.indirect || desc.has_next() || length == 0 || !length.is_multiple_of(Self::ENTRY) {
            return Err(wrong);
        }
        let size = length.checked_div(Self::ENTRY).and_then(|n| u16::try_from(n).ok()).ok_or(wrong)?;
        let slice = regions.one(desc.addr(), length).ok_or(ChainError::Table)?;
        Ok(Self { slice, size, indirect: true })
    }
}

/// Neighbouring buffers of one direction, which become one.
#[derive(Default)]
struct Run {
    at: u64,
    length: u64,
    write: bool,
}

impl Run {
    /// Whether a buffer goes on where this ends.
    fn goes_on_with(&self, desc: &Descriptor) -> bool {
        self.write == desc.is_write_only() && self.at.checked_add(self.length) == Some(desc.addr().0)
    }
}

impl<'a> Chain<'a> {
    /// Makes it empty.
    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        (self.indirect, self.request, self.room) = (None, 0, 0);
        self.count = 0;
    }

    /// Makes it the chain that begins at `head` in `table`. Unless it is empty, regions and table are those of the last time. If this fails, it is
    /// empty.
    #[inline]
    pub(super) fn find(
        &mut self,
        regions: &Regions<'a>,
        table: Table<'a>,
        head: u16,
    ) -> Result<(), ChainError> {
        if self.is_again(head) {
            return Ok(());
        }
        self.clear();
        self.head = head;
        self.walk(regions, table, head).inspect_err(|_| self.clear())
    }

    /// Whether the chain that begins at `head` is this one again, so that its buffers are where they were. A guest that sends one request after
    /// the other uses the same places, and to compare descriptors takes less than to walk them: as long as none has changed, each is where it was.
    #[inline]
    fn is_again(&self, head: u16) -> bool {
        let Some(all) = self.seen.get(..self.count) else { return false };
        head == self.head && !all.is_empty() && all.iter().flatten().all(Seen::is_still)
    }

    /// Walks the chain that begins at `head` in `table`, of which this becomes the buffers. It is empty before; moving a full one
    /// would cost more than all else here.
    fn walk(&mut self, regions: &Regions<'a>, table: Table<'a>, head: u16) -> Result<(), ChainError> {
        let mut table = table;
        let mut run = Run::default();
        // Sums of as many as there may be at most fit.
        let (mut request, mut room) = (0u64, 0u64);
        let mut index = head;
        for _ in 0..QUEUE_SIZE_MAX {
            let mut desc = self.note(table.get(index)?)?;
            if desc.refers_to_indirect_table() {
                table = table.indirect(regions, &desc)?;
                self.indirect = Some(table.slice);
                desc = self.note(table.get(0)?)?;
                if desc.refers_to_indirect_table() {
                    return Err(ChainError::Indirect(desc.len()));
                }
            }
            let length = u64::from(desc.len());
            if desc.is_write_only() {
                room = room.wrapping_add(length);
            } else if run.write {
                return Err(ChainError::Order);
            } else {
                request = request.wrapping_add(length);
            }
            if request.wrapping_add(room) > u64::from(u32::MAX) {
                return Err(ChainError::Bytes);
            }
            if run.goes_on_with(&desc) {
                run.length = run.length.wrapping_add(length);
            } else {
                self.add(regions, &run)?;
                run = Run { at: desc.addr().0, length, write: desc.is_write_only() };
            }
            if !desc.has_next() {
                self.add(regions, &run)?;
                self.request = u32::try_from(request).map_err(|_| ChainError::Bytes)?;
                self.room = u32::try_from(room).map_err(|_| ChainError::Bytes)?;
                return Ok(());
            }
            index = desc.next();
        }
        Err(ChainError::Length)
    }

    #[inline(always)]
    fn note(&mut self, seen: Seen<'a>) -> Result<Descriptor, ChainError> {
        if let Some(place) = self.seen.get_mut(self.count) {
            *place = Some(seen);
        }
        // There are no more than the queue has.
        self.count = self.count.wrapping_add(1);
        seen.descriptor().ok_or(ChainError::Table)
    }

    #[inline(always)]
    fn add(&mut self, regions: &Regions<'a>, run: &Run) -> Result<(), ChainError> {
        if run.length == 0 {
            return Ok(());
        }
        let length = usize::try_from(run.length).map_err(|_| ChainError::Bytes)?;
        match regions.one(GuestAddress(run.at), length) {
            Some(slice) if run.write => self.writable.push(slice),
            Some(slice) => self.readable.push(slice),
            None => return self.add_across(regions, run, length),
        }
        Ok(())
    }

    /// What goes from one region to the next, or is none of the guest's memory.
    #[cold]
    fn add_across(&mut self, regions: &Regions<'a>, run: &Run, length: usize) -> Result<(), ChainError> {
        for slice in regions.memory().get_slices(GuestAddress(run.at), length) {
            let slice = slice.map_err(|_| ChainError::Buffer)?;
            if run.write { self.writable.push(slice) } else { self.readable.push(slice) }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;
    use virtio_bindings::bindings::virtio_ring::{
        VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    };
    use virtio_queue::desc::RawDescriptor;
    use vm_memory::{Bytes, GuestMemoryMmap};

    const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
    const TABLE: u64 = 0x1000;
    const SIZE: u16 = 8;

    /// Two regions that touch at 1 MiB, then a hole.
    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap()
    }

    fn put(mem: &GuestMemoryMmap, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
        for (i, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            let desc = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            mem.write_obj(desc, GuestAddress(table + 16 * i as u64)).unwrap();
        }
    }

    fn walk(mem: &GuestMemoryMmap, descriptors: &[(u64, u32, u16, u16)]) -> Result<(u32, u32), ChainError> {
        put(mem, TABLE, descriptors);
        whole(mem, TABLE, 0).map(|c| (c.request, c.room))
    }

    fn whole(mem: &GuestMemoryMmap, at: u64, head: u16) -> Result<Chain<'_>, ChainError> {
        let slice = mem.get_slice(GuestAddress(at), usize::from(SIZE) * Table::ENTRY).unwrap();
        let mut chain = Chain::default();
        chain.walk(&Regions::new(mem), Table::new(slice, SIZE), head).map(|()| chain)
    }

    #[test]
    fn whole_chains() {
        let mem = memory();
        assert_eq!(walk(&mem, &[(0x4000, 40, NEXT, 1), (0x5000, 16, WRITE, 0)]), Ok((40, 16)));
        put(&mem, 0x8000, &[(0x4000, 40, NEXT, 2), (0, 0, 0, 0), (0x5000, 16, WRITE, 0)]);
        assert_eq!(walk(&mem, &[(0x8000, 48, INDIRECT, 0)]), Ok((40, 16)));
        // Across two regions: two slices.
        put(&mem, TABLE, &[((1 << 20) - 8, 16, 0, 0)]);
        assert_eq!(whole(&mem, TABLE, 0).unwrap().readable.len(), 2);
    }

    #[test]
    fn a_chain_is_known_again_only_where_nothing_has_changed() {
        let mem = memory();
        let direct = [
            (0x4000, 40, NEXT, 1),
            (0x5000, 16, NEXT, 2),
            (0x6000, 16, WRITE | NEXT, 3),
            (0x7000, 8, WRITE, 0),
        ];
        let inside = [(0x4100, 40, NEXT, 1), (0x5100, 16, WRITE | NEXT, 2), (0x6100, 32, WRITE, 0)];
        put(&mem, TABLE, &direct);
        put(&mem, 0x8000, &inside);
        put(&mem, TABLE + 16 * 4, &[(0x8000, 48, INDIRECT, 0), (0x8000, 32, INDIRECT, 0)]);
        let slice = mem.get_slice(GuestAddress(TABLE), usize::from(SIZE) * Table::ENTRY).unwrap();
        let regions = Regions::new(&mem);
        let table = Table::new(slice, SIZE);
        for (head, at, descriptors) in [(0, TABLE, &direct[..]), (4, 0x8000, &inside[..])] {
            let mut chain = Chain::default();
            assert!(!chain.is_again(head));
            chain.find(&regions, table, head).unwrap();
            let before = (chain.request, chain.room, chain.readable.len(), chain.writable.len());
            assert!(chain.is_again(head) && !chain.is_again(head + 1));
            chain.find(&regions, table, head).unwrap();
            assert_eq!((chain.request, chain.room, chain.readable.len(), chain.writable.len()), before);
            for changed in 0..descriptors.len() {
                for field in 0..4 {
                    let mut others = descriptors.to_vec();
                    let desc = &mut others[changed];
                    match field {
                        0 => desc.0 += 8,
                        1 => desc.1 += 1,
                        2 => desc.2 ^= WRITE,
                        _ => desc.3 ^= 1,
                    }
                    put(&mem, at, &others);
                    assert!(!chain.is_again(head), "{changed} {field}");
                    put(&mem, at, descriptors);
                    assert!(chain.is_again(head));
                }
            }
            // A chain that failed is none.
            put(&mem, at, &[(0x4000, 40, NEXT, 1), (0, u32::MAX, 0, 0)]);
            chain.find(&regions, table, head).unwrap_err();
            assert!(!chain.is_again(head) && chain.readable.is_empty());
            put(&mem, at, descriptors);
        }
        // One of more descriptors than are kept is walked each time.
        let many: Vec<_> =
            (0..9).map(|n| (0x4000 + 64 * u64::from(n), 8, if n < 8 { NEXT } else { 0 }, n + 1)).collect();
        put(&mem, 0x8000, &many);
        put(&mem, TABLE, &[(0x8000, 16 * 9, INDIRECT, 0)]);
        let mut chain = Chain::default();
        chain.find(&regions, table, 0).unwrap();
        assert!(!chain.is_again(0));
        chain.find(&regions, table, 0).unwrap();
        assert_eq!((chain.request, chain.readable.len()), (72, 9));
    }

    #[test]
    fn neighbours_are_merged() {
        let mem = memory();
        let pages = [(0x4000, 40, NEXT, 1), (0x6000, 4096, WRITE | NEXT, 2), (0x7000, 4096, WRITE | NEXT, 3)];
        put(&mem, TABLE, &pages);
        put(&mem, TABLE + 48, &[(0x9000, 16, WRITE, 0)]);
        let chain = whole(&mem, TABLE, 0).unwrap();
        let lengths =
            |buffers: &[VolatileSlice<'_>]| buffers.iter().map(VolatileSlice::len).collect::<Vec<_>>();
        assert_eq!((lengths(&chain.readable), lengths(&chain.writable)), (vec![40], vec![8192, 16]));
        // One that ends where a buffer of the other direction begins.
        put(&mem, TABLE, &[(0x4000, 40, NEXT, 1), (0x4028, 16, WRITE, 0)]);
        assert_eq!(lengths(&whole(&mem, TABLE, 0).unwrap().writable), [16]);
    }

    #[test]
    fn vq1_descriptor_loop() {
        let mem = memory();
        assert_eq!(walk(&mem, &[(0x4000, 4, NEXT, 0)]), Err(ChainError::Length));
        assert_eq!(walk(&mem, &[(0x4000, 4, NEXT, 1), (0x4000, 4, NEXT, 0)]), Err(ChainError::Length));
    }

    #[test]
    fn vq3_next_outside_the_table() {
        let mem = memory();
        assert_eq!(walk(&mem, &[(0x4000, 4, NEXT, SIZE)]), Err(ChainError::Index(SIZE)));
        assert_eq!(walk(&mem, &[(0x4000, 4, NEXT, u16::MAX)]), Err(ChainError::Index(SIZE)));
    }

    #[test]
    fn vq5_lengths() {
        let mem = memory();
        assert_eq!(walk(&mem, &[(0x4000, 0, 0, 0)]), Ok((0, 0)));
        assert_eq!(walk(&mem, &[(0x4000, u32::MAX, 0, 0)]), Err(ChainError::Buffer));
        let long = [(0, 1 << 20, NEXT, 1), (0, u32::MAX, WRITE, 0)];
        assert_eq!(walk(&mem, &long), Err(ChainError::Bytes));
    }

    #[test]
    fn vq6_addresses_outside() {
        let mem = memory();
        for address in [2 << 20, (2 << 20) - 8, u64::MAX, u64::MAX - 15, 0xfee0_0000] {
            assert_eq!(walk(&mem, &[(address, 16, 0, 0)]), Err(ChainError::Buffer), "{address:#x}");
        }
    }

    #[test]
    fn vq7_indirect_tables() {
        let mem = memory();
        put(&mem, 0x8000, &[(0x4000, 40, 0, 0)]);
        for length in [0, 8, 17, 16 * 65_536] {
            assert_eq!(
                walk(&mem, &[(0x8000, length, INDIRECT, 0)]),
                Err(ChainError::Indirect(length)),
                "{length}"
            );
        }
        assert_eq!(walk(&mem, &[(0x8000, 16, INDIRECT | NEXT, 1)]), Err(ChainError::Indirect(16)));
        assert_eq!(walk(&mem, &[(4 << 20, 16, INDIRECT, 0)]), Err(ChainError::Table));
        put(&mem, 0x8000, &[(0x8000, 32, INDIRECT, 0)]);
        assert_eq!(walk(&mem, &[(0x8000, 16, INDIRECT, 0)]), Err(ChainError::Indirect(32)));
        put(&mem, 0x8000, &[(0x4000, 4, NEXT, 1), (0x8000, 32, INDIRECT, 0)]);
        assert_eq!(walk(&mem, &[(0x8000, 32, INDIRECT, 0)]), Err(ChainError::Indirect(32)));
        // A loop in a large table is bounded too; a table across two regions is none.
        put(&mem, 0x8000, &[(0x4000, 1, NEXT, 0)]);
        assert_eq!(walk(&mem, &[(0x8000, 16 * 60_000, INDIRECT, 0)]), Err(ChainError::Length));
        assert_eq!(walk(&mem, &[(0x8000, 16 * 65_535, INDIRECT, 0)]), Err(ChainError::Table));
    }

    #[test]
    fn vq8_read_after_write() {
        let mem = memory();
        assert_eq!(walk(&mem, &[(0x4000, 16, WRITE | NEXT, 1), (0x5000, 40, 0, 0)]), Err(ChainError::Order));
    }
}
