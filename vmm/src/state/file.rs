//! Files that are either the old or the new whole, whatever happens: written beside, synced, renamed, the
//! directory synced.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Why a file was not replaced. The old one, if any, is intact.
#[derive(Debug, thiserror::Error)]
#[error("Cannot write {path}: {step} failed")]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// What was being done.
    pub step: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Replaces `path` with `contents`, readable as `mode` says.
pub fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), WriteError> {
    let failed = |step| move |source| WriteError { path: path.to_owned(), step, source };
    let Some((directory, name)) = path.parent().zip(path.file_name()) else {
        return Err(failed("finding its directory")(io::ErrorKind::InvalidInput.into()));
    };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(".new");
    let beside = directory.join(beside);
    // What an interrupted write left behind is worthless, and may have another mode.
    let _ = fs::remove_file(&beside);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)
            .map_err(failed("creating the new file"))?;
        file.write_all(contents).map_err(failed("writing"))?;
        file.sync_all().map_err(failed("syncing"))?;
        fs::rename(&beside, path).map_err(failed("renaming"))?;
        File::open(directory).and_then(|d| d.sync_all()).map_err(failed("syncing the directory"))
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

/// Replaces `path` with `value` as JSON.
pub fn replace_json(path: &Path, value: &impl serde::Serialize, mode: u32) -> Result<(), WriteError> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| WriteError {
        path: path.to_owned(),
        step: "encoding",
        source: e.into(),
    })?;
    replace(path, &text, mode)
}

/// Removes what writes left in `directory` that were cut short. There must be none under way.
pub fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(".new") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        fs::write(directory.path().join(".a.new"), "left by a crash").unwrap();
        replace(&file, b"one", 0o600).unwrap();
        replace(&file, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn sv4_leftovers_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        for name in [".state.json.new", "state.json", ".hidden", "disk.new"] {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        remove_leftovers(directory.path());
        remove_leftovers(Path::new("/nonexistent"));
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".hidden", "disk.new", "state.json"]);
    }

    #[test]
    fn sv5_a_failed_write_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        fs::create_dir(&file).unwrap();
        fs::write(file.join("inside"), "x").unwrap();
        let error = replace(&file, b"one", 0o600).unwrap_err();
        assert_eq!(error.step, "renaming");
        assert!(file.join("inside").exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(
            replace(Path::new("/nonexistent/a"), b"", 0o600).unwrap_err().step,
            "creating the new file"
        );
    }
}
