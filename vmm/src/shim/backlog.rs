//! Bytes that wait for someone who may be slow. When there are too many the oldest go and are counted: the end of a
//! flood is what explains it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::collections::VecDeque;

/// The waiting bytes, however small the pieces in which they came.
#[derive(Debug)]
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    limit: usize,
    lost: u64,
}

impl Backlog {
    /// Nothing, with room for `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit, lost: 0 }
    }

    pub(super) fn push(&mut self, piece: &[u8]) {
        let above = self.bytes.len().saturating_add(piece.len()).saturating_sub(self.limit);
        let old = above.min(self.bytes.len());
        self.bytes.drain(..old);
        self.bytes.extend(piece.get(above.saturating_sub(old)..).unwrap_or_default());
        self.lost = self.lost.saturating_add(u64::try_from(above).unwrap_or(u64::MAX));
    }

    /// How many bytes were lost before these, and all that wait.
    pub(super) fn take(&mut self) -> (u64, Vec<u8>) {
        (std::mem::take(&mut self.lost), std::mem::take(&mut self.bytes).into())
    }

    /// All that wait, which goes on waiting.
    pub(super) fn copy(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hv6_the_oldest_bytes_are_lost_and_counted() {
        let mut backlog = Backlog::new(8);
        backlog.push(b"abcde");
        backlog.push(b"fgh");
        assert_eq!(backlog.copy(), b"abcdefgh");
        backlog.push(b"ijk");
        assert_eq!(backlog.take(), (3, b"defghijk".to_vec()));
        assert_eq!(backlog.take(), (0, vec![]));
        backlog.push(b"12");
        backlog.push(b"0123456789abcdef");
        assert_eq!(backlog.take(), (10, b"89abcdef".to_vec()));
    }
}
