//! Views on disk: the closure of a VM's roots and its registration, below a directory named by the view's id.

use super::plan::Generation;
use crate::{
    fleet::{
        resolve::{self, ResolveError},
        schema::{Source, Vm},
        view,
    },
    state::{
        dirs::{self, DirsError},
        file::{self, WriteError},
    },
};
use lair_virtiofs::{
    store::{ClosureError, StorePath, StorePathError, closure, registration},
    view::{View, ViewError},
};
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Why a generation cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// A root is no store path.
    #[error("roots: cannot use {0}")]
    Root(PathBuf, #[source] StorePathError),
    /// A source has no database.
    #[error("Cannot use a source")]
    Source(#[from] ResolveError),
    /// The closure cannot be computed.
    #[error("Cannot compute the closure of roots")]
    Closure(#[from] ClosureError),
    /// The view is none, or cannot be written.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A path of the fleet file is not in the view.
    #[error(transparent)]
    Outside(#[from] view::Outside),
    /// The directory cannot be used.
    #[error(transparent)]
    Dirs(#[from] DirsError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Held while the files of a view are written.
static WRITING: Mutex<()> = Mutex::new(());

/// Computes the view of `vm` and writes it below `directory`. The same view has the same id, so it is there only once.
pub fn make(vm: &Vm, sources: &[Source], directory: &Path) -> Result<Generation, GenerationError> {
    let root = |root: &PathBuf| {
        StorePath::parse(&root.to_string_lossy())
            .map_err(|source| GenerationError::Root(root.clone(), source))
    };
    let roots: Vec<StorePath> = vm.roots.iter().map(root).collect::<Result<_, _>>()?;
    sources.iter().try_for_each(resolve::database)?;
    let sources: Vec<_> = sources.iter().map(Source::as_store).collect();
    let closure = closure(&sources, &roots)?.paths;
    let paths: HashSet<_> = closure.iter().map(|info| info.path.to_string()).collect();
    if let Some(outside) = view::outside(vm, |path| paths.contains(path)).into_iter().next() {
        return Err(outside.into());
    }
    let in_memory = |source| ViewError::Parse { path: directory.into(), source };
    let view = View::new(closure.iter().map(|info| info.path.clone())).map_err(in_memory)?;
    let id = view.id();
    let directory = directory.join(&id);
    // VMs with the same view may start at once.
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    dirs::create(&directory, 0o750)?;
    let generation = Generation {
        id,
        view: directory.join("view"),
        registration: directory.join("registration"),
        paths: closure.len().try_into().unwrap_or(u64::MAX),
        bytes: closure.iter().map(|info| info.nar_size).sum(),
    };
    // At most starts all of it is there already, and each file that is written waits for the disk twice.
    if !holds(&generation.view, view.text().as_bytes()) {
        view.write(&generation.view)?;
    }
    let registration = registration(&closure);
    if !holds(&generation.registration, registration.as_bytes()) {
        file::replace(&generation.registration, registration.as_bytes(), 0o640)?;
    }
    Ok(generation)
}

/// Whether a file has these contents.
fn holds(path: &Path, contents: &[u8]) -> bool {
    let length = fs::metadata(path).map(|metadata| metadata.len());
    length.is_ok_and(|length| length == contents.len() as u64)
        && fs::read(path).is_ok_and(|found| found == contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_contents_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("view");
        assert!(!holds(&path, b"") && !holds(directory.path(), b""));
        fs::write(&path, "text").unwrap();
        assert!(holds(&path, b"text"));
        for other in ["", "tex", "texts", "Text"] {
            assert!(!holds(&path, other.as_bytes()), "{other}");
        }
    }
}
