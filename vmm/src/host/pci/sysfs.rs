//! Reads `/sys`, `/proc` and what else the kernel and udev tell, below a root that tests choose. Nothing is trusted: each read is bounded,
//! what is no file is not read, and a link is only looked at, never written through.

use nix::fcntl::OFlag;
use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The longest attribute that is read, in bytes: the kernel gives at most a page.
const ATTRIBUTE_MAX: u64 = 4096;

/// The longest table of `/proc` that is read, in bytes: some 100,000 mounts.
const TABLE_MAX: u64 = 16 << 20;

/// The most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 65_536;

/// The longest path, from the root, that a link may lead to.
const PATH_MAX: usize = 4096;

/// A view of the kernel's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// This host's.
    pub fn of_this_host() -> Self {
        Self::at(Path::new("/"))
    }

    /// A tree that a test has made.
    pub fn at(root: &Path) -> Self {
        Self { root: root.canonicalize().unwrap_or_else(|_| root.into()) }
    }

    /// Where a file of the kernel's is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// An attribute's text, without the end of its line.
    pub(super) fn attribute(&self, path: &str) -> io::Result<String> {
        let text = read(&self.path(path), ATTRIBUTE_MAX)?;
        Ok(text.trim_end_matches(['\n', '\0']).into())
    }

    /// What a device's own configuration space begins with: its vendor and, above, its number; all ones where it does not answer. None if
    /// there is no such file.
    pub fn numbers(&self, device: super::Address) -> io::Result<Option<u32>> {
        let path = self.path(&format!("/sys/bus/pci/devices/{device}/config"));
        let mut file = match OpenOptions::new().read(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = [0; 4];
        file.read_exact(&mut bytes)?;
        Ok(Some(u32::from_le_bytes(bytes)))
    }

    /// A table's text. One that is longer than it may be is an error: what is missing would be taken for what is not there.
    pub(super) fn table(&self, path: &str) -> io::Result<String> {
        let text = read(&self.path(path), TABLE_MAX)?;
        if u64::try_from(text.len()).is_ok_and(|length| length >= TABLE_MAX) {
            return Err(io::Error::other(format!("it has more than {TABLE_MAX} bytes")));
        }
        Ok(text)
    }

    /// Whether there is something.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    /// The last name of what a link leads to, such as the driver's of `driver`.
    pub(super) fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_str()?.into())
    }

    /// Where a link leads in the end, from the root.
    pub(super) fn real(&self, path: &str) -> Option<String> {
        let real = self.path(path).canonicalize().ok()?;
        let inside = real.strip_prefix(&self.root).ok()?.to_str()?;
        (inside.len() < PATH_MAX).then(|| format!("/{inside}"))
    }

    /// The names in a directory, in order; none of one that is missing.
    pub(super) fn names(&self, path: &str) -> io::Result<BTreeSet<String>> {
        let entries = match fs::read_dir(self.path(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries?,
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            if names.len() >= ENTRIES_MAX {
                return Err(io::Error::other(format!("it has more than {ENTRIES_MAX} entries")));
            }
            names.extend(entry?.file_name().to_str().map(str::to_owned));
        }
        Ok(names)
    }
}

fn read(path: &Path, limit: u64) -> io::Result<String> {
    // A pipe must not be waited for, and a read of a device may never end, or do something.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{sys::stat::Mode, unistd::mkfifo};
    use std::{fs::File, os::unix::fs::symlink};

    #[test]
    fn what_is_read_is_bounded_and_inside() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::write(path("short"), "0x10de\n").unwrap();
        fs::write(path("long"), "x".repeat(5000)).unwrap();
        fs::write(path("wild"), [0xff, b'a', b'\n']).unwrap();
        fs::create_dir(path("directory")).unwrap();
        symlink("directory", path("link")).unwrap();
        symlink("/etc", path("outside")).unwrap();
        symlink("loop", path("loop")).unwrap();
        let sysfs = Sysfs::at(root.path());
        assert_eq!(sysfs.attribute("short").unwrap(), "0x10de");
        assert_eq!(sysfs.attribute("/long").unwrap().len(), 4096);
        assert_eq!(sysfs.attribute("wild").unwrap(), "\u{fffd}a");
        assert!(sysfs.attribute("directory").is_err() && sysfs.attribute("missing").is_err());
        assert_eq!(sysfs.link("link").as_deref(), Some("directory"));
        assert_eq!(sysfs.real("/link").as_deref(), Some("/directory"));
        assert_eq!(sysfs.real("outside"), None);
        assert_eq!(sysfs.real("loop"), None);
        assert_eq!(sysfs.link("short"), None);
        assert!(sysfs.names("missing").unwrap().is_empty() && sysfs.names("short").is_err());
        assert_eq!(sysfs.names("/").unwrap().len(), 7);
    }

    #[test]
    fn a_table_that_is_too_long_is_an_error_and_a_pipe_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let file = File::create(root.path().join("table")).unwrap();
        file.set_len(TABLE_MAX).unwrap();
        let sysfs = Sysfs::at(root.path());
        assert!(sysfs.table("table").unwrap_err().to_string().contains("more than"));
        file.set_len(10).unwrap();
        assert_eq!(sysfs.table("table").unwrap().len(), 10);
        symlink("/dev/zero", root.path().join("zero")).unwrap();
        assert!(sysfs.attribute("zero").is_err());
        mkfifo(&root.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert!(sysfs.attribute("pipe").is_err());
    }
}
