//! The directory of an index and the files in it: `registry`, `pack-NNNNNNNN`, `lock`.
//!
//! One program at a time writes, and holds the lock. What it writes is complete before it has its name, or before the registry
//! tells of it; so readers need no lock.

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat},
    sys::stat::{Mode, fchmod},
    unistd::{UnlinkatFlags, unlinkat},
};
use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};
use thiserror::Error;
use tracing::info;

/// Why a file of an index cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// A system call failed.
    #[error("Cannot {verb} {path}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// It has other contents than its name says, or was damaged.
    #[error("{path} is not what its name says, or is damaged")]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// Another version.
    #[error("{path} has version {version} of the format; version {known} is known")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// This program's.
        known: u32,
    },
    /// It is larger than any that this program makes.
    #[error("{path} has more than {limit} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
}

/// What the names of files end with that are not complete yet.
const TEMPORARY: &str = ".tmp";

const LOCK: &str = "lock";

/// The directory of an index.
#[derive(Debug)]
pub(super) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// Held while a program writes.
pub(super) struct Lock(#[allow(dead_code)] Flock<File>);

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty()).map_err(|errno| FileError::Io {
            verb: "open",
            path: path.into(),
            source: errno.into(),
        })?;
        Ok(Self { fd, path: path.into() })
    }

    /// Opens it, and makes it if it is not there.
    pub(super) fn create(path: &Path) -> Result<Self, FileError> {
        match DirBuilder::new().mode(0o755).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(FileError::Io { verb: "make the directory", path: path.into(), source: error })
            }
            _ => Self::open(path),
        }
    }

    /// The path of a file in it, for messages.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn error(&self, verb: &'static str, name: &str, source: impl Into<io::Error>) -> FileError {
        FileError::Io { verb, path: self.path(name), source: source.into() }
    }

    fn open_at(&self, name: &str, flags: OFlag, mode: Mode) -> nix::Result<File> {
        // Without O_NONBLOCK a FIFO would block.
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        // Not openat, which a confined backend may not use.
        let how = OpenHow::new().flags(flags).mode(mode).resolve(ResolveFlag::RESOLVE_BENEATH);
        openat2(&self.fd, name, how).map(File::from)
    }

    /// Opens a regular file; `None` if there is nothing.
    pub(super) fn file(&self, name: &str, flags: OFlag) -> Result<Option<File>, FileError> {
        let file = match self.open_at(name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::EISDIR | Errno::ELOOP | Errno::ENXIO) => {
                return Err(FileError::NotAFile { path: self.path(name) });
            }
            Err(errno) => return Err(self.error("open", name, errno)),
        };
        if !file.metadata().map_err(|e| self.error("open", name, e))?.is_file() {
            return Err(FileError::NotAFile { path: self.path(name) });
        }
        Ok(Some(file))
    }

    /// Makes a file that will have this name once [`Self::publish`] is called. Readers may have another uid.
    pub(super) fn temporary(&self, name: &str) -> Result<File, FileError> {
        let temporary = format!("{name}{TEMPORARY}");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        self.open_at(&temporary, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .and_then(|file| {
                fchmod(&file, Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH).map(|()| file)
            })
            .map_err(|errno| self.error("make", &temporary, errno))
    }

    /// Gives a file that was written its name, for good.
    pub(super) fn publish(&self, file: &File, name: &str) -> Result<(), FileError> {
        let temporary = format!("{name}{TEMPORARY}");
        file.sync_all().map_err(|e| self.error("write", &temporary, e))?;
        renameat(&self.fd, temporary.as_str(), &self.fd, name)
            .map_err(|errno| self.error("rename", &temporary, errno))?;
        nix::unistd::fsync(&self.fd).map_err(|errno| self.error("write", "", errno))
    }

    /// Removes a file that never got its name. If that fails, the next program that writes does it.
    pub(super) fn discard(&self, name: &str) {
        let _ = self.remove(&format!("{name}{TEMPORARY}"));
    }

    /// The names of all files.
    pub(super) fn names(&self) -> Result<Vec<String>, FileError> {
        let list = || -> nix::Result<Vec<String>> {
            let fd = openat(
                &self.fd,
                ".",
                OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                Mode::empty(),
            )?;
            let mut dir = Dir::from_fd(fd)?;
            let name = |entry: nix::Result<nix::dir::Entry>| {
                entry.map(|entry| entry.file_name().to_str().ok().map(str::to_owned)).transpose()
            };
            dir.iter().filter_map(name).collect()
        };
        list().map_err(|errno| self.error("list", "", errno))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), FileError> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(self.error("remove", name, errno)),
        }
    }

    /// Removes what a program left behind that was killed. Only with the lock.
    pub(super) fn clean(&self, _lock: &Lock) -> Result<(), FileError> {
        self.names()?.iter().filter(|name| name.ends_with(TEMPORARY)).try_for_each(|name| self.remove(name))
    }

    /// Waits until no other program writes. The file is readable for its owner only: whoever can open it could hold it, and
    /// keep all others from writing.
    pub(super) fn lock(&self) -> Result<Lock, FileError> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT;
        let file = self
            .open_at(LOCK, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| self.error("open", LOCK, errno))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Lock(lock)),
            Err((file, _)) => file,
        };
        info!("Waiting for another program that writes {}", self.path.display());
        loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(lock) => return Ok(Lock(lock)),
                Err((again, Errno::EINTR)) => file = again,
                Err((_, errno)) => return Err(self.error("lock", LOCK, errno)),
            }
        }
    }
}
