//! Reading a Nix database, also while Nix writes to it, without leaving traces where none are needed.
//!
//! Nix's database is in WAL mode. Opening such a database the ordinary way, even read-only, makes `-wal` and `-shm`
//! files beside it, and fails where that is not allowed. So a database that nobody writes to (no `-wal`, no journal)
//! is opened as *immutable*, which touches nothing. SQLite does no locking then, so what was read counts only if the
//! database is the same afterwards; see [`Database::undisturbed`]. A database with a `-wal` is opened the ordinary way.

use super::{StorePath, StorePathError};
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use std::{
    io::Read,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};
use thiserror::Error;

/// How long to wait for a writer that holds a lock.
const BUSY: Duration = Duration::from_secs(5);

/// What Nix knows about a valid store path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// SHA-256 of its archive (NAR).
    pub nar_hash: [u8; 32],
    /// The size of its archive in bytes; 0 if Nix does not know it.
    pub nar_size: u64,
    /// What it was built from, if that is known.
    pub deriver: Option<StorePath>,
    /// What it refers to, sorted; itself included where it does.
    pub references: Vec<StorePath>,
}

/// Why a database could not be read.
#[derive(Debug, Error)]
pub enum DatabaseError {
    /// There is no database.
    #[error("There is no Nix database at {path}")]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The file could not be looked at.
    #[error("Cannot look at the Nix database {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// SQLite failed.
    #[error("Cannot read the Nix database {path}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// A row names something that is no store path.
    #[error("The Nix database {path} has a wrong entry")]
    StorePath {
        /// The file.
        path: PathBuf,
        /// Why.
        source: StorePathError,
    },
    /// A row has a hash of another form than Nix writes.
    #[error(
        "The Nix database {path} gives {value:?} as the hash of {store_path}, not sha256: and 64 hex digits"
    )]
    Hash {
        /// The file.
        path: PathBuf,
        /// The store path.
        store_path: StorePath,
        /// The value.
        value: String,
    },
    /// A reference leads to no row.
    #[error("The Nix database {path} lists a reference of {store_path} that it does not know")]
    DanglingReference {
        /// The file.
        path: PathBuf,
        /// The referrer.
        store_path: StorePath,
    },
}

/// One open database, in one read transaction.
pub(super) struct Database {
    path: PathBuf,
    connection: Connection,
    /// What the file was like when it was opened as immutable.
    calm: Option<Print>,
}

/// What changes whenever a database is written to.
#[derive(PartialEq, Eq)]
struct Print {
    inode: (u64, u64),
    size: u64,
    changed: [(i64, i64); 2],
    header: [u8; 100],
}

impl Database {
    /// Opens the database in `dir`. With `ordinary`, never as immutable.
    pub(super) fn open(dir: &Path, ordinary: bool) -> Result<Self, DatabaseError> {
        let path = dir.join("db.sqlite");
        match path.metadata() {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(DatabaseError::Missing { path });
            }
            Err(source) => return Err(DatabaseError::Io { path, source }),
        }
        let calm = if ordinary { None } else { print(&path) };
        let opened = open(&path, calm.is_some());
        match opened {
            Ok(connection) => Ok(Self { path, connection, calm }),
            Err(source) => Err(DatabaseError::Sqlite { path, source }),
        }
    }

    /// Whether what was read is to be believed: always for an ordinary connection; for an immutable one, if
    /// nobody has written to the database since it was opened.
    pub(super) fn undisturbed(&self) -> bool {
        self.calm.as_ref().is_none_or(|then| print(&self.path).as_ref() == Some(then))
    }

    /// What the database says about `path`; `None` if it is not valid here.
    pub(super) fn query(&self, path: &StorePath) -> Result<Option<PathInfo>, DatabaseError> {
        let row = self
            .connection
            .prepare_cached("SELECT id, hash, narSize, deriver FROM ValidPaths WHERE path = ?")
            .and_then(|mut statement| {
                statement
                    .query_row([path.to_string()], |row| {
                        Ok((
                            row.get::<_, i64>(0)?,
                            row.get::<_, String>(1)?,
                            row.get::<_, Option<i64>>(2)?,
                            row.get::<_, Option<String>>(3)?,
                        ))
                    })
                    .optional()
            })
            .map_err(|e| self.sqlite(e))?;
        let Some((id, hash, nar_size, deriver)) = row else { return Ok(None) };
        let nar_hash = hash.strip_prefix("sha256:").and_then(unhex).ok_or_else(|| DatabaseError::Hash {
            path: self.path.clone(),
            store_path: path.clone(),
            value: hash.chars().take(100).collect(),
        })?;
        let deriver = deriver.filter(|d| !d.is_empty()).map(|d| self.parse(&d)).transpose()?;
        Ok(Some(PathInfo {
            path: path.clone(),
            nar_hash,
            nar_size: nar_size.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
            deriver,
            references: self.references(path, id)?,
        }))
    }

    fn references(&self, path: &StorePath, id: i64) -> Result<Vec<StorePath>, DatabaseError> {
        // The outer join keeps a reference to a missing row visible.
        let rows: Vec<Option<String>> = self
            .connection
            .prepare_cached(
                "SELECT v.path FROM Refs r LEFT JOIN ValidPaths v ON v.id = r.reference WHERE r.referrer = ?",
            )
            .and_then(|mut statement| statement.query_map([id], |row| row.get(0))?.collect())
            .map_err(|e| self.sqlite(e))?;
        let mut references = rows
            .into_iter()
            .map(|row| match row {
                Some(text) => self.parse(&text),
                None => Err(DatabaseError::DanglingReference {
                    path: self.path.clone(),
                    store_path: path.clone(),
                }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        references.sort();
        Ok(references)
    }

    fn parse(&self, text: &str) -> Result<StorePath, DatabaseError> {
        StorePath::parse(text).map_err(|source| DatabaseError::StorePath { path: self.path.clone(), source })
    }

    fn sqlite(&self, source: rusqlite::Error) -> DatabaseError {
        DatabaseError::Sqlite { path: self.path.clone(), source }
    }
}

fn open(path: &Path, immutable: bool) -> rusqlite::Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri(path, immutable), flags)?;
    connection.busy_timeout(BUSY)?;
    // One transaction, so that all answers are of one moment. The first query begins it.
    connection.execute_batch("BEGIN")?;
    Ok(connection)
}

fn uri(path: &Path, immutable: bool) -> String {
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02x}"));
        }
    }
    if immutable {
        uri.push_str("?immutable=1");
    }
    uri
}

/// `None` if somebody may be writing: then the file alone does not say it all.
fn print(path: &Path) -> Option<Print> {
    let holds_data = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match std::fs::symlink_metadata(&name) {
            Ok(meta) => meta.len() > 0,
            Err(e) => e.kind() != std::io::ErrorKind::NotFound,
        }
    };
    if holds_data("-wal") || holds_data("-journal") {
        return None;
    }
    let mut file = std::fs::File::open(path).ok()?;
    let mut header = [0; 100];
    file.read_exact(&mut header).ok()?;
    let meta = file.metadata().ok()?;
    Some(Print {
        inode: (meta.dev(), meta.ino()),
        size: meta.size(),
        changed: [(meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())],
        header,
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> =
        text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks(2).map(|pair| pair.iter().fold(0u8, |byte, digit| (byte << 4) | digit)).collect();
    (digits.len() == 64).then_some(bytes)?.try_into().ok()
}
