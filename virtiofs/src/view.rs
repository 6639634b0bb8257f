//! Views: the store paths that one VM may see, as a file of logical paths, one a line.
//!
//! A missing, empty or damaged file is an error. It never means "everything".

use crate::store::{STORE_DIR, StorePath, StorePathError};
use foldhash::fast::RandomState;
use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::fsync,
};
use sha2::{Digest, Sha256};
use std::{
    collections::HashSet,
    fs::File,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// The largest view file that is read, in bytes: about 300,000 store paths.
pub const FILE_MAX: u64 = 32 << 20;

/// How many bytes a line has, or a few more: for how many paths room is made.
const LINE_TYPICAL: usize = 48;

/// A view: at least one store path, none twice. The order is that of the file, and that of the guest's root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    paths: Vec<StorePath>,
}

/// Why there is no view.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The file could not be read or written.
    #[error("Cannot {verb} the view file {path}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("The view file {path} is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The file is too large.
    #[error("The view file {path} has more than {FILE_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is wrong.
    #[error("Cannot use the view file {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ParseError,
    },
}

/// Why a text is not a view.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// There is no store path.
    #[error("It lists no store paths; a VM that may see nothing cannot run")]
    Empty,
    /// Not UTF-8.
    #[error("Line {0} is not UTF-8")]
    Encoding(usize),
    /// The last line was cut off.
    #[error("Line {0}, the last one, does not end with a newline; the file may be cut short")]
    Unterminated(usize),
    /// A line is no store path.
    #[error("Line {0} is no store path")]
    Line(usize, #[source] StorePathError),
    /// A line repeats an earlier one.
    #[error("Line {0} lists {1} a second time")]
    Twice(usize, StorePath),
}

impl View {
    /// A view of `paths`, sorted; repeated ones count once.
    pub fn new(paths: impl IntoIterator<Item = StorePath>) -> Result<Self, ParseError> {
        let mut paths: Vec<_> = paths.into_iter().collect();
        paths.sort();
        paths.dedup();
        if paths.is_empty() {
            return Err(ParseError::Empty);
        }
        Ok(Self { paths })
    }

    /// Parses the text of a view file.
    pub fn parse(text: &[u8]) -> Result<Self, ParseError> {
        let mut paths: Vec<StorePath> = Vec::with_capacity(text.len().checked_div(LINE_TYPICAL).unwrap_or(0));
        for (index, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let number = index + 1;
            let line = line.strip_suffix(b"\n").ok_or(ParseError::Unterminated(number))?;
            let line = str::from_utf8(line).map_err(|_| ParseError::Encoding(number))?;
            let path = StorePath::parse(line).map_err(|e| ParseError::Line(number, e))?;
            paths.push(path);
        }
        if paths.is_empty() {
            return Err(ParseError::Empty);
        }
        // What Lair writes mostly is sorted, and then needs no table.
        if !paths.is_sorted_by(|one, next| one < next) {
            let mut seen = HashSet::<_, RandomState>::default();
            if let Some(index) = paths.iter().position(|path| !seen.insert(path)) {
                return Err(ParseError::Twice(index + 1, paths.swap_remove(index)));
            }
        }
        Ok(Self { paths })
    }

    /// Reads a view file. Never blocks on a FIFO.
    pub fn read(path: &Path) -> Result<Self, ViewError> {
        let io = |source| ViewError::Io { verb: "read", path: path.to_owned(), source };
        let file =
            File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(ViewError::NotAFile { path: path.to_owned() });
        }
        // One more than there is, so that its end is seen without more room.
        let mut text = Vec::with_capacity(usize::try_from(metadata.len().min(FILE_MAX) + 1).unwrap_or(0));
        file.take(FILE_MAX + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > FILE_MAX {
            return Err(ViewError::TooLarge { path: path.to_owned() });
        }
        Self::parse(&text).map_err(|source| ViewError::Parse { path: path.to_owned(), source })
    }

