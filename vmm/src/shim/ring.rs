//! A log in two files of a bounded size: the one being written, and the one before it with `.1` appended.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    time::{Duration, Instant},
};

/// The rights of the files: their group may read them.
const MODE: u32 = 0o640;

/// How long to leave a disk alone after an error.
const PAUSE: Duration = Duration::from_secs(1);

/// The log. It is for a thread of its own: a disk may hang.
pub(super) struct Ring {
    path: PathBuf,
    limit: u64,
    file: Option<(File, u64)>,
    failed: Option<Instant>,
}

impl Ring {
    /// A log at `path`, of at most `limit` bytes in each file.
    pub(super) fn new(path: PathBuf, limit: u64) -> Self {
        Self { path, limit: limit.max(1), file: None, failed: None }
    }

    /// Appends bytes. After an error they are dropped until the disk has had a pause; the first error of a row is
    /// returned, so that it is told once.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Ok(());
        }
        match self.try_append(bytes) {
            Ok(()) => {
                self.failed = None;
                Ok(())
            }
            Err(error) => {
                self.file = None;
                let known = self.failed.replace(Instant::now()).is_some();
                if known { Ok(()) } else { Err(error) }
            }
        }
    }

    fn try_append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (file, size) = match self.file.take() {
                Some(open) => open,
                None => self.open()?,
            };
            let room = usize::try_from(self.limit.saturating_sub(size)).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if now.is_empty() {
                drop(file);
                fs::rename(&self.path, self.before())?;
                continue;
            }
            (&file).write_all(now)?;
            self.file = Some((file, size.saturating_add(u64::try_from(now.len()).unwrap_or(u64::MAX))));
            bytes = later;
        }
        Ok(())
    }

    fn open(&self) -> io::Result<(File, u64)> {
        let file = OpenOptions::new().append(true).create(true).mode(MODE).open(&self.path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn before(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".1");
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hv6_the_two_files_hold_the_newest_bytes_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut ring = Ring::new(path.clone(), 10);
        ring.append(b"0123456789").unwrap();
        ring.append(b"abcdefghijklmnopqrstuvw").unwrap();
        assert_eq!(fs::read(ring.before()).unwrap(), b"klmnopqrst".as_slice());
        assert_eq!(fs::read(&path).unwrap(), b"uvw".as_slice());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        // Another process goes on where this one stopped.
        Ring::new(path.clone(), 10).append(b"12345678").unwrap();
        assert_eq!(fs::read(ring.before()).unwrap(), b"uvw1234567".as_slice());
        assert_eq!(fs::read(&path).unwrap(), b"8".as_slice());
    }

    #[test]
    fn an_error_is_told_once_and_the_disk_gets_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing").join("console");
        let mut ring = Ring::new(path.clone(), 100);
        assert!(ring.append(b"lost").is_err());
        fs::create_dir(path.parent().unwrap()).unwrap();
        ring.append(b"lost too").unwrap();
        assert!(!path.exists());
        ring.failed = Some(Instant::now() - PAUSE);
        ring.append(b"kept").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
    }
}
