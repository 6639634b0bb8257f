//! The closure of some roots over several sources.

use super::{PathInfo, Source, StorePath, database::Database, database::DatabaseError};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use thiserror::Error;

/// A set of store paths that refers to nothing outside itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closure {
    /// Its paths, sorted.
    pub paths: Vec<PathInfo>,
}

/// Why there is no closure.
#[derive(Debug, Error)]
pub enum ClosureError {
    /// A database could not be read.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// A root is valid in no source.
    #[error("{root} is not a valid path in any source ({})", list(.sources))]
    UnknownRoot {
        /// The root.
        root: StorePath,
        /// The databases that were asked.
        sources: Vec<PathBuf>,
    },
    /// A reference is valid in no source.
    #[error("{path}, to which {referrer} refers, is not a valid path in any source ({})", list(.sources))]
    UnknownReference {
        /// The reference.
        path: StorePath,
        /// What refers to it.
        referrer: StorePath,
        /// The databases that were asked.
        sources: Vec<PathBuf>,
    },
    /// The database lists a path whose files are not there.
    #[error("{path} is valid in the database {database}, but there are no files at {physical}")]
    FilesMissing {
        /// The path.
        path: StorePath,
        /// The database.
        database: PathBuf,
        /// Where its files should be.
        physical: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn list(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "there are none".into();
    }
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// How often to read again because Nix wrote meanwhile. The last attempt takes SQLite's locks, so it cannot be disturbed.
const ATTEMPTS: usize = 3;

/// The closure of `roots`. A path is looked up in the sources in their order; the first that has it counts.
pub fn closure(sources: &[Source], roots: &[StorePath]) -> Result<Closure, ClosureError> {
    for _ in 1..ATTEMPTS {
        let databases = open(sources, false)?;
        let result = walk(sources, &databases, roots);
        if databases.iter().all(Database::undisturbed) {
            return result;
        }
    }
    walk(sources, &open(sources, true)?, roots)
}

fn open(sources: &[Source], ordinary: bool) -> Result<Vec<Database>, DatabaseError> {
    sources.iter().map(|source| Database::open(&source.database, ordinary)).collect()
}

fn walk(sources: &[Source], databases: &[Database], roots: &[StorePath]) -> Result<Closure, ClosureError> {
    let names = || sources.iter().map(|s| s.database.clone()).collect();
    let mut found: BTreeMap<StorePath, PathInfo> = BTreeMap::new();
    let mut todo: VecDeque<(StorePath, Option<StorePath>)> =
        roots.iter().map(|r| (r.clone(), None)).collect();
    while let Some((path, referrer)) = todo.pop_front() {
        if found.contains_key(&path) {
            continue;
        }
        let Some((source, info)) = first(sources, databases, &path)? else {
            return Err(match referrer {
                None => ClosureError::UnknownRoot { root: path, sources: names() },
                Some(referrer) => ClosureError::UnknownReference { path, referrer, sources: names() },
            });
        };
        let physical = source.physical(&path);
        if let Err(error) = std::fs::symlink_metadata(&physical) {
            let database = source.database.clone();
            return Err(ClosureError::FilesMissing { path, database, physical, source: error });
        }
        todo.extend(info.references.iter().map(|r| (r.clone(), Some(path.clone()))));
        found.insert(path, info);
    }
    Ok(Closure { paths: found.into_values().collect() })
}

fn first<'a>(
    sources: &'a [Source],
    databases: &[Database],
    path: &StorePath,
) -> Result<Option<(&'a Source, PathInfo)>, DatabaseError> {
    for (source, database) in sources.iter().zip(databases) {
        if let Some(info) = database.query(path)? {
            return Ok(Some((source, info)));
        }
    }
    Ok(None)
}
