//! One open file, and the fastest way to its contents that does not wait.
//!
//! What the page cache holds is read at once: by `preadv2` with RWF_NOWAIT, or, when a file is read again and again, by copying
//! from a mapping of it. What would have to come from a disk first is left to the caller, who may have others waiting.

use super::{
    Part,
    mapping::{Copied, Mapping},
};
use crate::buffers;
use nix::{errno::Errno, sys::stat::fstat};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The most bytes that are mapped of all files together. Page tables for it take 2 MiB.
const MAPPED_MAX: u64 = 1 << 30;

/// The largest file that is mapped, so that a few do not keep all others from it. That a file does not stay in a processor's cache is no reason
/// against it: read from its beginning to its end, one of 64 MiB comes faster out of a mapping too (`tests/bench virtiofs`).
const MAP_FILE_MAX: u64 = MAPPED_MAX / 4;

/// What must have been read of a file before it is mapped, at least. Mapping a file, touching 64 KiB of it and unmapping it costs
/// as much as twice reading that much.
const MAP_AFTER: u64 = 256 << 10;

/// A copy that took longer than this came from a disk.
const SLOW: Duration = Duration::from_millis(1);

/// Copies of so many bytes are timed each: it does not matter beside what they take, and what they wait for a disk is longer.
const TIMED_FROM: u64 = 256 << 10;

/// How much of a file is read at once to bring it into the page cache.
const WARM_PIECE: usize = 128 << 10;

/// What a store's file system can do.
#[derive(Debug)]
pub(super) struct Abilities {
    /// Reads that fail instead of waiting. Cleared when the file system says that it has none.
    pub(super) nowait: AtomicBool,
    /// Mappings that share the page cache, so that they cost no memory of their own.
    pub(super) map: bool,
    /// Bytes mapped of all files of all stores.
    pub(super) mapped: Arc<AtomicU64>,
}

/// Whether a read may wait for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// It may.
    Allowed,
    /// It may not, as far as that can be known. A copy from a mapping does so nevertheless where its page is no longer in memory, which is then seen
    /// by what it took; but to look at the clock twice takes longer than to copy a page.
    Refused {
        /// When the request was taken, if it is timed.
        since: Option<Instant>,
    },
}

/// What became of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// All bytes are where they belong.
    Done,
    /// It would have to wait for a disk. The buffers may hold some of it.
    WouldWait,
}

/// A regular file of a store, open for reading.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    size: u64,
    abilities: Arc<Abilities>,
    /// Bytes read since it was last found to be cold.
    served: AtomicU64,
    mapping: OnceLock<Option<Mapping>>,
}

impl OpenFile {
    /// `size` is the index's: no more than that is ever asked for.
    pub(super) fn new(file: File, size: u64, abilities: Arc<Abilities>) -> Self {
        Self { file, size, abilities, served: AtomicU64::new(0), mapping: OnceLock::new() }
    }

    /// Reads from `offset` until the buffers are full. EIO if the file is shorter by now. If it may wait, it never is
    /// [`Read::WouldWait`].
    #[inline(always)]
    pub fn read(&self, offset: u64, to: Part<'_, '_>, waiting: Waiting) -> Result<Read, Errno> {
        let length = to.len() as u64;
        let mut served = self.served.load(Ordering::Relaxed);
        let again = served >= self.size.saturating_mul(2);
        let read = if again
            && served >= MAP_AFTER
            && let Some(mapping) = self.mapping()
        {
            let from = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
            let since = match waiting {
                _ if length >= TIMED_FROM => Some(Instant::now()),
                Waiting::Refused { since } => since,
                Waiting::Allowed => None,
            };
            let copied = mapping.copy(from, to);
            if since.is_some_and(is_slow) {
                served = 0;
            }
            let end = offset.saturating_add(length);
            match copied? {
                Copied::ToLastPage if fstat(&self.file)?.st_size.cast_unsigned() < end => Err(Errno::EIO),
                Copied::ToLastPage | Copied::Whole => Ok(Read::Done),
            }
        } else if waiting == Waiting::Allowed {
            buffers::read_file(&self.file, offset, to, false)
        } else if self.abilities.nowait.load(Ordering::Relaxed) {
            match buffers::read_file(&self.file, offset, to, true) {
                Err(Errno::EOPNOTSUPP) => {
                    self.abilities.nowait.store(false, Ordering::Relaxed);
                    Ok(Read::WouldWait)
                }
                result => result,
            }
        } else if again {
            // Nothing tells what is in memory. What was read lately probably is.
            let since = Instant::now();
            let read = buffers::read_file(&self.file, offset, to, false);
            if is_slow(since) {
                served = 0;
            }
            read
        } else {
            Ok(Read::WouldWait)
        }?;
        if read == Read::Done {
            self.served.store(served.saturating_add(length), Ordering::Relaxed);
        }
        Ok(read)
    }

