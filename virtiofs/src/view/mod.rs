//! Views: the set of store paths that one guest may see. A view is a file of logical store paths, one a line.

use crate::store::path::{PathError, StorePath};
use sha2::{Digest, Sha256};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The largest view file that is read, in bytes: a quarter of a million paths.
const FILE_MAX: u64 = 64 << 20;

/// A view: store paths in the order of the file, none twice. The order gives each path its slot, so a view may only grow at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View(Vec<StorePath>);

/// Why a view could not be read. It is never taken for "everything".
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The file cannot be read.
    #[error("Cannot read the view {0}")]
    Io(PathBuf, #[source] io::Error),
    /// The file is too large.
    #[error("The view {0} is larger than {FILE_MAX} bytes")]
    TooLarge(PathBuf),
    /// The file is not text.
    #[error("The view {0} is not UTF-8")]
    NotText(PathBuf),
    /// There is nothing in it.
    #[error("The view {0} has no store path")]
    Empty(PathBuf),
    /// A line is not a store path.
    #[error("{file}:{line}")]
    Line {
        /// The file.
        file: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
    /// A path stands in it twice.
    #[error("{file}:{line}: {path} stands here again")]
    Twice {
        /// The file.
        file: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// The path.
        path: StorePath,
    },
    /// The last line has no end: the file was cut.
    #[error("The view {0} does not end with a line end, so it may have been cut")]
    Cut(PathBuf),
}

impl View {
    /// A view of these paths, which are sorted and none of them twice.
    pub fn new(paths: impl IntoIterator<Item = StorePath>) -> Self {
        let mut paths: Vec<_> = paths.into_iter().collect();
        paths.sort();
        paths.dedup();
        Self(paths)
    }

    /// Reads a view file.
    pub fn read(file: &Path) -> Result<Self, ViewError> {
        let io = |e| ViewError::Io(file.into(), e);
        let mut text = Vec::new();
        File::open(file).map_err(io)?.take(FILE_MAX.saturating_add(1)).read_to_end(&mut text).map_err(io)?;
        if u64::try_from(text.len()).is_ok_and(|length| length > FILE_MAX) {
            return Err(ViewError::TooLarge(file.into()));
        }
        let text = String::from_utf8(text).map_err(|_| ViewError::NotText(file.into()))?;
        Self::parse(file, &text)
    }

    fn parse(file: &Path, text: &str) -> Result<Self, ViewError> {
        if text.is_empty() {
            return Err(ViewError::Empty(file.into()));
        }
        if !text.ends_with('\n') {
            return Err(ViewError::Cut(file.into()));
        }
        let mut seen = HashSet::new();
        let mut paths = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let path: StorePath =
                line.parse().map_err(|source| ViewError::Line { file: file.into(), line: number, source })?;
            if !seen.insert(path.clone()) {
                return Err(ViewError::Twice { file: file.into(), line: number, path });
            }
            paths.push(path);
        }
        Ok(Self(paths))
    }

    /// The paths.
    pub fn paths(&self) -> &[StorePath] {
        &self.0
    }

    /// The view as a file's text.
    pub fn text(&self) -> String {
        self.0.iter().map(|path| format!("{path}\n")).collect()
    }

    /// What names this view: 32 hexadecimal digits of the hash of its text.
    pub fn id(&self) -> String {
        Sha256::digest(self.text()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(letter: &str) -> String {
        format!("/nix/store/{}-{letter}\n", letter.repeat(32))
    }

    fn parse(text: &str) -> Result<View, ViewError> {
        View::parse(Path::new("/v"), text)
    }

    #[test]
    fn a_view_keeps_its_order_and_its_id_is_of_its_text() {
        let view = parse(&format!("{}{}", line("b"), line("a"))).unwrap();
        assert_eq!(view.text(), format!("{}{}", line("b"), line("a")));
        assert_ne!(view.id(), View::new(view.paths().to_vec()).id());
        assert_eq!(view.id().len(), 32);
    }

    #[test]
    fn st7_a_view_that_is_missing_empty_cut_or_damaged_is_an_error_with_its_place() {
        assert!(matches!(View::read(Path::new("/nonexistent")), Err(ViewError::Io(..))));
        assert!(matches!(parse(""), Err(ViewError::Empty(_))));
        let whole = format!("{}{}", line("a"), line("b"));
        for length in 1..whole.len() {
            let outcome = parse(&whole[..length]);
            assert!(outcome.is_err() || length == line("a").len(), "cut at {length}");
        }
        let error = parse(&format!("{}/etc\n", line("a"))).unwrap_err();
        assert_eq!(error.to_string(), "/v:2");
        assert!(matches!(
            parse(&format!("{}{}", line("a"), line("a"))),
            Err(ViewError::Twice { line: 2, .. })
        ));
        assert!(matches!(parse("\n"), Err(ViewError::Line { line: 1, .. })));
    }
}
