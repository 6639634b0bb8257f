//! What fuzzers drive of this module.

use super::{Index, Manifest, reader::Found, registry::Known};
use crate::store::StorePath;
use std::path::Path;

/// What the index in a directory, whose registry has these bytes, has of these paths, whatever their identities are.
pub(crate) fn read(directory: &Path, registry: &[u8], paths: &[StorePath]) -> Vec<(StorePath, Manifest)> {
    let Ok(index) = Index::open(directory) else { return Vec::new() };
    if index.search(paths).is_err() {
        return Vec::new();
    }
    let (known, _) = Known::of(paths, registry);
    let mut found = Vec::new();
    for path in paths {
        for record in known.records(path) {
            if let Found::Sound { manifest, .. } = index.find(&known, path, record.identity) {
                found.push((path.clone(), manifest));
            }
        }
    }
    found
}