    /// Brings a part of the file into memory. Waits for it.
    pub(super) fn warm(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let mut piece = vec![0; WARM_PIECE.min(usize::try_from(length).unwrap_or(WARM_PIECE))];
        let mut done: u64 = 0;
        while done < length {
            match self.file.read_at(&mut piece, offset.saturating_add(done)) {
                Ok(0) => return Err(Errno::EIO),
                Ok(read) => done = done.saturating_add(read as u64),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
            }
        }
        Ok(())
    }

    fn mapping(&self) -> Option<&Mapping> {
        let map = || {
            if !self.abilities.map || self.size == 0 || self.size > MAP_FILE_MAX {
                return None;
            }
            let before = self.abilities.mapped.fetch_add(self.size, Ordering::Relaxed);
            let mapping = (before.saturating_add(self.size) <= MAPPED_MAX)
                .then(|| Mapping::new(&self.file, self.size).ok())
                .flatten();
            if mapping.is_none() {
                self.abilities.mapped.fetch_sub(self.size, Ordering::Relaxed);
            }
            mapping
        };
        self.mapping.get_or_init(map).as_ref().filter(|mapping| !mapping.is_lost())
    }
}

/// Whether what was thought to be in memory was not, having taken since then. Its file counts as cold again.
fn is_slow(since: Instant) -> bool {
    since.elapsed() > SLOW
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(Some(_)) = self.mapping.get() {
            self.abilities.mapped.fetch_sub(self.size, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;
    use vm_memory::VolatileSlice;

    fn file(size: u64, mapped: &Arc<AtomicU64>) -> OpenFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let abilities = Abilities { nowait: AtomicBool::new(true), map: true, mapped: mapped.clone() };
        OpenFile::new(file, size, Arc::new(abilities))
    }

    fn read(file: &OpenFile, waiting: Waiting) {
        let mut bytes = [0xfe; 4096];
        let pieces = [VolatileSlice::from(&mut bytes[..])];
        assert_eq!(file.read(0, Part::all(&pieces), waiting), Ok(Read::Done));
        assert_eq!(bytes, [0; 4096]);
    }

    /// Reads the beginning, and says whether that came from a mapping.
    fn reads_mapped(file: &OpenFile) -> bool {
        read(file, Waiting::Allowed);
        file.mapping.get().is_some_and(Option::is_some)
    }

    #[test]
    fn a_copy_that_took_long_makes_the_file_cold_again() {
        let file = file(1 << 20, &Arc::default());
        let now = Instant::now();
        // Only what is not begun yet has surely taken no time on a busy machine.
        let [later, before] = [now + Duration::from_secs(3600), now - SLOW * 2];
        let hot = 4 << 20;
        for (waiting, served) in [
            (Waiting::Refused { since: None }, hot + 4096),
            (Waiting::Refused { since: Some(later) }, hot + 4096),
            (Waiting::Refused { since: Some(before) }, 4096),
            (Waiting::Allowed, hot + 4096),
        ] {
            file.served.store(hot, Ordering::Relaxed);
            read(&file, waiting);
            assert!(file.mapping.get().is_some_and(Option::is_some));
            assert_eq!(file.served.load(Ordering::Relaxed), served, "{waiting:?}");
        }
    }

    #[test]
    fn what_is_read_again_and_again_is_mapped_up_to_a_large_size() {
        for (size, is_mapped) in
            [(4096, true), (64 << 20, true), (MAP_FILE_MAX, true), (MAP_FILE_MAX + 1, false)]
        {
            let mapped = Arc::default();
            let file = file(size, &mapped);
            file.served.store(size.saturating_mul(2).max(MAP_AFTER) - 1, Ordering::Relaxed);
            assert!(!reads_mapped(&file), "{size}");
            // That one was the last of the second time.
            assert_eq!(reads_mapped(&file), is_mapped, "{size}");
            assert_eq!(mapped.load(Ordering::Relaxed), if is_mapped { size } else { 0 });
            drop(file);
            assert_eq!(mapped.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn all_files_together_are_mapped_up_to_a_limit() {
        let mapped = Arc::default();
        let files: Vec<_> = (0..5).map(|_| file(MAP_FILE_MAX, &mapped)).collect();
        let hot = |file: &OpenFile| {
            file.served.store(u64::MAX, Ordering::Relaxed);
            reads_mapped(file)
        };
        assert_eq!(files.iter().map(hot).collect::<Vec<_>>(), [true, true, true, true, false]);
        assert_eq!(mapped.load(Ordering::Relaxed), MAPPED_MAX);
    }
}
