//! Reading Nix databases: closures over several sources, and beside a writer.

use crate::fixture::path;
use lair_virtiofs::store::{ClosureError, DatabaseError, Source, StorePath, closure, registration};
use rusqlite::{Connection, params};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
};
use tempfile::TempDir;

/// Nix's own schema, as far as closures need it.
const SCHEMA: &str = "
    PRAGMA journal_mode = WAL;
    CREATE TABLE ValidPaths (
        id integer primary key autoincrement not null, path text unique not null, hash text not null,
        registrationTime integer not null, deriver text, narSize integer, ultimate integer, sigs text, ca text);
    CREATE TABLE Refs (
        referrer integer not null, reference integer not null, primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict);";

struct Store {
    dir: TempDir,
    source: Source,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::chroot(dir.path());
        fs::create_dir_all(&source.store).unwrap();
        fs::create_dir_all(&source.database).unwrap();
        let store = Self { dir, source };
        store.open().execute_batch(SCHEMA).unwrap();
        store
    }

    fn file(&self) -> std::path::PathBuf {
        self.source.database.join("db.sqlite")
    }

    fn open(&self) -> Connection {
        let connection = Connection::open(self.file()).unwrap();
        connection.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
        connection
    }

    fn add(&self, path: &StorePath, references: &[&StorePath]) {
        add(&self.open(), &self.source, path, references);
    }

    fn closure(&self, roots: &[StorePath]) -> Result<Vec<StorePath>, ClosureError> {
        paths(std::slice::from_ref(&self.source), roots)
    }

    /// What lies in the database's directory.
    fn listing(&self) -> BTreeSet<(String, u64, i64)> {
        let entries = fs::read_dir(&self.source.database).unwrap().map(Result::unwrap);
        entries
            .map(|e| {
                let meta = e.metadata().unwrap();
                (e.file_name().into_string().unwrap(), meta.size(), meta.mtime_nsec())
            })
            .collect()
    }
}

fn add(connection: &Connection, source: &Source, path: &StorePath, references: &[&StorePath]) {
    fs::write(source.physical(path), path.base_name()).unwrap();
    let hash = format!("sha256:{:064x}", path.base_name().len());
    let row = params![path.to_string(), hash, "/nix/store/".to_owned() + DERIVER];
    connection
        .execute(
            "INSERT INTO ValidPaths (path, hash, registrationTime, deriver, narSize) VALUES (?, ?, 1, ?, 120)",
            row,
        )
        .unwrap();
    for reference in references {
        connection
            .execute(
                "INSERT INTO Refs SELECT a.id, b.id FROM ValidPaths a, ValidPaths b WHERE a.path = ? AND b.path = ?",
                params![path.to_string(), reference.to_string()],
            )
            .unwrap();
    }
}

const DERIVER: &str = "00000000000000000000000000000000-deriver.drv";

fn paths(sources: &[Source], roots: &[StorePath]) -> Result<Vec<StorePath>, ClosureError> {
    Ok(closure(sources, roots)?.paths.into_iter().map(|info| info.path).collect())
}

fn p(number: u8) -> StorePath {
    path(number, "p")
}

/// 1 refers to 2 and itself, 2 to 3; 4 to 3.
fn chain() -> Store {
    let store = Store::new();
    store.add(&p(3), &[]);
    store.add(&p(2), &[&p(3)]);
    store.add(&p(1), &[]);
    let all = store.open();
    all.execute_batch(
        "INSERT INTO Refs SELECT a.id, b.id FROM ValidPaths a, ValidPaths b WHERE a.id = 3 AND b.id != 1",
    )
    .unwrap();
    store.add(&p(4), &[&p(3)]);
    store
}

