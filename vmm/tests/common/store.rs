//! A Nix store with valid paths, for tests.

use lair_virtiofs::store::Source;
use std::{fs, path::Path};

/// As much of Nix's own schema as closures need.
const SCHEMA: &str = "
    CREATE TABLE ValidPaths (
        id integer primary key autoincrement not null, path text unique not null, hash text not null,
        registrationTime integer not null, deriver text, narSize integer, ultimate integer, sigs text, ca text);
    CREATE TABLE Refs (
        referrer integer not null, reference integer not null, primary key (referrer, reference));";

/// Makes a chroot store at `root` in which these are valid (`HASH-NAME`); none refers to another. Each is a directory with a file
/// `file` in it.
pub(crate) fn make(root: &Path, valid: &[&str]) {
    let source = Source::chroot(root);
    fs::create_dir_all(&source.store).unwrap();
    fs::create_dir_all(&source.database).unwrap();
    let database = rusqlite::Connection::open(source.database.join("db.sqlite")).unwrap();
    database.execute_batch(SCHEMA).unwrap();
    for name in valid {
        fs::create_dir(source.store.join(name)).unwrap();
        fs::write(source.store.join(name).join("file"), "").unwrap();
        database
            .execute(
                "INSERT INTO ValidPaths (path, hash, registrationTime) VALUES ('/nix/store/' || ?, 'sha256:' || ?, 0)",
                [*name, "0".repeat(64).as_str()],
            )
            .unwrap();
    }
}
