//! The library's vring, with more care for what the hypervisor gives.
//!
//! The library ends a queue's worker for good, and with it the connection, when a kick cannot be read. But there may be none to be
//! read: a worker that an old eventfd has woken may find a new one in its place, or another worker may have been faster. So
//! that is no error here. And no descriptor may hold the thread that uses it, so each is made non-blocking when it comes.

use super::queue::Memory;
use crate::fd;
use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

type Inner = VringMutex<Memory>;

/// A vring that several threads share.
#[derive(Clone)]
pub(super) struct Vring {
    inner: Inner,
    /// The last size was none that a queue can have. The library keeps the one before, of which the hypervisor knows nothing.
    bad_size: Arc<AtomicBool>,
    /// The guest had used it when it was set up.
    in_use: Arc<AtomicBool>,
}

impl Vring {
    /// Whether the guest had used it when it was set up, as before this connection.
    pub(super) fn was_in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed)
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <Inner as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <Inner as VringStateMutGuard<'a, Memory>>::G;
}

fn nonblocking(file: Option<File>) -> Option<File> {
    file.inspect(fd::set_nonblocking)
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Inner::new(memory, max_queue_size).map(|inner| Self {
            inner,
            bad_size: Arc::default(),
            in_use: Arc::default(),
        })
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.inner.read_kick() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(self.get_ref().is_enabled()),
            result => result,
        }
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(nonblocking(file));
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(nonblocking(file));
    }

    fn set_queue_size(&self, size: u16) {
        self.bad_size.store(!size.is_power_of_two(), Ordering::Relaxed);
        self.inner.set_queue_size(size);
    }

    fn set_queue_info(&self, table: u64, available: u64, used: u64) -> Result<(), Error> {
        if self.bad_size.load(Ordering::Relaxed) {
            return Err(Error::InvalidSize);
        }
        self.inner.set_queue_info(table, available, used)
    }

    /// The library's request handler calls this when it is told the addresses, with what the guest's memory says.
    fn set_queue_next_used(&self, index: u16) {
        self.in_use.store(index != 0, Ordering::Relaxed);
        self.inner.set_queue_next_used(index);
    }

    // All else is the library's.

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, head: u16, length: u32) -> Result<(), Error> {
        self.inner.add_used(head, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, IntoRawFd};
    use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EventFd;

    fn vring() -> Vring {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        Vring::new(GuestMemoryAtomic::new(memory), 1024).unwrap()
    }

    /// A blocking one, and what it is known by to the device.
    fn event() -> (EventFd, File) {
        let event = EventFd::new(0).unwrap();
        let copy = event.try_clone().unwrap().into_raw_fd();
        // SAFETY: nobody else has the copy.
        #[allow(unsafe_code)]
        let file = unsafe { File::from_raw_fd(copy) };
        (event, file)
    }

    #[test]
    fn vu8_a_kick_that_is_not_there_is_no_error() {
        let vring = vring();
        let (event, file) = event();
        vring.set_kick(Some(file));
        // A blocking read would stay here.
        assert!(!vring.read_kick().unwrap());
        vring.set_enabled(true);
        assert!(vring.read_kick().unwrap());
        event.write(3).unwrap();
        assert!(vring.read_kick().unwrap());
        // It was taken.
        assert!(event.read().is_err());
        // What can never be read is an error: it would else be there for ever.
        let (reader, writer) = io::pipe().unwrap();
        drop(writer);
        vring.set_kick(Some(File::from(std::os::fd::OwnedFd::from(reader))));
        assert!(vring.read_kick().is_err());
    }

    #[test]
    fn vu8_a_full_call_does_not_block() {
        let vring = vring();
        let (event, file) = event();
        event.write(u64::MAX - 1).unwrap();
        vring.set_call(Some(file));
        assert_eq!(vring.signal_used_queue().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
        vring.signal_used_queue().unwrap();
    }

    #[test]
    fn vu5_sizes_that_are_no_powers_of_two() {
        let vring = vring();
        vring.set_queue_size(64);
        for size in [0, 3, 63, 65, 1000, 1023] {
            vring.set_queue_size(size);
            assert!(vring.set_queue_info(0, 0x1000, 0x2000).is_err(), "{size}");
        }
        vring.set_queue_size(128);
        assert!(vring.set_queue_info(0, 0x1000, 0x2000).is_ok());
    }
}
