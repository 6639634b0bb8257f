//! Names that the guest was told do not exist.
//!
//! Linux' overlayfs remembers a missing name for ever. So when such a name is granted, the guest must refresh its mount, and who
//! grants it must know. Only names of store paths can be granted, so only those are kept, and of them a fixed number: the
//! guest can make up as many as it likes.

use crate::store::StorePath;
use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// How many names are kept.
pub const DENIED_MAX: usize = 1024;

/// What the guest was denied in the root directory since it mounted it.
#[derive(Debug, Default)]
pub struct Denied(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Whether that is all. It is not if there were more names than are kept, or if this program saw no INIT: then an earlier
    /// one may have served the guest and denied it anything.
    complete: bool,
    names: HashSet<StorePath>,
}

impl Denied {
    /// The guest mounts anew, and remembers nothing.
    pub(super) fn start(&self) {
        *self.lock() = State { complete: true, names: HashSet::new() };
    }

    /// The guest is about to be told that a name is missing. Whether it can be granted and is kept.
    ///
    /// It must then be looked for once more: if it was granted before it was kept, who granted it was told that the guest need
    /// not refresh.
    pub(super) fn note(&self, name: &[u8]) -> bool {
        let Some(path) = str::from_utf8(name).ok().and_then(|name| StorePath::from_base_name(name).ok())
        else {
            return false;
        };
        let mut state = self.lock();
        if state.names.len() >= DENIED_MAX && !state.names.contains(&path) {
            state.complete = false;
            return false;
        }
        state.names.insert(path);
        true
    }

    /// Whether the guest must refresh its mount to see these paths, which it can see by now.
    pub fn needs_refresh(&self, paths: &[StorePath]) -> bool {
        let state = self.lock();
        !state.complete || paths.iter().any(|path| state.names.contains(path))
    }

    /// What is kept, sorted, and whether that is all.
    pub fn list(&self) -> (Vec<StorePath>, bool) {
        let state = self.lock();
        let mut names: Vec<_> = state.names.iter().cloned().collect();
        names.sort();
        (names, state.complete)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(number: usize) -> StorePath {
        StorePath::from_base_name(&format!("{number:032}-p")).unwrap()
    }

    #[test]
    fn names_are_kept_up_to_a_number() {
        let denied = Denied::default();
        denied.start();
        for name in [&b"x"[..], b".links", b"\xff", b"", &[b'n'; 255]] {
            assert!(!denied.note(name));
        }
        for number in 0..DENIED_MAX {
            assert!(denied.note(path(number).base_name().as_bytes()));
        }
        assert!(denied.note(path(7).base_name().as_bytes()));
        assert!(!denied.needs_refresh(&[path(DENIED_MAX)]));
        assert!(denied.needs_refresh(&[path(DENIED_MAX), path(3)]));
        assert!(!denied.needs_refresh(&[]));
        assert!(denied.list().1);
        assert!(!denied.note(path(DENIED_MAX + 1).base_name().as_bytes()));
        assert!(denied.needs_refresh(&[path(DENIED_MAX)]));
        assert_eq!(denied.list(), ((0..DENIED_MAX).map(path).collect(), false));
        denied.start();
        assert_eq!(denied.list(), (Vec::new(), true));
        assert!(!denied.needs_refresh(&[path(3)]));
    }

    #[test]
    fn what_an_earlier_program_denied_is_unknown() {
        assert!(Denied::default().needs_refresh(&[path(1)]));
        assert_eq!(Denied::default().list(), (Vec::new(), false));
    }
}
