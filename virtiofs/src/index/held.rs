//! Bytes of a manifest, and where its sections are in them.

#![allow(unsafe_code)] // A thing that refers to itself.

use super::{bytes::Bytes, manifest::Sections};
use std::mem::MaybeUninit;

/// Bytes and the sections in them, found once: finding them again for each request takes longer than what is then done with them.
#[derive(Debug, Clone)]
pub(super) struct Held {
    bytes: Bytes,
    /// Of `bytes`, and not to be given out for longer than these live. Always initialised: it is kept like this because a reference
    /// promises that what it refers to outlives the call to which it is passed, and these may go with the bytes in such a call.
    sections: MaybeUninit<Sections<'static>>,
}

impl Held {
    /// Keeps the bytes and what `find` finds in them; `None` where it finds nothing.
    pub(super) fn new(
        bytes: Bytes,
        find: impl for<'a> FnOnce(&'a [u8]) -> Option<Sections<'a>>,
    ) -> Option<Self> {
        let whole: *const [u8] = &raw const *bytes;
        // SAFETY: The bytes are on the heap or in a mapping, shared with whoever else has them, and never change: so they stay where they are when
        // `bytes` is moved or cloned, for as long as any of these lives. The reference does not outlive `bytes`: `find` can keep
        // nothing that it is given, being made for any lifetime; and the sections leave here with the lifetime of `self` only.
        let whole: &'static [u8] = unsafe { &*whole };
        Some(Self { sections: MaybeUninit::new(find(whole)?), bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[inline]
    pub(super) fn sections(&self) -> Sections<'_> {
        // SAFETY: `new` has initialised it, and `bytes` live as long as `self`.
        unsafe { self.sections.assume_init() }
    }
}
