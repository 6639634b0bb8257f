//! Copying between the guest's buffers, private memory and files.

#![allow(unsafe_code)] // preadv into guest memory takes raw pointers.

use nix::{errno::Errno, libc};
use std::{fs::File, os::fd::AsRawFd};
use vm_memory::{Bytes, VolatileSlice};

/// The most buffers that one system call takes.
const IOV_MAX: usize = 1024;

/// The beginning of what the buffers hold, at most `max` bytes.
pub(super) fn copy_in(buffers: &[VolatileSlice<'_>], max: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(max.min(256));
    for buffer in buffers {
        let left = max.saturating_sub(bytes.len());
        if left == 0 {
            break;
        }
        let mut piece = vec![0; buffer.len().min(left)];
        let copied = buffer.copy_to(piece.as_mut_slice());
        piece.truncate(copied);
        bytes.extend(piece);
    }
    bytes
}

/// Copies `bytes` to the beginning of the buffers; what does not fit is left out. How many bytes were copied.
pub(super) fn copy_out(buffers: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut left = bytes;
    for buffer in buffers {
        let (now, later) = left.split_at(left.len().min(buffer.len()));
        // The piece is no longer than the buffer.
        let _ = buffer.write_slice(now, 0);
        left = later;
    }
    bytes.len().saturating_sub(left.len())
}

/// Reads `length` bytes of `file` from `offset` into the buffers, after their first `skip` bytes. All of it or an error:
/// a file that is shorter by now gives EIO.
pub(super) fn read_file(
    file: &File,
    offset: u64,
    length: usize,
    buffers: &[VolatileSlice<'_>],
    skip: usize,
) -> Result<(), Errno> {
    let mut done: usize = 0;
    while done < length {
        let from = offset.checked_add(done as u64).ok_or(Errno::EINVAL)?;
        let left = length.saturating_sub(done);
        match preadv(file, from, &pieces(buffers, skip.saturating_add(done), left)?) {
            Ok(0) => return Err(Errno::EIO),
            Ok(read) => done = done.saturating_add(read),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The part of the buffers from `skip` on, `length` bytes or as many as one system call takes. EINVAL if they are shorter.
fn pieces<'a>(
    buffers: &[VolatileSlice<'a>],
    skip: usize,
    length: usize,
) -> Result<Vec<VolatileSlice<'a>>, Errno> {
    let (mut skip, mut left) = (skip, length);
    let mut pieces: Vec<VolatileSlice<'a>> = Vec::new();
    for buffer in buffers {
        if left == 0 || pieces.len() == IOV_MAX {
            return Ok(pieces);
        }
        let begin = skip.min(buffer.len());
        skip = skip.saturating_sub(begin);
        let count = buffer.len().saturating_sub(begin).min(left);
        if count > 0 {
            pieces.push(buffer.subslice(begin, count).map_err(|_| Errno::EINVAL)?);
            left = left.saturating_sub(count);
        }
    }
    if left == 0 || pieces.len() == IOV_MAX { Ok(pieces) } else { Err(Errno::EINVAL) }
}

fn preadv(file: &File, offset: u64, pieces: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // The guards must live until the call is over.
    let guards: Vec<_> = pieces.iter().map(|piece| (piece.ptr_guard_mut(), piece.len())).collect();
    let mut iovecs: Vec<libc::iovec> = Vec::with_capacity(guards.len());
    for (guard, len) in &guards {
        let begin: *mut libc::c_void = guard.as_ptr().cast();
        // Guests cut contiguous buffers into pages. Fewer pieces cost the kernel less.
        match iovecs.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == begin => {
                last.iov_len = last.iov_len.saturating_add(*len);
            }
            _ => iovecs.push(libc::iovec { iov_base: begin, iov_len: *len }),
        }
    }
    let count = libc::c_int::try_from(iovecs.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: each iovec covers volatile slices of mapped, writable guest memory, which the caller's snapshot of the memory
    // keeps mapped. No reference to that memory exists, so the guest changing it at the same time is no aliasing.
    let read = unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count, offset) };
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

    #[test]
    fn copies_across_buffers() {
        let mem = memory();
        let buffers = slices(&mem, &[(100, 3), (50, 0), (200, 5)]);
        assert_eq!(copy_out(&buffers, b"abcdef"), 6);
        assert_eq!(copy_in(&buffers, 100), b"abcdef\0\0");
        assert_eq!(copy_in(&buffers, 4), b"abcd");
        assert_eq!(copy_out(&buffers, b"0123456789"), 8);
        assert_eq!(copy_in(&buffers, 100), b"01234567");
    }

    #[test]
    fn fu20_reads_all_or_fails() {
        let mem = memory();
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        file.write_all(&content).unwrap();
        // Contiguous, apart, and more than one system call takes.
        let many: Vec<(u64, usize)> = (0..2000).map(|i| (i * 10, 5)).collect();
        for parts in [vec![(0, 4096), (4096, 6000)], vec![(8192, 16), (0, 5000), (9000, 5000)], many] {
            let buffers = slices(&mem, &parts);
            let length = buffers.iter().map(VolatileSlice::len).sum::<usize>().min(10_000) - 16;
            read_file(&file, 7, length - 7, &buffers, 16).unwrap();
            assert_eq!(copy_in(&buffers, length + 9)[16..], content[7..length], "{}", parts.len());
        }
        let buffers = slices(&mem, &[(0, 100)]);
        assert_eq!(read_file(&file, 9_950, 60, &buffers, 0), Err(Errno::EIO));
        assert_eq!(read_file(&file, 0, 100, &buffers, 1), Err(Errno::EINVAL));
        assert_eq!(read_file(&file, u64::MAX, 10, &buffers, 0), Err(Errno::EINVAL));
    }
}
