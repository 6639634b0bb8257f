//! The files of a cgroup: read whole and bounded, written in one piece, read back.

use super::{CgroupError, parse};
use nix::errno::Errno;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
};

/// Whether an error says that the cgroup is not there: ENODEV comes from a file that was open as it was removed.
pub(super) fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENODEV | Errno::ENOTDIR))
}

/// Reads a file, [`parse::LENGTH_MAX`] bytes at most.
pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    let failed = |error| CgroupError::Read(path.into(), error);
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(parse::LENGTH_MAX).read_to_end(&mut bytes).map_err(failed)?;
    String::from_utf8(bytes).map_err(|_| failed(io::ErrorKind::InvalidData.into()))
}

/// Reads a file and makes sense of it.
pub(super) fn parsed<T>(
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, parse::ParseError>,
) -> Result<T, CgroupError> {
    parse(&read(path)?).map_err(|error| CgroupError::Damaged(path.into(), error))
}

/// Writes a value in one piece, as the kernel wants it, in place of what was there. Makes no file.
pub(super) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let failed = |source| CgroupError::Write { path: path.into(), value: value.into(), source };
    let mut file = OpenOptions::new().write(true).truncate(true).open(path).map_err(failed)?;
    file.write_all(value.as_bytes()).map_err(failed)
}

/// Writes a value and makes sure that it is what the file then holds.
pub(super) fn set(path: &Path, value: &str) -> Result<(), CgroupError> {
    write(path, value)?;
    let found = read(path)?;
    let found = found.trim_end();
    if found == value {
        return Ok(());
    }
    let found = found.chars().take(200).collect();
    Err(CgroupError::Altered { path: path.into(), value: value.into(), found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn cg9_what_is_not_taken_as_it_was_written_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("memory.max"), "").unwrap();
        set(&at("memory.max"), "4096").unwrap();
        // Takes anything and keeps nothing; refuses everything; is not there, and must not be made.
        std::os::unix::fs::symlink("/dev/null", at("rounds")).unwrap();
        std::os::unix::fs::symlink("/dev/full", at("refuses")).unwrap();
        let told = |name: &str| {
            let error = set(&at(name), "12345").unwrap_err();
            crate::error::chain(&error).replace(&directory.path().display().to_string(), "DIR")
        };
        insta::assert_snapshot!([told("rounds"), told("refuses"), told("absent")].join("\n"));
        assert!(!at("absent").exists());
    }

    #[test]
    fn a_file_without_end_is_read_in_part_only() {
        let text = read(Path::new("/dev/zero")).unwrap();
        assert_eq!(text.len() as u64, parse::LENGTH_MAX);
    }
}
