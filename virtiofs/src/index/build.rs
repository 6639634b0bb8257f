//! Walking a store path to make its [`Manifest`].
//!
//! Only directories, regular files and symbolic links are taken; anything else is left out, as Nix makes nothing else.
//! No symbolic link is followed. Directories are opened one at a time, so the walk needs two descriptors. Files that are
//! hard links of each other within the store path become one inode; links from elsewhere do not matter.

use super::{
    inode::{Inode, Kind},
    manifest::{Manifest, Parts},
};
use crate::{beneath, store::StorePath};
use nix::{
    NixPath,
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, readlinkat},
    sys::stat::{FileStat, SFlag, fstatat},
};
use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::OsStringExt,
    },
};
use thiserror::Error;

/// How deep directories may be nested. A path that Linux takes as a whole has 4095 bytes, so it never leads deeper. Whoever
/// makes a store path could nest millions, and the walk takes longer the deeper it is.
const DEPTH_MAX: usize = 2048;

/// Why a store path has no manifest.
#[derive(Debug, Error)]
pub enum IndexError {
    /// A system call failed.
    #[error("Cannot read the metadata of {path}{}", below(.names))]
    Io {
        /// The store path.
        path: StorePath,
        /// The names below it.
        names: Vec<u8>,
        /// Why.
        source: Errno,
    },
    /// It is a device, a FIFO or a socket.
    #[error("{path} is neither a directory nor a regular file nor a symbolic link")]
    Kind {
        /// The store path.
        path: StorePath,
    },
    /// It has more inodes, or more bytes of names, than 32 bits count.
    #[error("{path} has more files, or longer names in all, than an index holds ({})", u32::MAX)]
    TooLarge {
        /// The store path.
        path: StorePath,
    },
    /// Its directories are nested too deeply.
    #[error("{path} has directories that are nested more than {DEPTH_MAX} deep")]
    TooDeep {
        /// The store path.
        path: StorePath,
    },
    /// It is being changed, which a valid store path never is.
    #[error("{path} was changed while it was read")]
    Changed {
        /// The store path.
        path: StorePath,
    },
    /// No source has it.
    #[error("{path} is in none of the store directories")]
    Missing {
        /// The store path.
        path: StorePath,
    },
}

fn below(names: &[u8]) -> String {
    if names.is_empty() { String::new() } else { format!("/{}", String::from_utf8_lossy(names)) }
}

/// What tells whether a store path is still the same: of its own inode, not of those below it. Nix makes no changes inside a
/// path; one that is deleted and made again is another inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `st_ino`
    pub ino: u64,
    /// `st_ctime`, in seconds and nanoseconds.
    pub ctime: (i64, u32),
}

impl Identity {
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            ino: stat.st_ino,
            ctime: (stat.st_ctime, u32::try_from(stat.st_ctime_nsec).unwrap_or_default()),
        }
    }
}

/// The first of the store directories that has `path`, and what the path is there.
pub(super) fn find<D: AsFd>(stores: &[D], path: &StorePath) -> Result<(usize, Identity), IndexError> {
    for (number, store) in stores.iter().enumerate() {
        match stat(store.as_fd(), OsStr::new(path.base_name())) {
            Ok(stat) => return Ok((number, Identity::of(&stat))),
            Err(Errno::ENOENT) => {}
            Err(source) => return Err(IndexError::Io { path: path.clone(), names: Vec::new(), source }),
        }
    }
    Err(IndexError::Missing { path: path.clone() })
}

