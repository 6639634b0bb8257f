//! Who has which numbers: slots, the upper halves of node ids, and inode numbers as programs in the guest see them.

/// The largest slot that a registry gives. Those above are for store paths that no index has.
pub(super) const REGISTRY_MAX: u32 = 0xfeff_ffff;

/// The first inode number that a registry gives. 1 is the root.
pub(super) const FIRST_INO: u64 = 2;

/// From here on to 2^32 are the inode numbers for store paths that a backend with an index reads by itself. 2^31 inodes are
/// far more than a host has; a registry that needs more goes on at 2^32, where 32-bit programs without large-file support
/// cannot stat a file any more.
const PRIVATE_INO: u64 = 1 << 31;

/// The end of what a registry gives: overlayfs needs some bits above.
const INO_END: u64 = 1 << 44;

/// How the store paths are numbered that no index has: by their position in the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slots {
    /// From 1 upwards; there is no index.
    Upwards,
    /// From the top downwards, where no registry gives any.
    Downwards,
}

impl Slots {
    /// `None` if there are no more.
    pub(super) fn slot(self, position: u32) -> Option<u32> {
        match self {
            Self::Upwards => position.checked_add(1),
            Self::Downwards => u32::MAX.checked_sub(position).filter(|&slot| slot > REGISTRY_MAX),
        }
    }

    pub(super) fn first_ino(self) -> u64 {
        match self {
            Self::Upwards => FIRST_INO,
            Self::Downwards => PRIVATE_INO,
        }
    }
}

/// Where a registry has room for `count` more inode numbers when it has given all below `next`. `None` if nowhere.
pub(super) fn ino_range(next: u64, count: u32) -> Option<u64> {
    let fits = |first: u64, end: u64| first.checked_add(u64::from(count)).is_some_and(|after| after <= end);
    [(next.max(FIRST_INO), PRIVATE_INO), (next.max(1 << 32), INO_END)]
        .into_iter()
        .find_map(|(first, end)| fits(first, end).then_some(first))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    #[test]
    fn private_slots_never_meet_a_registrys() {
        assert_eq!(Slots::Upwards.slot(0), Some(1));
        assert_eq!(Slots::Upwards.slot(u32::MAX), None);
        assert_eq!(Slots::Downwards.slot(0), Some(u32::MAX));
        let last = u32::MAX - REGISTRY_MAX - 1;
        assert_eq!(Slots::Downwards.slot(last), Some(REGISTRY_MAX + 1));
        assert_eq!(Slots::Downwards.slot(last + 1), None);
    }

    #[test]
    fn inode_numbers_stay_small_as_long_as_they_can() {
        assert_eq!(ino_range(0, 10), Some(2));
        assert_eq!(ino_range(1000, 10), Some(1000));
        assert_eq!(ino_range(PRIVATE_INO - 10, 10), Some(PRIVATE_INO - 10));
        assert_eq!(ino_range(PRIVATE_INO - 9, 10), Some(1 << 32));
        assert_eq!(ino_range((1 << 32) + 5, 10), Some((1 << 32) + 5));
        assert_eq!(ino_range(INO_END - 9, 10), None);
        assert_eq!(ino_range(u64::MAX, 1), None);
    }
}
