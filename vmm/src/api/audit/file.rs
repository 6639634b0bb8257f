//! The file: whole lines, synced, in two files of a bounded size: the one being written, and the one before it with `.1` appended.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The rights of the files: their group may read them.
const MODE: u32 = 0o640;

/// The log on disk. It is for a thread of its own: a disk may hang.
pub(super) struct LogFile {
    path: PathBuf,
    limit: u64,
    file: Option<(File, u64)>,
    /// Whether the last write may have left a part of a line.
    torn: bool,
    failing: u64,
    unwritten: Arc<AtomicU64>,
}

impl LogFile {
    /// A log at `path`, rotated at `limit` bytes; `unwritten` counts the lines that could not be written.
    pub(super) fn new(path: PathBuf, limit: u64, unwritten: Arc<AtomicU64>) -> Self {
        // What was there before may end anywhere, if that `laird` was killed.
        Self { path, limit, file: None, torn: true, failing: 0, unwritten }
    }

    /// Appends one line. A failure is reported once, until a line is written again.
    pub(super) fn append(&mut self, line: &[u8]) {
        match self.try_append(line) {
            Ok(()) => {
                if self.failing > 0 {
                    let (path, lost) = (self.path.display(), self.failing);
                    tracing::warn!(%path, lost, "the audit log works again");
                    self.failing = 0;
                }
            }
            Err(error) => {
                if self.failing == 0 {
                    tracing::error!(path = %self.path.display(), %error, "cannot write the audit log");
                }
                self.failing = self.failing.saturating_add(1);
                self.unwritten.fetch_add(1, Relaxed);
                (self.file, self.torn) = (None, true);
            }
        }
    }

    fn try_append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        let (mut file, mut size) = match self.file.take() {
            Some(open) => open,
            None => self.open()?,
        };
        if size > 0 && size.saturating_add(length) > self.limit {
            fs::rename(&self.path, super::read::before(&self.path))?;
            (file, size) = self.open()?;
        }
        if self.torn && size > 0 {
            file.write_all(b"\n")?;
            size = size.saturating_add(1);
        }
        self.torn = false;
        file.write_all(line)?;
        file.sync_data()?;
        self.file = Some((file, size.saturating_add(length)));
        Ok(())
    }

    fn open(&self) -> io::Result<(File, u64)> {
        let file = OpenOptions::new().append(true).create(true).mode(MODE).open(&self.path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_whole_and_the_files_small() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let mut log = LogFile::new(path.clone(), 10, Arc::default());
        for line in [&b"one\n"[..], b"two\n", b"three\n", b"four\n", b"a line above the limit\n", b"six\n"] {
            log.append(line);
        }
        assert_eq!(fs::read(&path).unwrap(), b"six\n");
        assert_eq!(fs::read(super::super::read::before(&path)).unwrap(), b"a line above the limit\n");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        // Cut off in the midst of a line, by a kill: the next record is a line of its own.
        fs::write(&path, "{\"ti").unwrap();
        LogFile::new(path.clone(), 100, Arc::default()).append(b"seven\n");
        assert_eq!(fs::read(&path).unwrap(), b"{\"ti\nseven\n");
    }

    #[test]
    fn sv5_a_full_disk_stops_nothing_and_loses_only_what_came_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let unwritten = Arc::new(AtomicU64::new(0));
        let mut log = LogFile::new(path.clone(), 100, Arc::clone(&unwritten));
        log.append(b"lost\n");
        log.append(b"lost too\n");
        assert_eq!((log.failing, unwritten.load(Relaxed)), (2, 2));
        fs::remove_file(&path).unwrap();
        log.append(b"kept\n");
        assert_eq!((log.failing, unwritten.load(Relaxed)), (0, 2));
        assert_eq!(fs::read(&path).unwrap(), b"kept\n");
    }
}