fn stat(directory: BorrowedFd<'_>, name: &(impl NixPath + ?Sized)) -> nix::Result<FileStat> {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// Reads the metadata of `path` in the store directory `store`.
pub(super) fn build(store: BorrowedFd<'_>, path: &StorePath) -> Result<(Manifest, Identity), IndexError> {
    let io = |names: &[&[u8]]| {
        let names = names.join(&b'/');
        move |source| IndexError::Io { path: path.clone(), names, source }
    };
    let too_large = || IndexError::TooLarge { path: path.clone() };
    let mut builder = Builder::default();
    let base = OsStr::new(path.base_name());
    let before = stat(store, base).map_err(io(&[]))?;
    let mut root = inode(&before).ok_or_else(|| IndexError::Kind { path: path.clone() })?;
    if root.kind() == Kind::Symlink {
        let target = readlinkat(store, base).map_err(io(&[]))?.into_vec();
        builder.add_target(&mut root, &target).ok_or_else(too_large)?;
    }
    builder.parts.inodes.push(root);

    let mut number = 0;
    while let Some(directory) = usize::try_from(number).ok().and_then(|at| builder.parts.inodes.get(at)) {
        if directory.is_directory() {
            let names = builder.parts.sections().records.path(number).unwrap_or_default();
            if names.len() > DEPTH_MAX {
                return Err(IndexError::TooDeep { path: path.clone() });
            }
            let components: Vec<&[u8]> =
                std::iter::once(path.base_name().as_bytes()).chain(names.iter().copied()).collect();
            let found = list(store, &components).map_err(io(&names))?;
            builder.add_children(number, found).ok_or_else(too_large)?;
        }
        number = number.checked_add(1).ok_or_else(too_large)?;
    }
    let identity = Identity::of(&before);
    if Identity::of(&stat(store, base).map_err(io(&[]))?) != identity {
        return Err(IndexError::Changed { path: path.clone() });
    }
    Ok((builder.parts.finish().ok_or_else(too_large)?, identity))
}

#[derive(Default)]
struct Builder {
    parts: Parts,
    /// The numbers of files with more than one name, by device and inode on the host.
    linked: HashMap<(u64, u64), u32>,
}

impl Builder {
    /// `None` if 32 bits do not hold it.
    fn add_children(&mut self, directory: u32, found: Vec<Found>) -> Option<()> {
        let first = u32::try_from(self.parts.inodes.len()).ok()?;
        let count = u32::try_from(found.len()).ok()?;
        let mut number = first;
        let mut subdirectories: u32 = 0;
        for Found { name, mut inode, target, linked } in found {
            if let Some(one) =
                linked.map(|key| *self.linked.entry(key).or_insert(number)).filter(|&one| one != number)
            {
                let one_inode = self.parts.inodes.get_mut(usize::try_from(one).ok()?)?;
                one_inode.links = one_inode.links.checked_add(1)?;
                inode = Inode::new(Kind::Alias, 0);
                inode.first = one;
            }
            inode.parent = directory;
            inode.name = u32::try_from(self.parts.names.len()).ok()?;
            inode.name_len = u8::try_from(name.as_bytes().len()).ok()?;
            self.parts.names.extend_from_slice(name.as_bytes());
            if inode.kind() == Kind::Symlink {
                self.add_target(&mut inode, &target)?;
            }
            subdirectories = subdirectories.checked_add(u32::from(inode.is_directory()))?;
            self.parts.inodes.push(inode);
            number = number.checked_add(1)?;
        }
        let directory = self.parts.inodes.get_mut(usize::try_from(directory).ok()?)?;
        directory.first = first;
        directory.count = count;
        directory.links = directory.links.checked_add(subdirectories)?;
        Some(())
    }

    fn add_target(&mut self, link: &mut Inode, target: &[u8]) -> Option<()> {
        link.first = u32::try_from(self.parts.targets.len()).ok()?;
        link.size = u64::try_from(target.len()).ok()?;
        self.parts.targets.extend_from_slice(target);
        Some(())
    }
}

struct Found {
    name: CString,
    inode: Inode,
    target: Vec<u8>,
    /// Device and inode on the host, of what is no directory and has several names.
    linked: Option<(u64, u64)>,
}

/// What a directory holds and the index takes, sorted by name.
fn list(store: BorrowedFd<'_>, components: &[&[u8]]) -> nix::Result<Vec<Found>> {
    let fd = beneath::open(store, components, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let mut dir = Dir::from_fd(fd)?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort();
    let mut found = Vec::new();
    for name in names {
        let stat = stat(dir.as_fd(), name.as_c_str())?;
        let Some(inode) = inode(&stat) else { continue };
        let target = match inode.kind() {
            Kind::Symlink => readlinkat(dir.as_fd(), name.as_c_str())?.into_vec(),
            _ => Vec::new(),
        };
        let linked = (!inode.is_directory() && stat.st_nlink > 1).then_some((stat.st_dev, stat.st_ino));
        found.push(Found { name, inode, target, linked });
    }
    Ok(found)
}

/// `None` for what is not served.
fn inode(stat: &FileStat) -> Option<Inode> {
    let size = u64::try_from(stat.st_size).ok()?;
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => Some(Inode::new(Kind::Directory, 0)),
        SFlag::S_IFREG => Some(Inode::new(Kind::File { executable: stat.st_mode & 0o100 != 0 }, size)),
        SFlag::S_IFLNK => Some(Inode::new(Kind::Symlink, size)),
        _ => None,
    }
}
