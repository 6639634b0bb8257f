//! Copying between the guest's buffers, private memory and files.

#![allow(unsafe_code)] // preadv2 into guest memory takes raw pointers.

use crate::files::Read;
use nix::{errno::Errno, libc};
use smallvec::SmallVec;
use std::{fs::File, os::fd::AsRawFd, ptr::copy_nonoverlapping};
use vm_memory::{Bytes, VolatileSlice};

/// The most buffers that one system call takes.
const IOV_MAX: usize = 1024;

/// What is copied at once of something short, and how long that is: requests without names, and replies that are neither listings nor contents.
const BLOCK: usize = 16;
const SHORT: usize = 128;

/// Part of a guest's buffers: so many bytes, after so many that are skipped.
#[derive(Debug, Clone, Copy)]
pub struct Part<'b, 'm> {
    buffers: &'b [VolatileSlice<'m>],
    skip: usize,
    length: usize,
}

impl<'b, 'm> Part<'b, 'm> {
    /// All of the buffers.
    pub fn all(buffers: &'b [VolatileSlice<'m>]) -> Self {
        let length = buffers.iter().map(VolatileSlice::len).fold(0, usize::saturating_add);
        Self { buffers, skip: 0, length }
    }

    /// `length` bytes of buffers which have `all` together, after the first `skip`. `None` if that is not in them.
    pub(crate) fn of(
        buffers: &'b [VolatileSlice<'m>],
        all: usize,
        skip: usize,
        length: usize,
    ) -> Option<Self> {
        (skip.checked_add(length)? <= all).then_some(Self { buffers, skip, length })
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// What it has behind its first `count` bytes.
    fn after(self, count: usize) -> Self {
        let count = count.min(self.length);
        let (skip, length) = (self.skip.saturating_add(count), self.length.saturating_sub(count));
        Self { skip, length, ..self }
    }

    /// Its pieces, none of which is empty.
    #[inline]
    pub(crate) fn pieces(self) -> impl Iterator<Item = VolatileSlice<'m>> + use<'b, 'm> {
        let (mut skip, mut left, mut buffers) = (self.skip, self.length, self.buffers.iter());
        // A loop, since the compiler makes more of what is chained.
        std::iter::from_fn(move || {
            while left > 0 {
                let buffer = buffers.next()?;
                let begin = skip.min(buffer.len());
                skip = skip.saturating_sub(begin);
                let count = buffer.len().saturating_sub(begin).min(left);
                left = left.saturating_sub(count);
                if count > 0 {
                    return buffer.subslice(begin, count).ok();
                }
            }
            None
        })
    }
}

