//! Hash tables of large directories: from a name to the position of a child, with one look where a binary search takes many.
//!
//! A table is a list of positions, each plus one, or 0 for nothing. Its length is a power of two that follows from the number
//! of children. A child is at the place that its name's hash says, or at one of the next ones. Whoever makes a store path
//! chooses its names, also so that their hashes are the same; so a directory in which one would have to look far has no table.

use twox_hash::XxHash3_64;

/// Directories with no more children have no table.
pub(super) const SMALL: usize = 16;

/// How many places there are to look at, at most.
const PROBES: usize = 64;

/// The hash of a name.
pub(super) fn hash(name: &[u8]) -> u64 {
    XxHash3_64::oneshot(name)
}

/// A part of the hash that is not used to find the place.
pub(super) fn tag(hash: u64) -> u16 {
    // It always fits.
    u16::try_from(hash >> 48).unwrap_or_default()
}

/// How long the table of a directory is.
pub(super) fn length(children: usize) -> Option<usize> {
    children.checked_mul(2)?.checked_next_power_of_two()
}

/// The table for children with these hashes; `None` if they are better off without.
pub(super) fn make(hashes: &[u64]) -> Option<Vec<u32>> {
    if hashes.len() <= SMALL {
        return None;
    }
    let mut table = vec![0; length(hashes.len())?];
    for (position, &hash) in hashes.iter().enumerate() {
        let place = places(hash, table.len()).find(|&place| table.get(place) == Some(&0))?;
        *table.get_mut(place)? = u32::try_from(position.checked_add(1)?).ok()?;
    }
    Some(table)
}

/// The position of the child with this hash for which `is` is true.
pub(super) fn find(table: &[u32], hash: u64, is: impl Fn(usize) -> bool) -> Option<usize> {
    // A loop, since the compiler puts what is chained into a function of its own.
    for place in places(hash, table.len()) {
        let position = usize::try_from(*table.get(place)?).ok()?.checked_sub(1)?;
        if is(position) {
            return Some(position);
        }
    }
    None
}

/// Where to look. What is made and what is found do not differ in that, so nothing is missed: a child is put at the first free
/// place, and none ever gets free again.
fn places(hash: u64, length: usize) -> impl Iterator<Item = usize> {
    let mask = length.saturating_sub(1);
    // It fits, as the mask does.
    let start = usize::try_from(hash & mask as u64).unwrap_or_default();
    (0..PROBES.min(length)).map(move |step| start.wrapping_add(step) & mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_found_and_nothing_else() {
        for count in [17, 100, 1000, 50_000] {
            let names: Vec<String> = (0..count).map(|n| format!("libname-{n}.so")).collect();
            let hashes: Vec<u64> = names.iter().map(|name| hash(name.as_bytes())).collect();
            let table = make(&hashes).unwrap();
            assert_eq!(table.len(), length(count).unwrap());
            for (position, name) in names.iter().enumerate() {
                let found = find(&table, hash(name.as_bytes()), |at| names[at] == *name);
                assert_eq!(found, Some(position));
                let other = format!("{name}.1");
                assert_eq!(find(&table, hash(other.as_bytes()), |at| names[at] == other), None);
            }
        }
    }

    #[test]
    fn small_ones_and_hostile_ones_have_none() {
        assert_eq!(make(&[1; 16]), None);
        // Others pass by, but not for ever.
        let mut hashes: Vec<u64> = vec![7; PROBES];
        assert!(make(&hashes).is_some());
        hashes.push(7 + (1 << 40));
        assert_eq!(make(&hashes), None);
        let around: Vec<u64> = (0..100).map(|_| u64::MAX).collect();
        assert_eq!(make(&around[..64]).map(|table| table.len()), Some(128));
        assert_eq!(make(&around), None);
    }

    #[test]
    fn nonsense_ends() {
        assert_eq!(find(&[], 5, |_| true), None);
        assert_eq!(find(&[1, 1, 1, 1], 5, |_| false), None);
        assert_eq!(find(&[u32::MAX; 256], 5, |_| false), None);
    }
}
