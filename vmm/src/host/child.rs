//! What a child does between fork and exec: it gives up all that its program is not to have.

#![allow(unsafe_code)] // Only system calls may be made there, some of which no library offers in that form.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::confine::{Confinement, Rlimits};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open},
    libc,
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid, write},
};
use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// Files and sockets of a program with a user of its own are for that and its group. What others make, the index above all, is for these to
/// read.
const UMASK: Mode = Mode::from_bits_truncate(0o007);

/// Has `command` confine itself. It must be started before `confinement` is dropped, whose descriptors it uses.
pub(super) fn confine(command: &mut Command, confinement: &Confinement) {
    let child = Child {
        limits: confinement.limits,
        cgroup: confinement.cgroup.as_ref().map(AsRawFd::as_raw_fd),
        ids: confinement
            .identity
            .as_ref()
            .map(|identity| (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid))),
        groups: confinement
            .identity
            .as_ref()
            .map(|identity| identity.groups.iter().copied().map(Gid::from_raw).collect())
            .unwrap_or_default(),
        keep: confinement.keep.iter().map(AsRawFd::as_raw_fd).collect(),
    };
    // SAFETY: `enter` makes system calls only: it takes no lock and no memory, so it may run in the child of a process with threads.
    unsafe { command.pre_exec(move || child.enter().map_err(io::Error::from)) };
}

/// All that is needed, made before the fork.
struct Child {
    limits: Rlimits,
    cgroup: Option<RawFd>,
    ids: Option<(Uid, Gid)>,
    groups: Vec<Gid>,
    keep: Vec<RawFd>,
}

impl Child {
    /// Everything that takes a right comes before the rights are given up.
    fn enter(&self) -> Result<(), Errno> {
        if let Some(cgroup) = self.cgroup {
            // SAFETY: The parent holds the descriptor open until the child runs its program.
            write(unsafe { BorrowedFd::borrow_raw(cgroup) }, b"0")?;
        }
        self.limits()?;
        // laird's own protection is not for what a guest can make grow. It may be that there is no such file.
        if let Ok(file) = open("/proc/self/oom_score_adj", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())
        {
            let _ = write(&file, b"0");
        }
        if let Some((uid, gid)) = self.ids {
            umask(UMASK);
            setgroups(&self.groups)?;
            setresgid(gid, gid, gid)?;
            // All capabilities go with the last of root's ids.
            setresuid(uid, uid, uid)?;
        }
        prctl::set_no_new_privs()?;
        self.descriptors()
    }

    fn limits(&self) -> Result<(), Errno> {
        let Rlimits { files, file_size, locked } = self.limits;
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        if let Some(files) = files {
            setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
        }
        if let Some(size) = file_size {
            setrlimit(Resource::RLIMIT_FSIZE, size, size)?;
        }
        if let Some(locked) = locked {
            setrlimit(Resource::RLIMIT_MEMLOCK, locked, locked)?;
        }
        Ok(())
    }

    /// Leaves the program standard input, output and error, and what was named.
    fn descriptors(&self) -> Result<(), Errno> {
        // Closed only by the exec: the standard library tells by one of them that the exec failed.
        // SAFETY: It touches no memory.
        let done =
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Errno::result(done)?;
        for fd in &self.keep {
            // SAFETY: As above.
            fcntl(unsafe { BorrowedFd::borrow_raw(*fd) }, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    }
}
