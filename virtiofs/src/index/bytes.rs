//! Where a manifest's bytes are: in memory of this process, or in a file that is mapped.

#![allow(unsafe_code)] // Mapping a file, and pointing into the mapping.

use memmap2::{Advice, Mmap};
use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    ptr::NonNull,
    sync::Arc,
};

/// A file of an index, mapped read-only.
#[derive(Debug)]
pub(super) struct Map(Mmap);

impl Map {
    /// Maps the whole file. It must never be written to again, nor become shorter: the files of an index are written under
    /// another name and renamed when they are complete, and only their owner may write to them.
    pub(super) fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private and read-only. By the rule above nobody changes the file, so its bytes stay as they
        // are for as long as the mapping lives.
        let map = unsafe { Mmap::map(file) }?;
        // What is not in memory is then read as huge pages, in few steps. Where there are none, all is as without them.
        let _ = map.advise(Advice::HugePage);
        Ok(Self(map))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes that do not change.
#[derive(Debug, Clone)]
pub(super) enum Bytes {
    /// In words, so that they are aligned.
    Private(Arc<[u64]>),
    /// Part of a file. Mappings begin at pages, so they are aligned as they are in the file.
    Mapped(Part),
}

/// Part of a mapped file, which stays mapped as long as any part of it is used.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Found once: each request would otherwise go by way of the map, which is elsewhere in memory.
    bytes: NonNull<[u8]>,
    _map: Arc<Map>,
}

// SAFETY: It is a shared reference to bytes that nobody changes, together with what keeps them where they are.
unsafe impl Send for Part {}
// SAFETY: As above.
unsafe impl Sync for Part {}

impl Part {
    /// This part of `map`; `None` if it is not in it.
    pub(super) fn of(map: Arc<Map>, range: Range<usize>) -> Option<Self> {
        let bytes = NonNull::from(map.get(range)?);
        Some(Self { bytes, _map: map })
    }
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: It was made from a reference into the mapping, whose address does not change while it is mapped, and it is mapped as
        // long as `_map` lives, so at least as long as `self`. Nobody changes the bytes.
        unsafe { self.bytes.as_ref() }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Private(words) => zerocopy::IntoBytes::as_bytes(&**words),
            Self::Mapped(part) => part,
        }
    }
}
