//! Descriptors that come as bare numbers.

#![allow(unsafe_code)] // A number says nothing about who owns the descriptor.

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt},
};
use std::{
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    sync::atomic::{AtomicBool, Ordering},
};
use thiserror::Error;

/// Why an inherited descriptor cannot be used.
#[derive(Debug, Error)]
pub enum InheritError {
    /// Standard input, output and error are not for this.
    #[error("Descriptor {0} is a standard stream; 3 and above can be inherited")]
    Standard(RawFd),
    /// Not open, or no socket.
    #[error("Descriptor {0} is not an open socket")]
    NotASocket(RawFd, #[source] Errno),
    /// A socket of another kind.
    #[error("Descriptor {0} is not a listening unix socket")]
    NotListening(RawFd),
    /// One was taken over already.
    #[error("Descriptor {0} cannot be taken over: one already was")]
    Twice(RawFd),
}

/// Takes over the listening unix socket that the parent process left open under this number. Once in a process.
pub fn inherited_listener(number: RawFd) -> Result<UnixListener, InheritError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if number < 3 {
        return Err(InheritError::Standard(number));
    }
    let not_a_socket = |errno| InheritError::NotASocket(number, errno);
    let address: SockaddrStorage = getsockname(number).map_err(not_a_socket)?;
    // SAFETY: the descriptor is open, as the call above has shown, and stays so while nobody else knows its number.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let listens = getsockopt(&borrowed, sockopt::AcceptConn).map_err(not_a_socket)?;
    if address.family() != Some(AddressFamily::Unix) || !listens {
        return Err(InheritError::NotListening(number));
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(InheritError::Twice(number));
    }
    // SAFETY: the parent left it to this process by number, nothing here has opened it, and it is taken only once.
    Ok(UnixListener::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// Makes a descriptor non-blocking, for all processes that share it. A failure is left to the next use to show.
pub(crate) fn set_nonblocking(file: &impl AsRawFd) {
    // SAFETY: `file` is borrowed until after the last use.
    let fd = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
    let Ok(flags) = flags(fd) else { return };
    if !flags.contains(OFlag::O_NONBLOCK) {
        let _ = fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
    }
}

/// Makes a descriptor blocking, for all processes that share it. Unlike the standard library's, which takes an ioctl.
pub(crate) fn set_blocking(file: &impl AsFd) -> nix::Result<()> {
    let flags = flags(file.as_fd())?;
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map(drop)
}

fn flags(fd: BorrowedFd<'_>) -> nix::Result<OFlag> {
    fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain)
}
