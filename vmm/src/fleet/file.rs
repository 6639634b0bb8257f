//! Reading a fleet file, which gives its writers power over the host.

use nix::{
    fcntl::OFlag,
    sys::stat::{FileStat, SFlag, fstat},
    unistd::{Gid, Uid, getegid, geteuid},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// The longest fleet file, in bytes. Some two thousand VMs fit, and it bounds what reading one may cost. `laird`'s API takes
/// no longer ones either.
pub const LIMIT: u64 = 1 << 20;

/// Why a fleet file is not read, said after the name of the file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such file, or no right to read it.
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    /// Its content cannot be read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It is not a regular file.
    #[error("is {0}; it must be a regular file")]
    Kind(&'static str),
    /// It is too long.
    #[error("has more than {LIMIT} bytes, the most that a fleet file may have")]
    TooLong,
    /// Somebody may write to it who may not rule this host.
    #[error(
        "may be changed by {who} (mode {mode:04o}, owner {uid}, group {gid}), who could then use the rights of laird; \
         {fix}"
    )]
    Unsafe {
        /// Who.
        who: &'static str,
        /// The permission bits.
        mode: u32,
        /// The owner.
        uid: u32,
        /// The group.
        gid: u32,
        /// What to do.
        fix: &'static str,
    },
}

/// Reads a fleet file of this user or of root.
///
/// Symbolic links are followed: on NixOS the file is one, into the store. What is checked is the file that was opened.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let file = OpenOptions::new()
        .read(true)
        // A FIFO without a writer must not block, nor a terminal become ours.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(FileError::Open)?;
    let stat = fstat(&file).map_err(|errno| FileError::Open(errno.into()))?;
    let kind = kind(stat.st_mode);
    if kind != REGULAR {
        return Err(FileError::Kind(kind));
    }
    check_writers(&stat, geteuid(), getegid())?;
    content(file)
}

fn content(file: File) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    // One more than allowed, so that a file that grows meanwhile is seen as well.
    file.take(LIMIT + 1).read_to_end(&mut bytes).map_err(FileError::Read)?;
    if bytes.len() as u64 > LIMIT { Err(FileError::TooLong) } else { Ok(bytes) }
}

pub(super) const REGULAR: &str = "a regular file";
pub(super) const DIRECTORY: &str = "a directory";

/// What a mode says a file is.
pub(super) fn kind(mode: u32) -> &'static str {
    match SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => REGULAR,
        SFlag::S_IFDIR => DIRECTORY,
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFCHR | SFlag::S_IFBLK => "a device",
        _ => "no file",
    }
}

/// The owner must be root or this user; nobody else may write, but this user's own group and root's.
fn check_writers(stat: &FileStat, user: Uid, group: Gid) -> Result<(), FileError> {
    let refuse = |who, fix| {
        let mode = stat.st_mode & 0o7777;
        Err(FileError::Unsafe { who, mode, uid: stat.st_uid, gid: stat.st_gid, fix })
    };
    if stat.st_uid != 0 && stat.st_uid != user.as_raw() {
        return refuse("another user", "chown it to root, or to who runs laird");
    }
    if stat.st_mode & 0o002 != 0 {
        return refuse("everybody", "chmod o-w it");
    }
    if stat.st_mode & 0o020 != 0 && stat.st_gid != 0 && stat.st_gid != group.as_raw() {
        return refuse("a group", "chmod g-w it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

    fn read_text(path: &Path) -> String {
        match read(path) {
            Ok(bytes) => format!("read {} bytes", bytes.len()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn cf6_a_fleet_file_is_a_regular_file() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        fs::create_dir(at("directory")).unwrap();
        fs::write(at("file"), "schema = 1").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        std::os::unix::fs::symlink("nothing", at("dangling")).unwrap();
        let began = Instant::now();
        assert_eq!(read_text(&at("fifo")), "is a FIFO; it must be a regular file");
        assert_eq!(read_text(&at("directory")), "is a directory; it must be a regular file");
        assert_eq!(read_text(Path::new("/dev/zero")), "is a device; it must be a regular file");
        assert_eq!(read_text(&at("file")), "read 10 bytes");
        assert_eq!(read_text(&at("link")), "read 10 bytes");
        for name in ["loop", "dangling", "absent"] {
            let text = read_text(&at(name));
            assert!(text.starts_with("cannot be opened: "), "{name}: {text}");
        }
        assert!(began.elapsed().as_secs() < 5, "something blocked");
    }

    #[test]
    fn cf7_a_huge_file_is_refused_unread() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fleet.json");
        // Sparse: it takes no room, and reading all of it would take long.
        File::create(&path).unwrap().set_len(1 << 30).unwrap();
        let began = Instant::now();
        assert_eq!(read_text(&path), "has more than 1048576 bytes, the most that a fleet file may have");
        assert!(began.elapsed().as_secs() < 5);
        File::create(&path).unwrap().set_len(LIMIT).unwrap();
        assert_eq!(read_text(&path), "read 1048576 bytes");
    }

    #[test]
    fn cf8_a_file_that_others_may_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fleet.toml");
        fs::write(&path, "schema = 1").unwrap();
        for (mode, allowed) in [(0o600, true), (0o644, true), (0o666, false), (0o602, false), (0o4644, true)]
        {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_ok(), allowed, "{mode:o}: {}", read_text(&path));
        }
    }

    #[test]
    fn cf8_the_owner_is_root_or_who_runs_laird() {
        let stat = |uid, gid, mode| {
            let mut stat = fstat(File::open("/dev/null").unwrap()).unwrap();
            (stat.st_uid, stat.st_gid, stat.st_mode) = (uid, gid, SFlag::S_IFREG.bits() | mode);
            stat
        };
        let check =
            |uid, gid, mode| check_writers(&stat(uid, gid, mode), Uid::from_raw(1000), Gid::from_raw(100));
        for (uid, gid, mode) in
            [(0, 0, 0o644), (1000, 100, 0o600), (1000, 100, 0o664), (0, 0, 0o664), (1000, 7, 0o644)]
        {
            assert!(check(uid, gid, mode).is_ok(), "{uid} {gid} {mode:o}");
        }
        insta::assert_snapshot!(check(1001, 100, 0o400).unwrap_err(), @"may be changed by another user (mode 0400, owner 1001, group 100), who could then use the rights of laird; chown it to root, or to who runs laird");
        insta::assert_snapshot!(check(1000, 100, 0o646).unwrap_err(), @"may be changed by everybody (mode 0646, owner 1000, group 100), who could then use the rights of laird; chmod o-w it");
        insta::assert_snapshot!(check(1000, 7, 0o664).unwrap_err(), @"may be changed by a group (mode 0664, owner 1000, group 7), who could then use the rights of laird; chmod g-w it");
    }
}
