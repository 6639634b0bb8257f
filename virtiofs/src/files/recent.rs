//! The files that one queue has read lately.

use super::{Files, OpenFile};
use crate::index::{NodeId, Tree};
use nix::errno::Errno;
use std::sync::Arc;

/// How many there may be in all queues together.
pub const RECENT_MAX: usize = 512;

/// Files by node, each at the one place where it can be.
///
/// To ask [`Files`] takes a lock and the counting of references; and to let go of a file right after a copy would wait until all of that
/// has left the processor.
#[derive(Debug)]
pub struct Recent {
    /// A power of two of them, which is this one.
    places: Box<[Option<Place>]>,
    bits: u32,
}

type Place = (NodeId, Arc<OpenFile>);

impl Recent {
    /// Those of one of so many queues.
    pub fn one_of(queues: usize) -> Self {
        let bits = RECENT_MAX.checked_div(queues).and_then(usize::checked_ilog2).unwrap_or_default();
        let places = 1_usize.checked_shl(bits).unwrap_or(1);
        Self { places: (0..places).map(|_| None).collect(), bits }
    }

    /// [`Files::get`], which is not asked for what was read lately.
    pub fn get(
        &mut self,
        files: &Files,
        tree: &Tree,
        id: NodeId,
        wait: bool,
    ) -> Result<Option<&OpenFile>, Errno> {
        let place = self.places.get_mut(place(id, self.bits)).ok_or(Errno::EIO)?;
        if place.as_ref().is_none_or(|(node, _)| *node != id) {
            // What falls out may be open elsewhere.
            *place = files.get(tree, id, wait)?.map(|file| (id, file));
        }
        Ok(place.as_ref().map(|(_, file)| &**file))
    }
}

/// Where a file is among 2^`bits` places. A guest that makes its files meet only slows itself down.
fn place(id: NodeId, bits: u32) -> usize {
    // The upper bits of a product depend on all bits of the factor: this one is 2^64 by the golden ratio (Knuth, 6.4).
    let mixed = id.to_wire().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let shift = u64::BITS.saturating_sub(bits);
    usize::try_from(mixed.checked_shr(shift).unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn queues_share_what_there_is() {
        for (queues, each) in [(0, 1), (1, 512), (2, 256), (5, 64), (32, 16), (512, 1), (100_000, 1)] {
            let recent = Recent::one_of(queues);
            assert_eq!(recent.places.len(), each, "{queues}");
            for number in 0..1000 {
                assert!(place(NodeId::Inode { slot: 7, number }, recent.bits) < each);
            }
        }
    }

    #[test]
    fn neighbours_have_places_of_their_own() {
        let places = |ids: Vec<NodeId>| ids.into_iter().map(|id| place(id, 8)).collect::<HashSet<_>>().len();
        assert!(places((0..64).map(|number| NodeId::Inode { slot: 5, number }).collect()) > 50);
        assert!(places((1..65).map(|slot| NodeId::Inode { slot, number: 1 }).collect()) > 40);
    }
}
