//! The text that `nix-store --load-db` reads and `nix-store --dump-db` writes.

use super::PathInfo;
use std::fmt::Write;

/// The registration of `paths`. Per path, one line each: the path, the hash of its archive (SHA-256 in hex, no prefix),
/// the archive's size, the deriver (empty if unknown), the number of references, and the references.
pub fn registration<'a>(paths: impl IntoIterator<Item = &'a PathInfo>) -> String {
    let mut text = String::new();
    for info in paths {
        let hash = info.nar_hash.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        let deriver = info.deriver.as_ref().map(ToString::to_string).unwrap_or_default();
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "{}\n{hash}\n{}\n{deriver}\n{}", info.path, info.nar_size, info.references.len());
        for reference in &info.references {
            let _ = writeln!(text, "{reference}");
        }
    }
    text
}
