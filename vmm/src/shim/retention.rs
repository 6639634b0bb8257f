//! Which recordings go so that a new one fits.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::limits;
use std::{collections::BTreeSet, ffi::OsString, fs, io, path::Path};

/// The end of a recording's name.
pub(super) const EXTENSION: &str = "cast";

/// A recording on the disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kept {
    /// It begins with the time of its start, so that names are in the order of time.
    name: OsString,
    bytes: u64,
}

/// Removes the oldest recordings in `directory`, but none of `open`, until there is room for one more.
pub(super) fn make_room(directory: &Path, open: &BTreeSet<OsString>) -> io::Result<()> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if Path::new(&name).extension().is_some_and(|end| end == EXTENSION) {
            let metadata = entry.metadata()?;
            // One that grows counts as what it may become.
            let bytes = if open.contains(&name) { limits::RECORDING_BYTES } else { metadata.len() };
            kept.push(Kept { name, bytes });
        }
    }
    for name in surplus(kept, open) {
        fs::remove_file(directory.join(name))?;
    }
    Ok(())
}

fn surplus(mut kept: Vec<Kept>, open: &BTreeSet<OsString>) -> Vec<OsString> {
    kept.sort();
    let mut files = kept.len().saturating_add(1);
    let mut bytes = kept.iter().map(|file| file.bytes).fold(limits::RECORDING_BYTES, u64::saturating_add);
    let mut surplus = Vec::new();
    for file in kept {
        if files <= limits::RECORDINGS && bytes <= limits::RECORDINGS_BYTES {
            break;
        }
        if !open.contains(&file.name) {
            files = files.saturating_sub(1);
            bytes = bytes.saturating_sub(file.bytes);
            surplus.push(file.name);
        }
    }
    surplus
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(count: usize, bytes: u64) -> Vec<Kept> {
        (0..count).rev().map(|n| Kept { name: format!("{n:04}.cast").into(), bytes }).collect()
    }

    #[test]
    fn the_oldest_go_until_one_more_fits() {
        let none = BTreeSet::new();
        assert!(surplus(kept(limits::RECORDINGS - 1, 1), &none).is_empty());
        assert_eq!(surplus(kept(limits::RECORDINGS + 1, 1), &none), ["0000.cast", "0001.cast"]);
        let full = usize::try_from(limits::RECORDINGS_BYTES / limits::RECORDING_BYTES).unwrap();
        assert!(surplus(kept(full - 1, limits::RECORDING_BYTES), &none).is_empty());
        let open = BTreeSet::from(["0000.cast".into()]);
        assert_eq!(surplus(kept(full, limits::RECORDING_BYTES), &open), ["0001.cast"]);
        assert_eq!(surplus(kept(3, limits::RECORDINGS_BYTES), &none).len(), 3);
    }

    #[test]
    fn other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["0.cast", "1.txt", "2.cast"] {
            let file = fs::File::create(directory.path().join(name)).unwrap();
            file.set_len(limits::RECORDINGS_BYTES).unwrap();
        }
        make_room(directory.path(), &BTreeSet::from(["2.cast".into()])).unwrap();
        let left: BTreeSet<_> =
            fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, BTreeSet::from(["1.txt".into(), "2.cast".into()]));
    }
}
