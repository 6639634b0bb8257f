//! Where the guest's memory is in this process.

use smallvec::SmallVec;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

/// The regions of the guest's memory, found once. Each buffer of each request is looked for in them, for which the library asks each
/// time for more than it takes.
pub(super) struct Regions<'m> {
    mem: &'m GuestMemoryMmap,
    regions: SmallVec<[(GuestAddress, VolatileSlice<'m>); 4]>,
}

impl<'m> Regions<'m> {
    pub(super) fn new(mem: &'m GuestMemoryMmap) -> Self {
        let region = |region: &'m _| {
            let whole = GuestMemoryRegion::as_volatile_slice(region).ok()?;
            Some((GuestMemoryRegion::start_addr(region), whole))
        };
        Self { mem, regions: mem.iter().filter_map(region).collect() }
    }

    /// The memory that these are of.
    pub(super) fn memory(&self) -> &'m GuestMemoryMmap {
        self.mem
    }

    /// What is within one region; `None` for all else.
    #[inline]
    pub(super) fn one(&self, at: GuestAddress, length: usize) -> Option<VolatileSlice<'m>> {
        self.regions.iter().find_map(|(start, region)| {
            let offset = usize::try_from(at.checked_offset_from(*start)?).ok()?;
            region.subslice(offset, length).ok()
        })
    }
}
