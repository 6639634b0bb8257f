//! The files that one queue has read lately.

use super::{Files, OpenFile};
use crate::index::{NodeId, Tree};
use nix::errno::Errno;
use std::sync::Arc;

/// How many there may be in all queues together.
pub const RECENT_MAX: usize = 512;

/// Files by node, each in the one set where it can be.
///
/// To ask [`Files`] takes a lock and the counting of references; and to let go of a file right after a copy would wait until all of that
/// has left the processor.
#[derive(Debug)]
pub struct Recent {
    /// A power of two of them, which is this one.
    sets: Box<[Set]>,
    bits: u32,
}

/// Two files that do not push out each other: of a few files that are read in turn, one in five would meet another in a place of one.
#[derive(Debug, Default)]
#[repr(align(32))]
struct Set([Option<Place>; WAYS]);

const WAYS: usize = 2;

/// A file, and its node as it is on the wire: one comparison.
type Place = (u64, Arc<OpenFile>);

const _: () = assert!(size_of::<Set>() == 32);

impl Recent {
    /// Those of one of so many queues.
    pub fn one_of(queues: usize) -> Self {
        let places = RECENT_MAX.checked_div(queues).unwrap_or_default();
        let bits = places.checked_div(WAYS).and_then(usize::checked_ilog2).unwrap_or_default();
        let sets = 1_usize.checked_shl(bits).unwrap_or(1);
        Self { sets: (0..sets).map(|_| Set::default()).collect(), bits }
    }

    /// [`Files::get`], which is not asked for what was read lately.
    #[inline(always)]
    pub fn get(
        &mut self,
        files: &Files,
        tree: &Tree,
        id: NodeId,
        wait: bool,
    ) -> Result<Option<&OpenFile>, Errno> {
        let wire = id.to_wire();
        let [first, second] = &mut self.sets.get_mut(set(wire, self.bits)).ok_or(Errno::EIO)?.0;
        let is = |place: &Option<Place>| place.as_ref().is_some_and(|(node, _)| *node == wire);
        if !is(first) {
            std::mem::swap(first, second);
            if !is(first) {
                // What falls out may be open elsewhere.
                *first = files.get(tree, id, wait)?.map(|file| (wire, file));
            }
        }
        Ok(first.as_ref().map(|(_, file)| &**file))
    }
}

/// Where a file is among 2^`bits` sets. A guest that makes its files meet only slows itself down.
fn set(wire: u64, bits: u32) -> usize {
    // The upper bits of a product depend on all bits of the factor: this one is 2^64 by the golden ratio (Knuth, 6.4).
    let mixed = wire.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let shift = u64::BITS.saturating_sub(bits);
    usize::try_from(mixed.checked_shr(shift).unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)] // Small, chosen numbers.
mod tests {
    use super::*;
    use crate::{
        files::{Part, Waiting},
        index::Origin,
        store::StorePath,
        view::View,
    };
    use std::collections::HashSet;
    use vm_memory::VolatileSlice;

    #[test]
    fn queues_share_what_there_is() {
        for (queues, each) in [(0, 1), (1, 256), (2, 128), (5, 32), (32, 8), (256, 1), (512, 1), (100_000, 1)]
        {
            let recent = Recent::one_of(queues);
            assert_eq!(recent.sets.len(), each, "{queues}");
            for number in 0..1000 {
                assert!(set(NodeId::Inode { slot: 7, number }.to_wire(), recent.bits) < each);
            }
        }
    }

    #[test]
    fn neighbours_have_places_of_their_own() {
        let places =
            |ids: Vec<NodeId>| ids.into_iter().map(|id| set(id.to_wire(), 8)).collect::<HashSet<_>>().len();
        assert!(places((0..64).map(|number| NodeId::Inode { slot: 5, number }).collect()) > 50);
        assert!(places((1..65).map(|slot| NodeId::Inode { slot, number: 1 }).collect()) > 40);
    }

    /// In one set, there is room for the last two. Each is told from the others.
    #[test]
    fn the_last_files_of_a_set_are_kept() {
        let path = StorePath::from_base_name(&format!("{}-it", "0".repeat(32))).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(path.base_name())).unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(directory.path().join(path.base_name()).join(name), name).unwrap();
        }
        let files = Files::open_stores(&[directory.path()]).unwrap();
        let origin = Origin { stores: files.stores(), index: None };
        let (tree, _) = Tree::load(origin, &View::new([path]).unwrap()).unwrap();
        let mut recent = Recent::one_of(RECENT_MAX);
        let id = |name: u8| NodeId::Inode { slot: 1, number: u32::from(name - b'a' + 1) };
        for (name, kept) in
            [(b'a', "a"), (b'b', "ba"), (b'a', "ab"), (b'b', "ba"), (b'b', "ba"), (b'c', "cb"), (b'a', "ac")]
        {
            let file = recent.get(&files, &tree, id(name), true).unwrap().unwrap();
            let mut content = [0];
            file.read(0, Part::all(&[VolatileSlice::from(&mut content[..])]), Waiting::Allowed).unwrap();
            assert_eq!(content[0], name);
            let nodes: Vec<_> = recent.sets[0].0.iter().flatten().map(|(node, _)| *node).collect();
            assert_eq!(nodes, kept.bytes().map(|name| id(name).to_wire()).collect::<Vec<_>>());
        }
    }
}
