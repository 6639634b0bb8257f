//! A VM's runtime state on disk: what a later `laird` needs to find the VM again.

use super::{
    machine::{Part, State},
    plan::Generation,
};
use crate::{
    fleet::schema::Vm,
    host::{facts::Engine, process::ProcessId},
    state::file::{self, WriteError},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

/// The version of the format.
const SCHEMA: u32 = 1;

/// The longest record that is read, in bytes; a real one has a few KiB.
const LENGTH_MAX: u64 = 1 << 20;

/// What runs of a VM, in this boot of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The version of the format.
    pub schema: u32,
    /// The boot of the host's kernel in which this is true.
    pub boot_id: String,
    /// The VM's name.
    pub name: String,
    /// Where it is in its life.
    pub state: State,
    /// Since when.
    pub since: jiff::Timestamp,
    /// The fleet file's words with which it was started.
    pub vm: Vm,
    /// Its view.
    pub generation: Generation,
    /// What executes it.
    pub engine: Engine,
    /// Its processes.
    pub processes: BTreeMap<Part, ProcessId>,
}

/// Why a record is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("its runtime state cannot be read: {0}")]
    Io(String),
    /// It is longer than any real one.
    #[error("its runtime state is longer than {LENGTH_MAX} bytes")]
    TooLong,
    /// It is not what this program writes.
    #[error("its runtime state is damaged: {0}")]
    Damaged(String),
    /// It is of a later release.
    #[error("its runtime state has schema {0}, this laird reads {SCHEMA}")]
    Newer(u32),
    /// It is another VM's.
    #[error("its runtime state is that of VM {0}")]
    OtherVm(String),
}

impl Record {
    /// A record of this schema.
    pub fn new(boot_id: &str, name: &str, vm: &Vm, generation: &Generation, engine: Engine) -> Self {
        Self {
            schema: SCHEMA,
            boot_id: boot_id.into(),
            name: name.into(),
            state: State::Stopped,
            since: jiff::Timestamp::now(),
            vm: vm.clone(),
            generation: generation.clone(),
            engine,
            processes: BTreeMap::new(),
        }
    }

    /// Replaces the record on disk.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| WriteError {
            path: path.to_owned(),
            step: "encoding",
            source: e.into(),
        })?;
        file::replace(path, &text, 0o600)
    }

    /// Reads the record of the VM `name`; `None` if there is none.
    pub fn read(path: &Path, name: &str) -> Result<Option<Self>, RecordError> {
        let io = |e: std::io::Error| RecordError::Io(e.to_string());
        // A link here was put there by somebody else.
        let options =
            nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
        let file = match nix::fcntl::open(path, options, nix::sys::stat::Mode::empty()) {
            Ok(file) => File::from(file),
            Err(nix::errno::Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(io(error.into())),
        };
        let mut text = Vec::new();
        file.take(LENGTH_MAX + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > LENGTH_MAX {
            return Err(RecordError::TooLong);
        }
        Self::parse(&text, name).map(Some)
    }

    fn parse(text: &[u8], name: &str) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let damaged = |e: serde_json::Error| RecordError::Damaged(e.to_string());
        let version: Version = serde_json::from_slice(text).map_err(damaged)?;
        if version.schema != SCHEMA {
            return Err(RecordError::Newer(version.schema));
        }
        let record: Self = serde_json::from_slice(text).map_err(damaged)?;
        if record.name != name {
            return Err(RecordError::OtherVm(record.name));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let vm = serde_json::from_value(serde_json::json!({
            "vcpus": 1, "memory": "512MiB", "kernel": "/k", "modules": "/m", "roots": [],
        }));
        let generation =
            Generation { id: "g".into(), view: "/v".into(), registration: "/r".into(), paths: 1, bytes: 2 };
        Record::new("boot", "builder", &vm.unwrap(), &generation, Engine::Tcg)
    }

    #[test]
    fn sv3_a_record_cut_anywhere_is_an_error_never_a_panic_or_a_guess() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(Record::read(&path, "builder").unwrap(), None);
        record().write(&path).unwrap();
        assert_eq!(Record::read(&path, "builder").unwrap(), Some(record_as_read(&path)));
        let text = std::fs::read(&path).unwrap();
        for length in 0..text.len() {
            assert!(Record::parse(&text[..length], "builder").is_err(), "cut at {length}");
        }
    }

    fn record_as_read(path: &Path) -> Record {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn sv3_a_record_of_another_vm_or_schema_or_behind_a_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        record().write(&path).unwrap();
        assert!(matches!(Record::read(&path, "cache"), Err(RecordError::OtherVm(_))));
        let newer = Record { schema: 2, ..record() };
        assert!(matches!(
            Record::parse(&serde_json::to_vec(&newer).unwrap(), "builder"),
            Err(RecordError::Newer(2))
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Record::read(&link, "builder"), Err(RecordError::Io(_))));
    }
}
