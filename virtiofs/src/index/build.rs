//! Reading the metadata of a store path. Nothing is followed: each directory is opened from its parent, links are read, not walked.

use super::{Inode, Kind, Manifest};
use crate::store::{Source, path::StorePath};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstatat},
};
use std::{
    ffi::{CString, OsStr},
    ops::Range,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

/// Why a store path's metadata could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No source has it.
    #[error("{0} is in no source")]
    Absent(StorePath),
    /// A part of it cannot be read.
    #[error("Cannot read {0}")]
    Io(PathBuf, #[source] Errno),
    /// It has more files or names than a manifest can number.
    #[error("{0} has more than 2^32 files or bytes of names")]
    TooLarge(StorePath),
    /// It is a device, a FIFO or a socket.
    #[error("{0} is neither a file, a directory nor a symbolic link")]
    Kind(PathBuf),
}

const OPEN: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Reads the metadata of `path` from the first source that has it.
pub(super) fn manifest(sources: &[Source], path: &StorePath) -> Result<Manifest, BuildError> {
    for (number, source) in sources.iter().enumerate() {
        let store = match Dir::open(&source.store, OPEN.difference(OFlag::O_NOFOLLOW), Mode::empty()) {
            Ok(store) => store,
            Err(error) => return Err(BuildError::Io(source.store.clone(), error)),
        };
        let file = source.store.join(path.name());
        match fstatat(store.as_fd(), path.name(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(BuildError::Io(file, error)),
            Ok(stat) => {
                let mut builder =
                    Builder { path, manifest: Manifest { source: number, ..Manifest::default() } };
                let name = path.name().as_bytes();
                let Some(kind) = kind(&stat) else { return Err(BuildError::Kind(file)) };
                builder.add(&store, &file, 0, name, kind, &stat)?;
                builder.fill(&source.store)?;
                return Ok(builder.manifest);
            }
        }
    }
    Err(BuildError::Absent(path.clone()))
}

struct Builder<'a> {
    path: &'a StorePath,
    manifest: Manifest,
}

impl Builder<'_> {
    fn number(&self, length: usize) -> Result<u32, BuildError> {
        u32::try_from(length).map_err(|_| BuildError::TooLarge(self.path.clone()))
    }

    fn text(&mut self, bytes: &[u8]) -> Result<Range<u32>, BuildError> {
        let start = self.number(self.manifest.text.len())?;
        self.manifest.text.extend_from_slice(bytes);
        Ok(start..self.number(self.manifest.text.len())?)
    }

    /// Adds one inode; a directory's children come later.
    fn add(
        &mut self,
        directory: &Dir,
        file: &std::path::Path,
        parent: u32,
        name: &[u8],
        kind: Kind,
        stat: &FileStat,
    ) -> Result<(), BuildError> {
        let range = if kind == Kind::Symlink {
            let target = readlinkat(directory.as_fd(), OsStr::from_bytes(name))
                .map_err(|error| BuildError::Io(file.into(), error))?;
            self.text(target.as_bytes())?
        } else {
            0..0
        };
        let size = match kind {
            Kind::Symlink => u64::from(range.end.saturating_sub(range.start)),
            Kind::Directory => 0,
            Kind::File { .. } => u64::try_from(stat.st_size).unwrap_or(0),
        };
        let name = self.text(name)?;
        self.manifest.inodes.push(Inode { kind, size, parent, name, range });
        Ok(())
    }

    /// Reads the directories in the order of their numbers, which makes the numbering breadth first.
    fn fill(&mut self, store: &std::path::Path) -> Result<(), BuildError> {
        let mut at = 0;
        while let Some(inode) = self.manifest.inodes.get(at) {
            if inode.kind == Kind::Directory {
                let place = self.place(at);
                let children = self.read_directory(store, &place, at)?;
                if let Some(inode) = self.manifest.inodes.get_mut(at) {
                    inode.size = u64::from(children.end.saturating_sub(children.start));
                    inode.range = children;
                }
            }
            at = at.saturating_add(1);
        }
        Ok(())
    }

    /// The path of an inode below the store directory.
    fn place(&self, at: usize) -> PathBuf {
        let mut names = Vec::new();
        let mut number = at;
        while let Some(inode) = self.manifest.inodes.get(number) {
            names.push(OsStr::from_bytes(self.manifest.slice(&inode.name)).to_owned());
            if number == 0 {
                break;
            }
            number = usize::try_from(inode.parent).unwrap_or(0);
        }
        names.into_iter().rev().collect()
    }

    fn read_directory(
        &mut self,
        store: &std::path::Path,
        place: &std::path::Path,
        parent: usize,
    ) -> Result<Range<u32>, BuildError> {
        let path = store.join(place);
        let failed = |error| BuildError::Io(path.clone(), error);
        let mut directory = open_below(store, place).map_err(failed)?;
        let mut names = directory
            .iter()
            .map(|entry| entry.map(|entry| entry.file_name().to_owned()))
            .collect::<Result<Vec<CString>, _>>()
            .map_err(failed)?;
        names.retain(|name| !matches!(name.to_bytes(), b"." | b".."));
        names.sort_by(|a, b| a.to_bytes().cmp(b.to_bytes()));
        let start = self.number(self.manifest.inodes.len())?;
        let parent = self.number(parent)?;
        for name in names {
            let file = path.join(OsStr::from_bytes(name.to_bytes()));
            let stat = fstatat(directory.as_fd(), name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|error| BuildError::Io(file.clone(), error))?;
            // What is nothing that Nix could have put there is not shown.
            if let Some(kind) = kind(&stat) {
                self.add(&directory, &file, parent, name.to_bytes(), kind, &stat)?;
            }
        }
        Ok(start..self.number(self.manifest.inodes.len())?)
    }
}

/// Opens a directory below the store without following any link on the way.
fn open_below(store: &std::path::Path, place: &std::path::Path) -> nix::Result<Dir> {
    use nix::fcntl::{OpenHow, ResolveFlag, openat2};
    let store = Dir::open(store, OPEN.difference(OFlag::O_NOFOLLOW), Mode::empty())?;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let fd = openat2(store.as_fd(), place, OpenHow::new().flags(OPEN).resolve(resolve))?;
    Dir::from_fd(fd)
}

fn kind(stat: &FileStat) -> Option<Kind> {
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => Some(Kind::File { executable: stat.st_mode & 0o100 != 0 }),
        SFlag::S_IFDIR => Some(Kind::Directory),
        SFlag::S_IFLNK => Some(Kind::Symlink),
        _ => None,
    }
}
