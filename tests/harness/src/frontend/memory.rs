//! A guest's memory: one memfd, mapped here and in the backend.

#![allow(unsafe_code)] // Memory that another process writes to can only be reached through raw pointers.

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
        uio::pread,
    },
};
use std::{
    fs::File,
    num::NonZeroUsize,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU16,
};
use vhost::VhostUserMemoryRegionInfo;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A guest's memory. An offset in it is the guest's physical address.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    length: usize,
    file: OwnedFd,
}

// SAFETY: a mapping belongs to no thread. It is reached by atomics, and by copies of which the rings' indexes say whose turn it is.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory of `length` bytes, all of it there from the start: a page that only the backend had touched would count
    /// as the backend's own.
    pub fn new(length: usize) -> Result<Self> {
        let file = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).context("Cannot make a guest's memory")?;
        nix::unistd::ftruncate(&file, i64::try_from(length)?)?;
        let size = NonZeroUsize::new(length).context("A guest without memory")?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping, where the kernel wants it.
        let base = unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, &file, 0) }
            .with_context(|| format!("Cannot map {length} bytes as a guest's memory"))?;
        Ok(Self { base: base.cast(), length, file })
    }

    /// What the backend is told about it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.length as u64,
            userspace_addr: self.base.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Where `length` bytes are. Panics outside of the memory.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length), "outside of the memory");
        // SAFETY: within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// A ring's index.
    pub fn atomic(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2), "an odd index");
        // SAFETY: within the mapping, which lives as long as `self`, and aligned.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// Has the processor fetch the line at `offset`, to read or to write it.
    pub fn fetch<const WRITE: bool>(&self, offset: usize) {
        lair_virtiofs::vhost::fetch::<WRITE>(self.at(offset, 1).addr());
    }

    /// Copies a value in.
    pub fn put<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.write(offset, value.as_bytes());
    }

    /// Copies a value out.
    pub fn get<T: FromBytes>(&self, offset: usize) -> T {
        // SAFETY: within the mapping; every pattern of bits is a `T`.
        unsafe { self.at(offset, size_of::<T>()).cast::<T>().read_unaligned() }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: within the mapping, which `bytes` is no part of.
        unsafe { self.at(offset, bytes.len()).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    /// Copies bytes in that may be many, as lair-virtiofs does.
    pub fn write_many(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: within the mapping, which `bytes` is no part of.
        unsafe { lair_virtiofs::files::copy(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: within the mapping, which `bytes` is no part of.
        unsafe { self.at(offset, bytes.len()).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Makes `length` bytes the same.
    pub fn fill(&self, offset: usize, length: usize, byte: u8) {
        // SAFETY: within the mapping.
        unsafe { self.at(offset, length).write_bytes(byte, length) }
    }

    /// Reads a file into it with one system call. How many bytes were read.
    pub fn pread(&self, file: &File, position: u64, offset: usize, length: usize) -> Result<usize> {
        // SAFETY: within the mapping; for the time of the call nobody else is to use these bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.at(offset, length), length) };
        Ok(pread(file, bytes, i64::try_from(position)?)?)
    }

    /// The same into several pieces, each of which is an offset and a length; waits where lair-virtiofs would leave that to another thread.
    pub fn preadv(&self, file: &File, position: u64, pieces: &[(usize, usize)]) -> Result<usize> {
        let piece = |&(offset, length): &(usize, usize)| libc::iovec {
            iov_base: self.at(offset, length).cast(),
            iov_len: length,
        };
        let pieces: Vec<_> = pieces.iter().map(piece).collect();
        let (count, position) = (i32::try_from(pieces.len())?, i64::try_from(position)?);
        // SAFETY: pieces of the mapping, which nobody has a reference to, and as many as there are.
        let read = unsafe { libc::preadv2(file.as_raw_fd(), pieces.as_ptr(), count, position, 0) };
        Ok(usize::try_from(Errno::result(read)?)?)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, to which no reference is left. A failure would leave it mapped.
        let _ = unsafe { munmap(self.base.cast(), self.length) };
    }
}
