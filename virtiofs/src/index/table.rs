//! The hash table of a manifest: from a directory and a name to the inode of that name, with one look.
//!
//! Neither the directory's own record is needed for that, nor its children's but for the right one: in a store of any size none of them is
//! in a processor's cache, and each that has to be met before it is known where the next one is costs as much as all else that an answer takes.
//!
//! A table is a list of places. Its length is a power of two, at least twice the number of inodes. An inode is at the place that its
//! directory and name say, or at one of the next ones. Whoever makes a store path chooses its names, also so that their hashes are the
//! same; so a store path in which one would have to look far has no table.

use super::inode::Inode;
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How many places there are to look at, at most.
const PROBES: usize = 64;

/// Who is at a place of a table.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Place {
    /// The inode's number; 0 for nobody, since the store path itself is in no directory.
    pub(super) number: u32,
    /// Where its name begins among the names, as its record says too: so both are fetched at the same time.
    pub(super) name: u32,
}

/// The hash of a name.
pub(super) fn hash(name: &[u8]) -> u64 {
    XxHash3_64::oneshot(name)
}

/// A part of the hash that is not used to find the place.
pub(super) fn tag(hash: u64) -> u16 {
    // It always fits.
    u16::try_from(hash >> 48).unwrap_or_default()
}

/// The table of these inodes, whose names have these hashes; `None` if they are better off without.
pub(super) fn make(inodes: &[Inode], hashes: &[u64]) -> Option<Vec<Place>> {
    if inodes.len() <= 1 {
        return None;
    }
    let length = inodes.len().checked_mul(2)?.checked_next_power_of_two()?;
    let mut table = vec![Place::default(); length];
    for (number, (inode, &hash)) in inodes.iter().zip(hashes).enumerate().skip(1) {
        let at = places(inode.parent, hash, length).find(|&at| table.get(at) == Some(&Place::default()))?;
        *table.get_mut(at)? = Place { number: u32::try_from(number).ok()?, name: inode.name };
    }
    Some(table)
}

/// Who may be the child of this directory whose name has this hash, the likeliest first. Nobody else is.
#[inline]
pub(super) fn find(table: &[Place], directory: u32, hash: u64) -> impl Iterator<Item = Place> {
    places(directory, hash, table.len())
        .map_while(|at| table.get(at).copied().filter(|place| place.number != 0))
}

/// Where to look. What is made and what is found do not differ in that, so nothing is missed: an inode is put at the first free
/// place, and none ever gets free again.
#[inline]
fn places(directory: u32, hash: u64, length: usize) -> impl Iterator<Item = usize> {
    let mask = length.saturating_sub(1);
    // An odd factor keeps directories apart.
    let mixed = hash ^ u64::from(directory).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // It fits, as the mask does.
    let start = usize::try_from(mixed & mask as u64).unwrap_or_default();
    (0..PROBES.min(length)).map(move |step| start.wrapping_add(step) & mask)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;
    use crate::index::Kind;

    /// The store path, and `count` files in each of `directories` directories; their names are the same everywhere.
    fn inodes(directories: u32, count: u32) -> (Vec<Inode>, Vec<u64>) {
        let inode = |parent, name| {
            let mut inode = Inode::new(Kind::File { executable: false }, 0);
            (inode.parent, inode.name) = (parent, name);
            inode
        };
        let places = (0..directories).flat_map(|directory| (0..count).map(move |name| (directory, name)));
        let inodes: Vec<_> =
            std::iter::once((0, 0)).chain(places).map(|(parent, name)| inode(parent, name)).collect();
        let hashes =
            inodes.iter().map(|inode| hash(format!("libname-{}.so", inode.name).as_bytes())).collect();
        (inodes, hashes)
    }

    #[test]
    fn all_are_found_and_nothing_else() {
        for (directories, count) in [(1, 1), (1, 1000), (1000, 1), (50, 1000)] {
            let (inodes, hashes) = inodes(directories, count);
            let table = make(&inodes, &hashes).unwrap();
            assert!(table.len().is_power_of_two() && table.len() >= 2 * inodes.len());
            let mut looks = 0;
            for (number, (inode, &hash)) in inodes.iter().zip(&hashes).enumerate().skip(1) {
                let found: Vec<_> = find(&table, inode.parent, hash).collect();
                let at = found.iter().position(|place| place.number == number as u32).unwrap();
                assert_eq!(found[at].name, inode.name);
                looks += at + 1;
            }
            assert!(looks <= 2 * inodes.len(), "{looks} looks for {directories} times {count}");
        }
    }

    #[test]
    fn lonely_and_hostile_ones_have_none() {
        assert_eq!(make(&inodes(1, 0).0, &[7]), None);
        let (inodes, _) = inodes(1, PROBES as u32 + 1);
        // Others pass by, but not for ever.
        let same = vec![7; inodes.len()];
        assert!(make(&inodes[..=PROBES], &same).is_some());
        assert_eq!(make(&inodes, &same), None);
        assert_eq!(make(&inodes, &vec![u64::MAX; inodes.len()]), None);
    }

    #[test]
    fn nonsense_ends() {
        let place = Place { number: u32::MAX, name: u32::MAX };
        assert_eq!(find(&[], 1, 5).count(), 0);
        assert_eq!(find(&[place; 4], 1, 5).count(), 4);
        assert_eq!(find(&[place; 256], u32::MAX, 5).count(), PROBES);
        assert_eq!(find(&[place; 3], 1, 5).count(), 3);
    }
}