#[test]
fn closures_are_complete_and_sorted() {
    let store = chain();
    assert_eq!(store.closure(&[p(1)]).unwrap(), [p(1), p(2), p(3)]);
    assert_eq!(store.closure(&[p(4), p(2), p(4)]).unwrap(), [p(2), p(3), p(4)]);
    assert_eq!(store.closure(&[]).unwrap(), []);
    let whole = closure(std::slice::from_ref(&store.source), &[p(1)]).unwrap();
    assert_eq!(whole.paths[0].references, [p(1), p(2)]);
    insta::assert_snapshot!(registration(&whole.paths), @r"
    /nix/store/00000000000000000000000000000001-p
    0000000000000000000000000000000000000000000000000000000000000022
    120
    /nix/store/00000000000000000000000000000000-deriver.drv
    2
    /nix/store/00000000000000000000000000000001-p
    /nix/store/00000000000000000000000000000002-p
    /nix/store/00000000000000000000000000000002-p
    0000000000000000000000000000000000000000000000000000000000000022
    120
    /nix/store/00000000000000000000000000000000-deriver.drv
    1
    /nix/store/00000000000000000000000000000003-p
    /nix/store/00000000000000000000000000000003-p
    0000000000000000000000000000000000000000000000000000000000000022
    120
    /nix/store/00000000000000000000000000000000-deriver.drv
    0
    ");
}

#[test]
fn several_sources_in_their_order() {
    let (first, second) = (chain(), Store::new());
    second.add(&p(3), &[]);
    second.add(&p(9), &[&p(3)]);
    let sources = [first.source.clone(), second.source.clone()];
    assert_eq!(paths(&sources, &[p(9), p(2)]).unwrap(), [p(2), p(3), p(9)]);
    // The first one counts: there are no files for 3 in it.
    fs::remove_file(first.source.physical(&p(3))).unwrap();
    let error = paths(&sources, &[p(9)]).unwrap_err();
    assert!(matches!(&error, ClosureError::FilesMissing { path, .. } if *path == p(3)), "{error}");
    let reversed = [second.source.clone(), first.source.clone()];
    assert_eq!(paths(&reversed, &[p(9), p(2)]).unwrap(), [p(2), p(3), p(9)]);
}

#[test]
fn errors_name_what_is_wrong() {
    let store = chain();
    let told =
        |error: &dyn std::error::Error| error.to_string().replace(store.dir.path().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(told(&store.closure(&[p(8)]).unwrap_err()), @"/nix/store/00000000000000000000000000000008-p is not a valid path in any source (DIR/nix/var/nix/db)");
    fs::remove_file(store.source.physical(&p(2))).unwrap();
    insta::assert_snapshot!(told(&store.closure(&[p(1)]).unwrap_err()), @"/nix/store/00000000000000000000000000000002-p is valid in the database DIR/nix/var/nix/db, but there are no files at DIR/nix/store/00000000000000000000000000000002-p");
    // A reference without a row.
    store.open().execute("DELETE FROM ValidPaths WHERE path LIKE '%3-p'", []).unwrap();
    insta::assert_snapshot!(told(&store.closure(&[p(4)]).unwrap_err()), @"The Nix database DIR/nix/var/nix/db/db.sqlite lists a reference of /nix/store/00000000000000000000000000000004-p that it does not know");
    store.open().execute("UPDATE ValidPaths SET hash = 'md5:00' WHERE path LIKE '%4-p'", []).unwrap();
    insta::assert_snapshot!(told(&store.closure(&[p(4)]).unwrap_err()), @r#"The Nix database DIR/nix/var/nix/db/db.sqlite gives "md5:00" as the hash of /nix/store/00000000000000000000000000000004-p, not sha256: and 64 hex digits"#);
    fs::remove_file(store.file()).unwrap();
    insta::assert_snapshot!(told(&store.closure(&[p(4)]).unwrap_err()), @"There is no Nix database at DIR/nix/var/nix/db/db.sqlite");
    assert!(!store.file().exists(), "it made one");
    fs::write(store.file(), "This is no database, but it is longer than the header of one. ".repeat(40))
        .unwrap();
    let error = store.closure(&[p(4)]).unwrap_err();
    assert!(matches!(error, ClosureError::Database(DatabaseError::Sqlite { .. })), "{error}");
}

#[test]
fn a_database_at_rest_is_left_alone() {
    let store = chain();
    let before = store.listing();
    assert_eq!(before.len(), 1, "{before:?}");
    store.closure(&[p(1)]).unwrap();
    assert_eq!(store.listing(), before);
}

#[test]
fn a_writer_is_seen_and_not_disturbed() {
    let store = chain();
    let mut writer = store.open();
    // In the -wal only, since the writer keeps the database open.
    add(&writer, &store.source, &p(5), &[&p(4)]);
    assert!(store.file().with_extension("sqlite-wal").metadata().unwrap().len() > 0);
    assert_eq!(store.closure(&[p(5)]).unwrap(), [p(3), p(4), p(5)]);
    // What is not committed does not count, and a transaction does not keep readers out.
    let transaction = writer.transaction().unwrap();
    add(&transaction, &store.source, &p(6), &[]);
    assert!(store.closure(&[p(6)]).is_err());
    assert_eq!(store.closure(&[p(5)]).unwrap().len(), 3);
    transaction.commit().unwrap();
    assert_eq!(store.closure(&[p(6)]).unwrap(), [p(6)]);
}

#[test]
fn closures_are_of_one_moment_while_nix_writes() {
    let store = chain();
    let source = store.source.clone();
    store.open().execute("DELETE FROM Refs WHERE referrer = 3 AND reference = 3", []).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Opened and closed each time, so that the -wal comes and goes; the references of 1 are 2 or 3, never both or none.
            for round in 0..150 {
                let connection = Connection::open(source.database.join("db.sqlite")).unwrap();
                connection.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
                let other = 1 + round % 2;
                let sql = format!(
                    "BEGIN; DELETE FROM Refs WHERE referrer = 3; INSERT INTO Refs VALUES (3, {other}); COMMIT;"
                );
                connection.execute_batch(&sql).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let mut seen = BTreeSet::new();
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let whole = closure(std::slice::from_ref(&store.source), &[p(1)]).unwrap();
            assert_eq!(whole.paths[0].references.len(), 1, "{:?}", whole.paths[0]);
            seen.insert(whole.paths[0].references.clone());
        }
        assert!(seen.len() >= 2, "{seen:?}");
    });
}

#[test]
fn a_database_that_may_not_be_written_to() {
    let store = chain();
    let writable = |writable: bool| {
        let mode = |mode: u32| fs::Permissions::from_mode(if writable { mode | 0o200 } else { mode });
        for entry in fs::read_dir(&store.source.database).unwrap() {
            fs::set_permissions(entry.unwrap().path(), mode(0o444)).unwrap();
        }
        fs::set_permissions(&store.source.database, mode(0o555)).unwrap();
    };
    fs::set_permissions(store.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    writable(false);
    let before = store.listing();
    assert_eq!(as_nobody(|| store.closure(&[p(1)]).unwrap()), [p(1), p(2), p(3)]);
    assert_eq!(store.listing(), before);
    // Beside a writer.
    writable(true);
    let writer = store.open();
    add(&writer, &store.source, &p(5), &[&p(4)]);
    writable(false);
    assert_eq!(as_nobody(|| store.closure(&[p(5)]).unwrap()), [p(3), p(4), p(5)]);
    writable(true);
}

/// Does `work` in a thread without root's power to write everywhere; as it is where the tests do not run as root.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use nix::libc::{SYS_setresuid, syscall};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if nix::unistd::geteuid().is_root() {
                // SAFETY: the bare system call changes this thread only, which ends with the work.
                #[allow(unsafe_code)]
                let done = unsafe { syscall(SYS_setresuid, 65_534, 65_534, 65_534) };
                assert_eq!(done, 0);
            }
            work()
        });
        thread.join().unwrap()
    })
}
