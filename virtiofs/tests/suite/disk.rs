//! File systems of the tests' own: mounts that nobody else sees, and a disk that fails when it is told to.
//!
//! The disk is a FUSE file system, answered by the same server that answers guests, here to this machine's own kernel.

use crate::driver::Driver;
use lair_virtiofs::{
    files::{Part, Waiting},
    fuse::{
        Outcome, Request,
        wire::{InHeader, OUT_HEADER},
    },
    view::View,
};
use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    panic::resume_unwind,
    path::Path,
    sync::{Arc, Condvar, Mutex},
    thread,
};
use vm_memory::VolatileSlice;
use zerocopy::FromBytes;

/// Does `work` in a thread with mounts of its own, which go when it and what it starts are gone. `false`, and a line that says
/// so, where that is not allowed.
pub(crate) fn with_own_mounts(what: &str, work: impl FnOnce() + Send) -> bool {
    let work = || {
        let none: Option<&str> = None;
        let private = || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        };
        match private() {
            Ok(()) => work(),
            Err(errno) => {
                println!("SKIPPED: {what}, as mounts of its own are not possible here ({errno})");
                return false;
            }
        }
        true
    };
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// Mounts, in a thread that has mounts of its own.
pub(crate) fn mount_at(
    kind: &str,
    source: &str,
    at: &Path,
    flags: MsFlags,
    options: &str,
) -> nix::Result<()> {
    mount(Some(source), at, Some(kind), flags, Some(options))
}

/// Unmounts lazily: for whoever has something open in it, it stays.
pub(crate) fn unmount_lazily(at: &Path) {
    umount2(at, MntFlags::MNT_DETACH).unwrap();
}

/// What the disk does with a READ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Well,
    /// It fails with this.
    Fails(Errno),
    /// It does not answer, until it does again.
    Hangs,
}

#[derive(Debug)]
struct State {
    health: Mutex<(Health, usize)>,
    changed: Condvar,
}

/// A file system that shows a view of a store. It answers until it is dropped, and then to nobody.
#[derive(Debug)]
pub(crate) struct Disk {
    state: Arc<State>,
    device: File,
}

impl Disk {
    /// Mounts it, in a thread that has mounts of its own.
    pub(crate) fn mount(store: &Path, view: &View, at: &Path) -> nix::Result<Self> {
        let errno = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        let device = File::options().read(true).write(true).open("/dev/fuse").map_err(errno)?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let driver = Driver::new(store, view);
        mount_at("fuse", "lair-test", at, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, &options)?;
        let state = Arc::new(State { health: Mutex::new((Health::Well, 0)), changed: Condvar::new() });
        // As many as may hang at once, and more.
        let driver = Arc::new(driver);
        for _ in 0..16 {
            let (driver, state, device) = (driver.clone(), state.clone(), device.try_clone().map_err(errno)?);
            thread::spawn(move || answer(&driver, &state, device));
        }
        Ok(Self { state, device })
    }

    /// What becomes of reads from now on.
    pub(crate) fn set(&self, health: Health) {
        self.state.health.lock().unwrap().0 = health;
        self.state.changed.notify_all();
    }

    /// How many reads hang.
    pub(crate) fn hanging(&self) -> usize {
        self.state.health.lock().unwrap().1
    }

    /// Its descriptor, which tells whether it is still mounted.
    pub(crate) fn device(&self) -> &File {
        &self.device
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.set(Health::Fails(Errno::EIO));
    }
}

impl State {
    /// The error for a read, if it is to fail.
    fn read(&self) -> Result<(), Errno> {
        let mut health = self.health.lock().unwrap();
        health.1 += 1;
        let mut health = self.changed.wait_while(health, |(health, _)| *health == Health::Hangs).unwrap();
        health.1 -= 1;
        match health.0 {
            Health::Fails(errno) => Err(errno),
            _ => Ok(()),
        }
    }
}

/// Answers the kernel until the file system is unmounted.
fn answer(driver: &Driver, state: &State, mut device: File) {
    let mut bytes = vec![0; 256 << 10];
    loop {
        let count = match device.read(&mut bytes) {
            Ok(count) => count,
            // Interrupted; gone before it was read.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => {
                continue;
            }
            // Unmounted.
            Err(_) => return,
        };
        let request = &bytes[..count];
        let mut reply = Vec::new();
        let whole = Request { bytes: request, total: count as u64 };
        match driver.server.handle(
            &driver.server.tree(),
            &driver.session,
            &driver.stats,
            whole,
            8 << 20,
            &mut reply,
        ) {
            Outcome::Silent => continue,
            Outcome::Reply => {}
            Outcome::Read(read) => {
                let mut content = vec![0; read.length as usize];
                let piece = VolatileSlice::from(content.as_mut_slice());
                let done = state.read().and_then(|()| {
                    let file = driver.files.get(&driver.server.tree(), read.node, true)?.ok_or(Errno::EIO)?;
                    file.read(read.offset, Part::all(&[piece]), Waiting::Allowed)
                });
                match done {
                    Ok(_) => reply.extend(content),
                    Err(errno) => drop(driver.server.error(errno, read.unique, OUT_HEADER, &mut reply)),
                }
            }
        }
        let (asked, _) = InHeader::read_from_prefix(request).unwrap();
        assert!(asked.unique != 0, "{asked:?}");
        // A reply to what was interrupted meanwhile is not wanted any more.
        let _ = device.write_all(&reply);
    }
}