    /// Writes a view file so that it is there as a whole or not at all, also after a power cut.
    pub fn write(&self, path: &Path) -> Result<(), ViewError> {
        let io = |source: std::io::Error| ViewError::Io { verb: "write", path: path.to_owned(), source };
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let mut file = File::create(&temporary).map_err(io)?;
        file.write_all(self.text().as_bytes()).map_err(io)?;
        file.sync_all().map_err(io)?;
        std::fs::rename(&temporary, path).map_err(io)?;
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        open(directory, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .and_then(fsync)
            .map_err(|e| io(e.into()))
    }

    /// The text of the view file.
    pub fn text(&self) -> String {
        self.paths.iter().flat_map(|path| [STORE_DIR, "/", path.base_name(), "\n"]).collect()
    }

    /// How many bytes a store path takes in a view file.
    pub fn line_length(path: &StorePath) -> u64 {
        (STORE_DIR.len() as u64).saturating_add(path.base_name().len() as u64).saturating_add(2)
    }

    /// What names this view: the first 32 hex digits of the SHA-256 of its text.
    pub fn id(&self) -> String {
        Sha256::digest(self.text()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Its store paths, in the order of the file.
    pub fn paths(&self) -> &[StorePath] {
        &self.paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(n: u8) -> StorePath {
        StorePath::from_base_name(&format!("{n:032}-p{n}")).unwrap()
    }

    #[test]
    fn round_trip_and_id() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("view");
        let view = View::new([path(2), path(1), path(2)]).unwrap();
        assert_eq!(view.paths(), [path(1), path(2)]);
        view.write(&file).unwrap();
        assert_eq!(View::read(&file).unwrap(), view);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
        let bytes: u64 = view.paths().iter().map(View::line_length).sum();
        assert_eq!(std::fs::metadata(&file).unwrap().len(), bytes);
        // sha256sum of the two lines.
        assert_eq!(view.id(), "202850a83e4f5b1a94fbb5b1f2ac6619");
    }

    #[test]
    fn keeps_the_order_of_the_file() {
        let text = format!("{}\n{}\n", path(2), path(1));
        assert_eq!(View::parse(text.as_bytes()).unwrap().paths(), [path(2), path(1)]);
    }

    #[test]
    fn st7_view_missing_empty_or_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("view");
        assert!(matches!(View::read(&file), Err(ViewError::Io { .. })));
        assert!(matches!(View::read(dir.path()), Err(ViewError::NotAFile { .. })));
        assert_eq!(View::new([]), Err(ParseError::Empty));
        let one = path(1);
        for (text, expected) in [
            (Vec::new(), ParseError::Empty),
            (format!("{one}").into_bytes(), ParseError::Unterminated(1)),
            (format!("{one}\n{one}\n").into_bytes(), ParseError::Twice(2, one.clone())),
            (format!("{one}\n{}\n{one}\n", path(2)).into_bytes(), ParseError::Twice(3, one.clone())),
            ([format!("{one}\n").as_bytes(), b"\xff\n"].concat(), ParseError::Encoding(2)),
        ] {
            std::fs::write(&file, text).unwrap();
            let Err(ViewError::Parse { source, .. }) = View::read(&file) else { panic!("{expected}") };
            assert_eq!(source, expected);
        }
        for bad in ["", "/nix/store", "*", " /nix/store/x", "/nix/store/../x", "# all"] {
            let text = format!("{one}\n{bad}\n");
            assert!(matches!(View::parse(text.as_bytes()), Err(ParseError::Line(2, _))), "{bad:?}");
        }
        let crlf = format!("{one}\r\n");
        assert!(matches!(View::parse(crlf.as_bytes()), Err(ParseError::Line(1, _))));
        // Cut at every byte: never a view of something else than whole lines.
        let whole = format!("{}\n{}\n", path(1), path(2));
        for end in 0..whole.len() {
            match View::parse(&whole.as_bytes()[..end]) {
                Ok(view) => assert_eq!((view.paths(), end), (&[path(1)][..], whole.len() / 2)),
                Err(ParseError::Empty) => assert_eq!(end, 0),
                Err(error) => assert!(matches!(error, ParseError::Unterminated(_)), "{error}"),
            }
        }
    }

    #[test]
    fn st7_view_too_large_or_a_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let large = dir.path().join("large");
        File::create(&large).unwrap().set_len(FILE_MAX + 1).unwrap();
        assert!(matches!(View::read(&large), Err(ViewError::TooLarge { .. })));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        assert!(matches!(View::read(&fifo), Err(ViewError::NotAFile { .. })));
    }
}
