//! The closure of store paths, over several sources.

use super::{
    Source,
    database::{Database, DatabaseError, PathInfo},
    path::StorePath,
};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

/// Why a closure could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ClosureError {
    /// A database could not be read.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// A path is valid in no source.
    #[error("{path} is not valid in any source ({}){}", list(.sources), .referrer.as_ref().map(|r| format!(", but {r} refers to it")).unwrap_or_default())]
    Invalid {
        /// The path.
        path: StorePath,
        /// What refers to it; `None` if it is a root.
        referrer: Option<StorePath>,
        /// The databases that were asked.
        sources: Vec<PathBuf>,
    },
    /// A database calls a path valid that its store does not have.
    #[error("{path} is valid in {database}, but {file} cannot be read")]
    Absent {
        /// The path.
        path: StorePath,
        /// The database.
        database: PathBuf,
        /// Where it should be.
        file: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The closure of `roots`, sorted by path. Each path is looked up in the sources in their order.
pub fn closure(sources: &[Source], roots: &[StorePath]) -> Result<Vec<PathInfo>, ClosureError> {
    let databases: Vec<(&Source, Database)> = sources
        .iter()
        .map(|source| Ok((source, Database::open(&source.database)?)))
        .collect::<Result<_, DatabaseError>>()?;
    let mut found = BTreeMap::new();
    let mut queue: Vec<(StorePath, Option<StorePath>)> =
        roots.iter().map(|root| (root.clone(), None)).collect();
    while let Some((path, referrer)) = queue.pop() {
        if found.contains_key(&path) {
            continue;
        }
        let info = look_up(&databases, &path)?.ok_or_else(|| ClosureError::Invalid {
            path: path.clone(),
            referrer,
            sources: sources.iter().map(|source| source.database.clone()).collect(),
        })?;
        queue.extend(info.references.iter().map(|reference| (reference.clone(), Some(path.clone()))));
        found.insert(path, info);
    }
    Ok(found.into_values().collect())
}

fn look_up(databases: &[(&Source, Database)], path: &StorePath) -> Result<Option<PathInfo>, ClosureError> {
    for (source, database) in databases {
        if let Some(info) = database.query(path)? {
            let file = source.store.join(path.name());
            exists(&file).map_err(|error| ClosureError::Absent {
                path: path.clone(),
                database: source.database.clone(),
                file,
                source: error,
            })?;
            return Ok(Some(info));
        }
    }
    Ok(None)
}

fn exists(file: &Path) -> io::Result<()> {
    std::fs::symlink_metadata(file).map(drop)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rusqlite::Connection;

    /// A store of paths whose names are single letters, with their references.
    pub(crate) struct Fixture {
        pub(crate) directory: tempfile::TempDir,
        pub(crate) source: Source,
    }

    pub(crate) fn path(letter: &str) -> StorePath {
        StorePath::from_name(&format!("{}-{letter}", letter.repeat(32))).unwrap()
    }

    pub(crate) fn fixture(paths: &[(&str, &[&str])]) -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let source = Source { store: directory.path().join("store"), database: directory.path().into() };
        std::fs::create_dir(&source.store).unwrap();
        let connection = Connection::open(directory.path().join("db.sqlite")).unwrap();
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL;
                 CREATE TABLE ValidPaths (id INTEGER PRIMARY KEY, path TEXT UNIQUE, hash TEXT, registrationTime INTEGER,
                   deriver TEXT, narSize INTEGER, ultimate INTEGER, sigs TEXT, ca TEXT);
                 CREATE TABLE Refs (referrer INTEGER, reference INTEGER, PRIMARY KEY (referrer, reference));",
            )
            .unwrap();
        for (letter, _) in paths {
            let name = path(letter);
            std::fs::write(source.store.join(name.name()), letter).unwrap();
            let hash = format!("sha256:{}", "0".repeat(64));
            connection
                .execute(
                    "INSERT INTO ValidPaths (path, hash, narSize) VALUES (?, ?, 100)",
                    [name.to_string(), hash],
                )
                .unwrap();
        }
        for (from, references) in paths {
            for to in *references {
                connection
                    .execute(
                        "INSERT INTO Refs SELECT a.id, b.id FROM ValidPaths a, ValidPaths b WHERE a.path = ? AND b.path = ?",
                        [path(from).to_string(), path(to).to_string()],
                    )
                    .unwrap();
            }
        }
        Fixture { directory, source }
    }

    fn names(closure: &[PathInfo]) -> Vec<&str> {
        closure.iter().map(|info| &info.path.name()[33..]).collect()
    }

    #[test]
    fn a_closure_has_every_reference_once_cycles_and_self_references_included() {
        let store =
            fixture(&[("a", &["b", "c"]), ("b", &["b", "d"]), ("c", &["d", "a"]), ("d", &[]), ("f", &[])]);
        let closure = closure(&[store.source], &[path("a")]).unwrap();
        assert_eq!(names(&closure), ["a", "b", "c", "d"]);
        assert_eq!(closure[1].references, [path("b"), path("d")]);
    }

    #[test]
    fn the_first_source_that_has_a_path_counts() {
        let (one, two) =
            (fixture(&[("a", &["b"]), ("b", &[])]), fixture(&[("b", &["c"]), ("c", &[]), ("d", &[])]));
        let sources = [one.source.clone(), two.source.clone()];
        assert_eq!(names(&closure(&sources, &[path("a"), path("d")]).unwrap()), ["a", "b", "d"]);
    }

    #[test]
    fn a_root_that_is_not_valid_names_the_databases_that_were_asked() {
        let store = fixture(&[("a", &[])]);
        let error = closure(&[store.source.clone()], &[path("z")]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{} is not valid in any source ({})", path("z"), store.directory.path().display())
        );
    }

    #[test]
    fn a_valid_path_without_its_file_is_an_error() {
        let store = fixture(&[("a", &["b"]), ("b", &[])]);
        std::fs::remove_file(store.source.store.join(path("b").name())).unwrap();
        assert!(matches!(closure(&[store.source.clone()], &[path("a")]), Err(ClosureError::Absent { .. })));
    }

    #[test]
    fn a_database_is_read_while_another_connection_writes() {
        let store = fixture(&[("a", &[])]);
        let writer = Connection::open(store.directory.path().join("db.sqlite")).unwrap();
        writer.execute_batch("BEGIN IMMEDIATE; UPDATE ValidPaths SET narSize = 7").unwrap();
        assert_eq!(closure(&[store.source.clone()], &[path("a")]).unwrap()[0].nar_size, 100);
        writer.execute_batch("COMMIT").unwrap();
        assert_eq!(closure(&[store.source.clone()], &[path("a")]).unwrap()[0].nar_size, 7);
    }

    #[test]
    fn a_missing_or_damaged_database_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let source = Source { store: directory.path().into(), database: directory.path().into() };
        let missing = closure(std::slice::from_ref(&source), &[path("a")]).unwrap_err().to_string();
        assert!(
            missing.starts_with("There is no Nix database /") && missing.ends_with("/db.sqlite"),
            "{missing}"
        );
        std::fs::write(
            directory.path().join("db.sqlite"),
            "not a database, but long enough to be looked at as one".repeat(50),
        )
        .unwrap();
        assert!(matches!(
            closure(&[source], &[path("a")]),
            Err(ClosureError::Database(DatabaseError::Sqlite { .. }))
        ));
    }
}
