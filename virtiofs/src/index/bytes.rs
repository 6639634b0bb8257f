//! Where a manifest's bytes are.

use std::ops::Deref;
use zerocopy::IntoBytes;

/// Bytes that do not change.
#[derive(Debug, Clone)]
pub(super) enum Bytes {
    /// In memory of this process; in words, so that they are aligned.
    Private(Box<[u64]>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Private(words) => words.as_bytes(),
        }
    }
}
