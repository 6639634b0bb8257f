//! Files in memory: copies out of the page cache without a system call.
//!
//! A mapped file that became shorter raises SIGBUS where it is touched beyond its end. During a copy, that is caught: the page
//! is replaced by zeros, the copy fails, and so does every later one from that mapping. Anywhere else, as in guest memory that the hypervisor took away, SIGBUS
//! ends the process, and so costs its one VM.

#![allow(unsafe_code)] // Mapping, copying from what may change, and a signal handler.

use super::{Part, copy::copy};
use memmap2::{Mmap, MmapOptions};
use nix::{
    errno::Errno,
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::{SysconfVar, sysconf},
};
use std::{
    cell::Cell,
    fs::File,
    io,
    ptr::{null, read_volatile},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    },
};

/// A whole file, mapped.
#[derive(Debug)]
pub(super) struct Mapping {
    map: Mmap,
    /// A page was missing, and now is zeros.
    lost: AtomicBool,
}

/// What is known of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    /// It is what the file holds.
    Whole,
    /// It goes to the mapping's last page, of which the end may be zeros that the file does not hold.
    ToLastPage,
}

/// Where a thread copies from: the addresses, and what to set if a page is missing.
#[derive(Clone, Copy)]
struct Copying {
    begin: usize,
    end: usize,
    lost: *const AtomicBool,
}

const NOTHING: Copying = Copying { begin: 0, end: 0, lost: null() };

thread_local! {
    static COPYING: Cell<Copying> = const { Cell::new(NOTHING) };
}

/// Bytes of a page; 0 until the handler is installed.
static PAGE: AtomicUsize = AtomicUsize::new(0);

impl Mapping {
    /// Maps the first `size` bytes of `file`, which is not to be empty.
    pub(super) fn new(file: &File, size: u64) -> io::Result<Self> {
        catch_sigbus()?;
        let len = usize::try_from(size).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: the file may change, so no reference to what is mapped is ever made; it is only copied from, as raw
        // memory, and a page that is gone is caught.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        Ok(Self { map, lost: AtomicBool::new(false) })
    }

    /// Whether the file was found to be shorter than the mapping.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Copies what is at `offset` in the file to buffers of the guest, until they are full. EINVAL beyond the mapping's end, EIO if the
    /// file is, or once was, shorter.
    ///
    /// Behind a file's end, its last page is zeros, so a file that was cut in the last page of what is copied looks whole. It is
    /// not if the page behind is still there. Where the mapping has none, the answer is [`Copied::ToLastPage`]: the caller has to
    /// ask how long the file is.
    #[inline(always)]
    pub(super) fn copy(&self, offset: usize, to: Part<'_, '_>) -> Result<Copied, Errno> {
        let end = offset.checked_add(to.len()).filter(|&end| end <= self.map.len()).ok_or(Errno::EINVAL)?;
        let begin: *const u8 = self.map.as_ptr();
        let address = |at| begin.addr().saturating_add(at);
        let page = PAGE.load(Ordering::Relaxed);
        // A page is a power of two, which is not known to the compiler.
        let mask = page.wrapping_sub(1);
        let behind = end.checked_add(mask).map(|end| end & !mask).filter(|&behind| behind < self.map.len());
        let last = behind.map_or(end, |behind| behind.saturating_add(1));
        COPYING.set(Copying { begin: address(offset), end: address(last), lost: &raw const self.lost });
        let mut from = begin.wrapping_add(offset);
        for piece in to.pieces() {
            let to = piece.ptr_guard_mut();
            // SAFETY: `from` and the piece's length are within the mapping, as all of them are. The piece is
            // mapped guest memory, which its owner keeps mapped. The two do not overlap, as the file's mapping is ours alone.
            // Either may change meanwhile: what is copied are bytes, of which any value is valid.
            unsafe { copy(from, to.as_ptr(), piece.len()) };
            from = from.wrapping_add(piece.len());
        }
        if let Some(behind) = behind {
            // SAFETY: within the mapping; as above.
            unsafe { read_volatile(begin.wrapping_add(behind)) };
        }
        COPYING.set(NOTHING);
        // Another thread may have replaced a page before this one came to it.
        fence(Ordering::Acquire);
        match behind {
            _ if self.is_lost() => Err(Errno::EIO),
            Some(_) => Ok(Copied::Whole),
            None => Ok(Copied::ToLastPage),
        }
    }
}

