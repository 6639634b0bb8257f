//! Kicks and calls: eventfds in the type that the vhost crate wants, and a way to sleep on one.

#![allow(unsafe_code)] // That type cannot lend its descriptor in any other way.

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io::ErrorKind,
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd.
#[derive(Debug)]
pub(super) struct Event(EventFd);

impl Event {
    pub(super) fn new() -> Result<Self> {
        EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Self).context("Cannot make an eventfd")
    }

    pub(super) fn vhost(&self) -> &EventFd {
        &self.0
    }

    pub(super) fn signal(&self) -> Result<()> {
        self.0.write(1).context("Cannot signal an eventfd")
    }

    /// Sleeps until it is signalled, and takes the signal. `false` if that takes longer than this.
    pub(super) fn sleep(&self, patience: Duration) -> Result<bool> {
        // SAFETY: the descriptor is open as long as `self` is there.
        let fd = unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) };
        if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::try_from(patience)?)? == 0 {
            return Ok(false);
        }
        match self.0.read() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                Err(error).context("Cannot read an eventfd")
            }
            _ => Ok(true),
        }
    }
}
