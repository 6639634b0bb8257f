//! A closure as `nix-store --load-db` reads it, so that the guest's Nix knows what its view has.

use super::database::PathInfo;
use std::fmt::Write;

/// The registration: for each path a line each for the path, the hash of its NAR in base 16, the size of its NAR, its deriver
/// (empty: not told), the number of its references, and then its references, one a line. That is what `nix-store --dump-db` writes.
///
/// The deriver is left out: a guest's Nix would have to have it.
pub fn registration(closure: &[PathInfo]) -> String {
    let mut text = String::new();
    for info in closure {
        let hash = info.nar_hash.strip_prefix("sha256:").unwrap_or(&info.nar_hash);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}\n{hash}\n{}\n\n{}", info.path, info.nar_size, info.references.len());
        for reference in &info.references {
            let _ = writeln!(text, "{reference}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::closure::{
        closure,
        tests::{fixture, path},
    };
    use super::*;

    #[test]
    fn the_format_is_that_of_dump_db() {
        let store = fixture(&[("a", &["a", "b"]), ("b", &[])]);
        let text = registration(&closure(&[store.source], &[path("a")]).unwrap());
        let (a, b, hash) = (path("a"), path("b"), "0".repeat(64));
        assert_eq!(text, format!("{a}\n{hash}\n100\n\n2\n{a}\n{b}\n{b}\n{hash}\n100\n\n0\n"));
    }
}