/// Installs the handler, once.
fn catch_sigbus() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let install = || {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|n| usize::try_from(n).ok()).unwrap_or(4096);
        PAGE.store(page, Ordering::Relaxed);
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler calls nothing but mmap, write and signal, which may be called in one, and touches only
        // thread-local cells without destructors, and atomics.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
    };
    (*INSTALLED.get_or_init(install)).map_err(io::Error::from)
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let Copying { begin, end, lost } = COPYING.get();
    let page = PAGE.load(Ordering::Relaxed);
    let mask = !page.wrapping_sub(1);
    // The address may be told as that of its page.
    if (begin & mask..end).contains(&address) && page != 0 {
        // SAFETY: the mapping that is being copied from owns it, and is borrowed during the copy.
        unsafe { (*lost).store(true, Ordering::SeqCst) };
        let start = address & mask;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the page is one of a file's mapping that this thread is copying from, so nothing else is replaced.
        let mapped = unsafe {
            libc::mmap(std::ptr::without_provenance_mut(start), page, libc::PROT_READ, flags, -1, 0)
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    const MESSAGE: &[u8] = b"Memory is gone that the hypervisor or the index gave; this ends the backend\n";
    // SAFETY: the bytes are static. With the default action, the access that is repeated ends the process.
    unsafe {
        libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    #[test]
    fn fu20_a_file_that_became_shorter_is_an_error_and_nothing_more() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..=255).cycle().take(50_000).collect();
        file.write_all(&content).unwrap();
        let mapping = Mapping::new(&file, 50_000).unwrap();
        let pieces = |length| [mem.get_slice(GuestAddress(4096), length).unwrap()];
        let copied = |length| {
            let mut bytes = vec![0; length];
            mem.read_slice(&mut bytes, GuestAddress(4096)).unwrap();
            bytes
        };
        assert_eq!(mapping.copy(7, Part::all(&pieces(20_000))), Ok(Copied::Whole));
        assert_eq!(mapping.copy(0, Part::all(&pieces(49_152))), Ok(Copied::Whole));
        assert_eq!(mapping.copy(0, Part::all(&pieces(49_153))), Ok(Copied::ToLastPage));
        mapping.copy(7, Part::all(&pieces(20_000))).unwrap();
        assert_eq!(copied(20_000), content[7..20_007]);
        assert_eq!(mapping.copy(49_999, Part::all(&pieces(2))), Err(Errno::EINVAL));
        assert_eq!(mapping.copy(usize::MAX, Part::all(&pieces(2))), Err(Errno::EINVAL));
        file.set_len(8192).unwrap();
        assert_eq!(mapping.copy(0, Part::all(&pieces(50_000))), Err(Errno::EIO));
        assert!(mapping.is_lost());
        // The zeros in it are never taken for contents.
        assert_eq!(mapping.copy(20_000, Part::all(&pieces(100))), Err(Errno::EIO));
    }

    #[test]
    fn fu20_a_file_that_was_cut_in_the_last_page_of_a_read_is_an_error() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let piece = |length| [mem.get_slice(GuestAddress(4096), length).unwrap()];
        for (cut, length) in [(8000, 8100), (8191, 8192), (4097, 8192), (8000, 8001)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(50_000).unwrap();
            let mapping = Mapping::new(&file, 50_000).unwrap();
            assert_eq!(mapping.copy(0, Part::all(&piece(length))), Ok(Copied::Whole));
            file.set_len(cut).unwrap();
            assert_eq!(mapping.copy(0, Part::all(&piece(length))), Err(Errno::EIO), "{cut} {length}");
        }
    }
}
