//! Where a guest keeps its credentials, and how they get there.
//!
//! | folder | what is in it | for |
//! |---|---|---|
//! | `/run/credentials/lair` | all, as they are now | any program of root's |
//! | `/run/credentials/@initrd` | at boot, those that restart nothing | a systemd that starts takes them as its own |
//! | `/run/credstore` | those that restart something, as they are now | `LoadCredential=` and `ImportCredential=` of units |
//!
//! The last two are for a system with its own init, and exclude each other: systemd keeps what it has taken at its start until it ends,
//! looks there first, and would give a restarted unit the old secret.
//!
//! Folders are 0700, files 0400, on file systems in memory that swap does not take. A file is replaced whole, by rename.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::paths;
use base64::{Engine, prelude::BASE64_STANDARD};
use lair_guest::wire::message;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
};
use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::{self, ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Why a credential is not kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CredentialError {
    #[error("Credential `{0}` is not a file name of at most 255 bytes")]
    BadName(String),
    #[error("Credential `{name}` is not base64")]
    NotBase64 {
        name: String,
        /// Its text would tell bytes of the secret.
        position: usize,
    },
    #[error("Could not mount memory at `{path}`")]
    Mount {
        path: PathBuf,
        #[source]
        source: Errno,
    },
    #[error("Could not write `{path}`")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A credential that has been looked at.
#[derive(PartialEq, Eq)]
pub(crate) struct Credential {
    pub(crate) secret: Vec<u8>,
    pub(crate) restart: Vec<String>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({} bytes, restarts {:?})", self.secret.len(), self.restart)
    }
}

/// Looks at credentials of the host.
pub(crate) fn decode(
    credentials: &BTreeMap<String, message::Credential>,
) -> Result<BTreeMap<String, Credential>, CredentialError> {
    let decode = |(name, credential): (&String, &message::Credential)| {
        check_name(name)?;
        let secret = BASE64_STANDARD.decode(&credential.value.0).map_err(|error| {
            let position = match error {
                base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                _ => credential.value.0.len(),
            };
            CredentialError::NotBase64 { name: name.clone(), position }
        })?;
        Ok((name.clone(), Credential { secret, restart: credential.restart.clone() }))
    };
    credentials.iter().map(decode).collect()
}

/// A credential's name becomes a file's.
pub(crate) fn check_name(name: &str) -> Result<(), CredentialError> {
    // A leading dot is ours, for files that are being written.
    let legal =
        !name.is_empty() && name.len() <= 255 && !name.contains(['/', '\0']) && !name.starts_with('.');
    if legal { Ok(()) } else { Err(CredentialError::BadName(name.into())) }
}

/// The folders with credentials.
#[derive(Debug)]
pub(crate) struct Store {
    all: PathBuf,
    /// For a system with its own init.
    for_units: Option<PathBuf>,
    /// Whether the folders are file systems of their own.
    mounts: bool,
}

impl Store {
    /// The folders of this guest.
    pub(crate) fn of_guest(own_init: bool) -> Self {
        let for_units = own_init.then(|| paths::CREDSTORE.into());
        Self { all: paths::CREDENTIALS.into(), for_units, mounts: true }
    }

    /// Folders below a folder of a test's.
    #[cfg(test)]
    pub(crate) fn below(folder: &Path, own_init: bool) -> Self {
        let for_units = own_init.then(|| folder.join("credstore"));
        Self { all: folder.join("lair"), for_units, mounts: false }
    }

    /// Keeps a credential; whether it is another than the one before.
    pub(crate) fn keep(&self, name: &str, credential: &Credential) -> Result<bool, CredentialError> {
        check_name(name)?;
        let mut changed = self.replace(&self.all, name, &credential.secret)?;
        match &self.for_units {
            // It may be one that restarted something before.
            Some(for_units) if credential.restart.is_empty() => drop(forget(for_units, name)?),
            Some(for_units) => changed |= self.replace(for_units, name, &credential.secret)?,
            None => {}
        }
        Ok(changed)
    }

    /// Forgets a credential; whether there was one.
    pub(crate) fn remove(&self, name: &str) -> Result<bool, CredentialError> {
        check_name(name)?;
        let mut removed = false;
        for folder in [Some(&self.all), self.for_units.as_ref()].into_iter().flatten() {
            removed |= forget(folder, name)?;
        }
        Ok(removed)
    }

    fn replace(&self, folder: &Path, name: &str, secret: &[u8]) -> Result<bool, CredentialError> {
        self.make(folder)?;
        let path = folder.join(name);
        if fs::read(&path).is_ok_and(|before| before == secret) {
            return Ok(false);
        }
        let beside = folder.join(".new");
        let write = || {
            // Left by an agent that ended in the middle.
            let _ = fs::remove_file(&beside);
            let mut file = File::options().write(true).create_new(true).mode(0o400).open(&beside)?;
            file.write_all(secret)?;
            fs::rename(&beside, &path)
        };
        write().map_err(|source| CredentialError::Write { path: path.clone(), source })?;
        Ok(true)
    }

    /// Makes a folder that only root can enter, in memory that swap does not take.
    fn make(&self, folder: &Path) -> Result<(), CredentialError> {
        let failed = |source| CredentialError::Write { path: folder.into(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        if self.mounts && !is_mounted(folder).map_err(failed)? {
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            mount(Some("credentials"), folder, Some("ramfs"), flags, Some("mode=0700"))
                .map_err(|source| CredentialError::Mount { path: folder.into(), source })?;
        }
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed)
    }
}

/// Removes a file; whether there was one.
fn forget(folder: &Path, name: &str) -> Result<bool, CredentialError> {
    let path = folder.join(name);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(CredentialError::Write { path, source }),
    }
}

/// Gives a systemd that is about to start those that restart nothing.
pub(crate) fn for_systemd(
    folder: &Path,
    credentials: &BTreeMap<String, Credential>,
) -> Result<(), CredentialError> {
    // It is on the initramfs's `/run`, and systemd deletes it when it has taken them.
    let store = Store { all: folder.into(), for_units: None, mounts: false };
    for (name, credential) in credentials.iter().filter(|(_, credential)| credential.restart.is_empty()) {
        store.keep(name, credential)?;
    }
    Ok(())
}

fn is_mounted(folder: &Path) -> io::Result<bool> {
    let parent = folder.parent().unwrap_or(Path::new("/"));
    Ok(fs::metadata(folder)?.dev() != fs::metadata(parent)?.dev())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::Secret;

    fn credential(secret: &str, restart: &[&str]) -> Credential {
        let restart = restart.iter().map(|unit| unit.to_string()).collect();
        Credential { secret: secret.into(), restart }
    }

    #[test]
    fn secrets_are_files_that_only_root_reads() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::below(dir.path(), false);
        assert!(store.keep("key", &credential("secret", &["x.service"])).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let folder = dir.path().join("lair");
        assert_eq!((mode(&folder), mode(&folder.join("key"))), (0o700, 0o400));
        assert_eq!(fs::read(folder.join("key")).unwrap(), b"secret");
        assert!(!dir.path().join("credstore").exists(), "A guest without systemd has no use for it");
    }

    #[test]
    fn a_credential_is_replaced_whole_and_only_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::below(dir.path(), true);
        let (lair, units) = (dir.path().join("lair/key"), dir.path().join("credstore/key"));
        assert!(store.keep("key", &credential("one", &["x.service"])).unwrap());
        // What an agent left that was killed while it wrote.
        fs::write(dir.path().join("lair/.new"), "half").unwrap();
        let old = File::open(&lair).unwrap();
        assert!(!store.keep("key", &credential("one", &["x.service"])).unwrap());
        assert!(store.keep("key", &credential("two", &["x.service"])).unwrap());
        assert_eq!((fs::read(&lair).unwrap(), fs::read(&units).unwrap()), (b"two".to_vec(), b"two".to_vec()));
        assert_eq!(io::read_to_string(old).unwrap(), "one", "Who reads it has the old one to its end");
        assert_eq!(fs::read_dir(dir.path().join("lair")).unwrap().count(), 1);
        assert!(store.remove("key").unwrap() && !store.remove("key").unwrap());
        assert!(!lair.exists() && !units.exists());
    }

    #[test]
    fn a_credential_that_restarts_nothing_any_more_is_kept_from_units() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::below(dir.path(), true);
        store.keep("key", &credential("one", &["x.service"])).unwrap();
        assert!(!store.keep("key", &credential("one", &[])).unwrap(), "The secret is as it was");
        assert!(dir.path().join("lair/key").exists() && !dir.path().join("credstore/key").exists());
        assert!(store.keep("key", &credential("one", &["x.service"])).unwrap());
        assert!(dir.path().join("credstore/key").exists());
    }

    /// systemd would go on giving out what it was started with.
    #[test]
    fn what_can_be_rotated_is_none_of_systemds_own() {
        let dir = tempfile::tempdir().unwrap();
        let all = BTreeMap::from([
            ("fixed".to_string(), credential("f", &[])),
            ("rotated".to_string(), credential("r", &["x.service"])),
        ]);
        let store = Store::below(dir.path(), true);
        for (name, credential) in &all {
            store.keep(name, credential).unwrap();
        }
        for_systemd(&dir.path().join("@initrd"), &all).unwrap();
        let names = |folder: &str| {
            let entries = fs::read_dir(dir.path().join(folder)).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("@initrd"), ["fixed"]);
        assert_eq!(names("credstore"), ["rotated"]);
        assert_eq!(names("lair"), ["fixed", "rotated"]);
    }

    #[test]
    fn names_are_file_names() {
        assert!(check_name("signing-key").is_ok());
        for bad in ["", ".", "..", ".new", "a/b", "/etc/passwd", "a\0b", &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
            let one = message::Credential { value: Secret(String::new()), restart: vec![] };
            assert!(decode(&BTreeMap::from([(bad.to_string(), one)])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_base64_is_told_without_it() {
        let one = message::Credential { value: Secret("se cret".into()), restart: vec![] };
        let error = decode(&BTreeMap::from([("key".to_string(), one)])).unwrap_err();
        assert_eq!(crate::report::chain(&error), "Credential `key` is not base64");
        assert!(matches!(error, CredentialError::NotBase64 { position: 2, .. }));
    }
}
