//! A Nix database, read-only, also while Nix writes to it.

use super::path::{PathError, StorePath};
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// How long to wait for a writer that holds the database.
const BUSY: Duration = Duration::from_secs(30);

/// What a database knows of a valid path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// The hash of its NAR: `sha256:` and 64 hexadecimal digits.
    pub nar_hash: String,
    /// The size of its NAR in bytes.
    pub nar_size: u64,
    /// The derivation that made it, if known.
    pub deriver: Option<String>,
    /// The paths that it refers to, itself included where it does.
    pub references: Vec<StorePath>,
}

/// Why a database could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// There is none.
    #[error("There is no Nix database {0}")]
    Missing(PathBuf),
    /// SQLite failed.
    #[error("Cannot read the Nix database {file}")]
    Sqlite {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// It holds a path that is none.
    #[error("The Nix database {file} is damaged")]
    Path {
        /// The file.
        file: PathBuf,
        /// What is in it.
        #[source]
        source: PathError,
    },
}

/// An open database.
#[derive(Debug)]
pub struct Database {
    file: PathBuf,
    connection: Connection,
}

impl Database {
    /// Opens `db.sqlite` in a directory.
    ///
    /// Nix uses write-ahead logging, for which even a reader needs the shared-memory file beside the database, and makes it if it is
    /// missing. Where this process may not, and nobody writes (there is no log, or it is empty), the file alone is the whole truth and is
    /// read as it is.
    pub fn open(directory: &Path) -> Result<Self, DatabaseError> {
        let file = directory.join("db.sqlite");
        if !file.is_file() {
            return Err(DatabaseError::Missing(file));
        }
        let failed = |source| DatabaseError::Sqlite { file: file.clone(), source };
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&file, flags).and_then(probe);
        let connection = match connection {
            Ok(connection) => connection,
            Err(error) if log_is_empty(&file) && is_access(&error) => {
                let uri = format!("file:{}?immutable=1", escape(&file));
                Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI)
                    .and_then(probe)
                    .map_err(failed)?
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { file, connection })
    }

    /// What is known of a path; `None` if it is not valid.
    pub fn query(&self, path: &StorePath) -> Result<Option<PathInfo>, DatabaseError> {
        let failed = |source| DatabaseError::Sqlite { file: self.file.clone(), source };
        let row = self
            .connection
            .prepare_cached("SELECT id, hash, deriver, narSize FROM ValidPaths WHERE path = ?")
            .and_then(|mut query| {
                query
                    .query_row([path.to_string()], |row| {
                        let size: Option<i64> = row.get(3)?;
                        Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get::<_, Option<String>>(2)?, size))
                    })
                    .optional()
            })
            .map_err(failed)?;
        let Some((id, nar_hash, deriver, size)) = row else { return Ok(None) };
        let references: Vec<String> = self
            .connection
            .prepare_cached(
                "SELECT path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ? ORDER BY path",
            )
            .and_then(|mut query| query.query_map([id], |row| row.get(0))?.collect())
            .map_err(failed)?;
        let references = references
            .iter()
            .map(|path| path.parse())
            .collect::<Result<_, _>>()
            .map_err(|source| DatabaseError::Path { file: self.file.clone(), source })?;
        let nar_size = size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0);
        Ok(Some(PathInfo { path: path.clone(), nar_hash, nar_size, deriver, references }))
    }
}

/// A connection is made lazily: only a query finds out whether it works.
fn probe(connection: Connection) -> rusqlite::Result<Connection> {
    connection.busy_timeout(BUSY)?;
    connection.query_row("SELECT count(*) FROM sqlite_master", [], |_| Ok(()))?;
    Ok(connection)
}

fn is_access(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    matches!(error.sqlite_error_code(), Some(CannotOpen | PermissionDenied | ReadOnly))
}

fn log_is_empty(file: &Path) -> bool {
    let mut log = file.as_os_str().to_owned();
    log.push("-wal");
    std::fs::metadata(log).map_or(true, |metadata| metadata.len() == 0)
}

/// A path as it stands in an SQLite URI.
fn escape(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let byte = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => char::from(*byte).to_string(),
        other => format!("%{other:02X}"),
    };
    path.as_os_str().as_bytes().iter().map(byte).collect()
}
