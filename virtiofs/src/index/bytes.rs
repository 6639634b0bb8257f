//! Where a manifest's bytes are: in memory of this process, or in a file that is mapped.

#![allow(unsafe_code)] // Mapping a file.

use memmap2::Mmap;
use std::{fs::File, io, ops::Deref, ops::Range, sync::Arc};

/// A file of an index, mapped read-only.
#[derive(Debug)]
pub(super) struct Map(Mmap);

impl Map {
    /// Maps the whole file. It must never be written to again, nor become shorter: the files of an index are written under
    /// another name and renamed when they are complete, and only their owner may write to them.
    pub(super) fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private and read-only. By the rule above nobody changes the file, so its bytes stay as they
        // are for as long as the mapping lives.
        unsafe { Mmap::map(file) }.map(Self)
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
    Private(Box<[u64]>),
    /// Part of a file. Mappings begin at pages, so they are aligned as they are in the file.
    Mapped { map: Arc<Map>, range: Range<usize> },
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Private(words) => zerocopy::IntoBytes::as_bytes(&**words),
            Self::Mapped { map, range } => map.get(range.clone()).unwrap_or_default(),
        }
    }
}