/// Copies the beginning of what the buffers hold to `bytes`, as much as there is room for. How much that was.
pub(crate) fn copy_in(buffers: &[VolatileSlice<'_>], bytes: &mut [u8]) -> usize {
    let mut left = bytes;
    let mut copied: usize = 0;
    for buffer in buffers {
        let count = if (BLOCK..=SHORT).contains(&buffer.len()) && left.len() >= buffer.len() {
            let guard = buffer.ptr_guard();
            // SAFETY: both are as long as the buffer or longer.
            unsafe { copy_short(guard.as_ptr(), left.as_mut_ptr(), buffer.len()) };
            buffer.len()
        } else {
            buffer.copy_to(left)
        };
        copied = copied.saturating_add(count);
        left = left.get_mut(count..).unwrap_or_default();
        if left.is_empty() {
            break;
        }
    }
    copied
}

/// Copies `bytes` to the beginning of the buffers; what does not fit is left out. How many bytes were copied.
pub(crate) fn copy_out(buffers: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut left = bytes;
    for buffer in buffers {
        let (now, later) = left.split_at(left.len().min(buffer.len()));
        if (BLOCK..=SHORT).contains(&now.len()) {
            let guard = buffer.ptr_guard_mut();
            // SAFETY: the piece is no longer than the buffer.
            unsafe { copy_short(now.as_ptr(), guard.as_ptr(), now.len()) };
        } else {
            // Nor is it here.
            let _ = buffer.write_slice(now, 0);
        }
        left = later;
        if left.is_empty() {
            break;
        }
    }
    bytes.len().saturating_sub(left.len())
}

/// Copies a few blocks, the last of which may overlap the one before. A call of the C library's function takes longer than such a copy, and requests
/// and replies consist of two each.
///
/// # Safety
///
/// As for [`copy_nonoverlapping`] of `length` bytes, which is a block or more. The guest may change what is copied meanwhile: these are bytes, of
/// which any value is valid.
#[inline(always)]
unsafe fn copy_short(from: *const u8, to: *mut u8, length: usize) {
    let copy = |at: usize| {
        // SAFETY: a block that ends within `length`.
        unsafe {
            copy_nonoverlapping(from.wrapping_add(at).cast::<[u8; BLOCK]>(), to.wrapping_add(at).cast(), 1)
        };
    };
    let last = length.saturating_sub(BLOCK);
    copy(0);
    copy(last);
    if length > BLOCK * 2 {
        let end = last.saturating_sub(BLOCK);
        copy(BLOCK);
        copy(end);
        let mut at = BLOCK * 2;
        while at < end {
            copy(at);
            at = at.saturating_add(BLOCK);
        }
    }
}

/// Reads from `offset` of `file` until the buffers are full. A file that is shorter by now gives EIO. With `nowait`,
/// only what is in memory is read, and EOPNOTSUPP says that the file system cannot do so.
pub(crate) fn read_file(file: &File, offset: u64, to: Part<'_, '_>, nowait: bool) -> Result<Read, Errno> {
    let (mut offset, mut left) = (offset, to);
    while left.len() > 0 {
        match preadv(file, offset, left, nowait) {
            Ok(0) => return Err(Errno::EIO),
            Ok(read) => {
                offset = offset.checked_add(read as u64).ok_or(Errno::EINVAL)?;
                left = left.after(read);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if nowait => return Ok(Read::WouldWait),
            Err(errno) => return Err(errno),
        }
    }
    Ok(Read::Done)
}

fn preadv(file: &File, offset: u64, to: Part<'_, '_>, nowait: bool) -> Result<usize, Errno> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // The guards must live until the call is over.
    let guards: SmallVec<[_; 4]> =
        to.pieces().take(IOV_MAX).map(|piece| (piece.ptr_guard_mut(), piece.len())).collect();
    let iovecs: SmallVec<[libc::iovec; 4]> = guards
        .iter()
        .map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: *len })
        .collect();
    let count = libc::c_int::try_from(iovecs.len()).map_err(|_| Errno::EINVAL)?;
    let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: each iovec covers a volatile slice of mapped, writable guest memory, which the caller's snapshot of the memory
    // keeps mapped. No reference to that memory exists, so the guest changing it at the same time is no aliasing.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), iovecs.as_ptr(), count, offset, flags) };
    usize::try_from(read).map_err(|_| Errno::last())
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn slices<'a>(mem: &'a GuestMemoryMmap, parts: &[(u64, usize)]) -> Vec<VolatileSlice<'a>> {
        parts.iter().map(|&(at, len)| mem.get_slice(GuestAddress(at), len).unwrap()).collect()
    }

    fn held(buffers: &[VolatileSlice<'_>], max: usize) -> Vec<u8> {
        let mut bytes = vec![0; max];
        let count = copy_in(buffers, &mut bytes);
        bytes.truncate(count);
        bytes
    }

    #[test]
    fn copies_across_buffers() {
        let mem = memory();
        let buffers = slices(&mem, &[(100, 3), (50, 0), (200, 5)]);
        assert_eq!(copy_out(&buffers, b"abcdef"), 6);
        assert_eq!(held(&buffers, 100), b"abcdef\0\0");
        assert_eq!(held(&buffers, 4), b"abcd");
        assert_eq!(copy_out(&buffers, b"0123456789"), 8);
        assert_eq!(held(&buffers, 100), b"01234567");
    }

    /// Those that are copied in blocks, the shortest and the longest of them, and their neighbours; into more room, just enough and too little.
    #[test]
    fn every_byte_of_a_short_buffer_is_copied_and_no_other_is_touched() {
        let content: Vec<u8> = (1..=200).collect();
        for length in 0..=140 {
            let mem = memory();
            mem.write_slice(&content, GuestAddress(1001)).unwrap();
            let buffers = slices(&mem, &[(1001, length)]);
            for room in [length.saturating_sub(1), length, length + 1, 160] {
                let mut bytes = [0xfe; 180];
                let copied = copy_in(&buffers, &mut bytes[..room]);
                assert_eq!(copied, length.min(room), "{length} into {room}");
                assert_eq!(bytes[..copied], content[..copied], "{length} into {room}");
                assert!(bytes[copied..].iter().all(|&byte| byte == 0xfe), "{length} into {room}");
            }
            for count in [length.saturating_sub(1), length, length + 1, 160] {
                mem.write_slice(&[0xfe; 300], GuestAddress(950)).unwrap();
                let copied = copy_out(&buffers, &content[..count]);
                assert_eq!(copied, length.min(count), "{count} of {length}");
                let around = slices(&mem, &[(950, 300)]);
                let now = held(&around, 300);
                assert_eq!(now[51..51 + copied], content[..copied], "{count} of {length}");
                let others = now[..51].iter().chain(&now[51 + copied..]);
                assert!(others.copied().all(|byte| byte == 0xfe), "{count} of {length}");
            }
        }
    }

    #[test]
    fn fu20_reads_all_or_fails() {
        let mem = memory();
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        file.write_all(&content).unwrap();
        let read = |buffers: &[VolatileSlice<'_>], offset, length, skip| {
            let to = Part::of(buffers, Part::all(buffers).len(), skip, length).ok_or(Errno::EINVAL)?;
            read_file(&file, offset, to, false)
        };
        // Contiguous, apart, and more than one system call takes.
        let many: Vec<(u64, usize)> = (0..2000).map(|i| (i * 10, 5)).collect();
        for parts in [vec![(0, 4096), (4096, 6000)], vec![(8192, 16), (0, 5000), (9000, 5000)], many] {
            let buffers = slices(&mem, &parts);
            let length = buffers.iter().map(VolatileSlice::len).sum::<usize>().min(10_000) - 16;
            assert_eq!(read(&buffers, 7, length - 7, 16), Ok(Read::Done));
            assert_eq!(held(&buffers, length + 9)[16..], content[7..length], "{}", parts.len());
        }
        let buffers = slices(&mem, &[(0, 100)]);
        assert_eq!(read(&buffers, 9_950, 60, 0), Err(Errno::EIO));
        assert_eq!(read(&buffers, 0, 100, 1), Err(Errno::EINVAL));
        assert_eq!(read(&buffers, u64::MAX, 10, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn pieces_go_on_in_mid_piece() {
        let mem = memory();
        let buffers = slices(&mem, &[(0, 10), (15, 0), (20, 10), (40, 10)]);
        let lengths = |part: Part<'_, '_>| part.pieces().map(|piece| piece.len()).collect::<Vec<_>>();
        let part = Part::of(&buffers, 30, 5, 20).unwrap();
        assert_eq!(lengths(part), [5, 10, 5]);
        assert_eq!(lengths(part.after(5)), [10, 5]);
        assert_eq!(lengths(part.after(8)), [7, 5]);
        assert_eq!(lengths(part.after(19)), [1]);
        assert!(lengths(part.after(20)).is_empty());
        assert_eq!(part.after(21).len(), 0);
        assert_eq!(lengths(Part::all(&buffers)), [10, 10, 10]);
        assert!(Part::of(&buffers, 30, 11, 20).is_none());
        assert!(Part::of(&buffers, 30, usize::MAX, 1).is_none());
    }
}
