//! Opening what lies below a directory, and nothing else: no symbolic link is followed and no `..` leads out.

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstat},
};
use std::{
    ffi::OsStr,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

/// The kernel takes paths of up to 4095 bytes, so deeper ones are walked in pieces of about this size.
const PIECE: usize = 3072;

/// RESOLVE_CACHED of openat2(2), since Linux 5.12: EAGAIN instead of waiting for a directory to be read.
const CACHED: ResolveFlag = ResolveFlag::from_bits_retain(0x20);

/// Opens the file or directory with these components below `dir`. No components: `dir` itself, again.
pub(crate) fn open(dir: BorrowedFd<'_>, components: &[&[u8]], flags: OFlag) -> nix::Result<OwnedFd> {
    walk(dir, components, flags, ResolveFlag::empty())
}

/// Opens a regular file for reading. What else may lie there by now is not opened for good: a FIFO does not block.
/// With `cached`, EAGAIN if what leads to it is not in memory, or if that cannot be told.
pub(crate) fn open_file(dir: BorrowedFd<'_>, components: &[&[u8]], cached: bool) -> nix::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = if cached {
        walk(dir, components, flags, CACHED).map_err(|errno| match errno {
            // An older kernel.
            Errno::EINVAL => Errno::EAGAIN,
            errno => errno,
        })?
    } else {
        walk(dir, components, flags, ResolveFlag::empty())?
    };
    let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFREG { Ok(File::from(fd)) } else { Err(Errno::EIO) }
}

fn walk(dir: BorrowedFd<'_>, components: &[&[u8]], flags: OFlag, how: ResolveFlag) -> nix::Result<OwnedFd> {
    let mut held: Option<OwnedFd> = None;
    let mut piece: Vec<u8> = Vec::new();
    for component in components {
        if piece.len() > PIECE {
            let from = held.as_ref().map_or(dir, AsFd::as_fd);
            held = Some(open_piece(from, &piece, OFlag::O_PATH | OFlag::O_DIRECTORY, how)?);
            piece.clear();
        }
        if !piece.is_empty() {
            piece.push(b'/');
        }
        piece.extend_from_slice(component);
    }
    if piece.is_empty() {
        piece.push(b'.');
    }
    open_piece(held.as_ref().map_or(dir, AsFd::as_fd), &piece, flags, how)
}

fn open_piece(dir: BorrowedFd<'_>, path: &[u8], flags: OFlag, how: ResolveFlag) -> nix::Result<OwnedFd> {
    let beneath =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat2(dir, OsStr::from_bytes(path), OpenHow::new().flags(flags).resolve(beneath | how))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Read, os::unix::fs::symlink};

    fn read(dir: &OwnedFd, components: &[&str]) -> nix::Result<String> {
        let components: Vec<&[u8]> = components.iter().map(|c| c.as_bytes()).collect();
        let mut text = String::new();
        open_file(dir.as_fd(), &components, false)?.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    #[test]
    fn fu6_nothing_outside_is_opened() {
        let temp = tempfile::tempdir().unwrap();
        let inside = temp.path().join("inside");
        fs::create_dir_all(inside.join("d")).unwrap();
        fs::write(temp.path().join("secret"), "secret").unwrap();
        fs::write(inside.join("d/file"), "text").unwrap();
        symlink("../secret", inside.join("link")).unwrap();
        symlink("d", inside.join("dirlink")).unwrap();
        symlink("/proc/self/fd/0", inside.join("magic")).unwrap();
        nix::unistd::mkfifo(&inside.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let dir = OwnedFd::from(File::open(&inside).unwrap());
        assert_eq!(read(&dir, &["d", "file"]).unwrap(), "text");
        assert_eq!(read(&dir, &["link"]), Err(Errno::ELOOP));
        assert_eq!(read(&dir, &["magic"]), Err(Errno::ELOOP));
        assert_eq!(read(&dir, &["dirlink", "file"]), Err(Errno::ELOOP));
        assert_eq!(read(&dir, &["..", "secret"]), Err(Errno::EXDEV));
        assert_eq!(read(&dir, &["/etc/passwd"]), Err(Errno::EXDEV));
        assert_eq!(read(&dir, &["fifo"]), Err(Errno::EIO));
        assert_eq!(read(&dir, &["d"]), Err(Errno::EIO));
    }

    #[test]
    fn paths_longer_than_the_kernel_takes() {
        let temp = tempfile::tempdir().unwrap();
        let dir = OwnedFd::from(File::open(temp.path()).unwrap());
        let name = "n".repeat(200);
        let mut components: Vec<&[u8]> = Vec::new();
        for _ in 0..40 {
            let parent = open(dir.as_fd(), &components, OFlag::O_RDONLY).unwrap();
            nix::sys::stat::mkdirat(&parent, name.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
            components.push(name.as_bytes());
        }
        assert!(open(dir.as_fd(), &components, OFlag::O_RDONLY | OFlag::O_DIRECTORY).is_ok());
    }
}
