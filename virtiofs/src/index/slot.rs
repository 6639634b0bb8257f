//! Who has which numbers: slots, the upper halves of node ids, and inode numbers as programs in the guest see them.

/// The first inode number. 1 is the root.
pub(super) const FIRST_INO: u64 = 2;

/// How the store paths are numbered: by their position in the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slots {
    /// From 1 upwards.
    Upwards,
}

impl Slots {
    /// `None` if there are no more.
    pub(super) fn slot(self, position: u32) -> Option<u32> {
        match self {
            Self::Upwards => position.checked_add(1),
        }
    }

    pub(super) fn first_ino(self) -> u64 {
        FIRST_INO
    }
}
