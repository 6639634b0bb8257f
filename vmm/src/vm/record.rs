//! A VM's runtime state on disk: all that a later `laird` needs to find the VM again and to go on with it, without a look at today's
//! fleet file.

use super::{
    machine::{Life, Part},
    plan::Plan,
    trace::Start,
};
use crate::{
    host::process::ProcessId,
    state::file::{self, WriteError},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

/// The version of the format.
const SCHEMA: u32 = 2;

/// The longest record that is read, in bytes: the plan of a VM with as many services, roots and links as a fleet file may hold.
const LENGTH_MAX: u64 = 8 << 20;

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
    /// Where it is in its life. A step that is named here may have been done, in part or not at all.
    pub life: Life,
    /// Since when it is in that state.
    pub since: jiff::Timestamp,
    /// What it was started as: every path resolved, with the engine of that start.
    pub plan: Plan,
    /// Its processes.
    pub processes: BTreeMap<Part, ProcessId>,
    /// How its start went so far.
    #[serde(default)]
    pub start: Start,
}

/// Why a file of runtime state is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("its recorded state cannot be read: {0}")]
    Io(String),
    /// It is longer than any real one.
    #[error("its recorded state is longer than {0} bytes")]
    TooLong(u64),
    /// It is not what this program writes.
    #[error("its recorded state is damaged: {0}")]
    Damaged(String),
    /// It is of another release.
    #[error("its recorded state has schema {found}, this laird reads {known}")]
    Schema {
        /// The schema of the file.
        found: u32,
        /// The one that is understood.
        known: u32,
    },
    /// It is another VM's.
    #[error("its recorded state is that of VM {0}")]
    OtherVm(String),
}

impl RecordError {
    /// Whether the file could be read and made no sense, as against one that should not be there.
    pub fn is_unparseable(&self) -> bool {
        match self {
            Self::TooLong(_) | Self::Damaged(_) | Self::Schema { .. } => true,
            Self::Io(_) | Self::OtherVm(_) => false,
        }
    }
}

impl Record {
    /// A record of this schema.
    pub fn new(boot_id: &str, life: &Life, since: jiff::Timestamp, plan: &Plan) -> Self {
        Self {
            schema: SCHEMA,
            boot_id: boot_id.into(),
            name: plan.name.clone(),
            life: life.clone(),
            since,
            plan: plan.clone(),
            processes: BTreeMap::new(),
            start: Start::default(),
        }
    }

    /// Replaces the record on disk.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        file::replace_json(path, self, 0o600)
    }

    /// Reads the record of the VM `name`; `None` if there is none.
    pub fn read(path: &Path, name: &str) -> Result<Option<Self>, RecordError> {
        match read(path, LENGTH_MAX)? {
            Some(text) => Self::parse(&text, name).map(Some),
            None => Ok(None),
        }
    }

    fn parse(text: &[u8], name: &str) -> Result<Self, RecordError> {
        let record: Self = parse(text, SCHEMA)?;
        if record.name != name {
            return Err(RecordError::OtherVm(record.name));
        }
        Ok(record)
    }
}

/// Reads a file of at most `most` bytes, which is no link and nobody else's; `None` if there is none.
pub(super) fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, RecordError> {
    use nix::fcntl::OFlag;
    let io = |e: std::io::Error| RecordError::Io(e.to_string());
    // A link here was put there by somebody else.
    let options = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match nix::fcntl::open(path, options, nix::sys::stat::Mode::empty()) {
        Ok(file) => File::from(file),
        Err(nix::errno::Errno::ENOENT) => return Ok(None),
        Err(error) => return Err(io(error.into())),
    };
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(RecordError::Io("it is no regular file".into()));
    }
    let owner = std::os::unix::fs::MetadataExt::uid(&metadata);
    if owner != nix::unistd::geteuid().as_raw() {
        return Err(RecordError::Io(format!("it belongs to uid {owner}")));
    }
    let mut text = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > most {
        return Err(RecordError::TooLong(most));
    }
    Ok(Some(text))
}

/// Parses a file whose schema has to be `known`, which is looked at before anything else.
pub(super) fn parse<T: DeserializeOwned>(text: &[u8], known: u32) -> Result<T, RecordError> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let damaged = |e: serde_json::Error| RecordError::Damaged(e.to_string());
    let version: Version = serde_json::from_slice(text).map_err(damaged)?;
    if version.schema != known {
        return Err(RecordError::Schema { found: version.schema, known });
    }
    serde_json::from_slice(text).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{machine::Wanted, plan};

    fn record() -> Record {
        let plan = plan::example("builder");
        Record::new("boot", &Life::stopped(Wanted::Running), jiff::Timestamp::now(), &plan)
    }

    #[test]
    fn sv3_a_record_cut_anywhere_is_an_error_never_a_panic_or_a_guess() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(Record::read(&path, "builder").unwrap(), None);
        let record = record();
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path, "builder").unwrap(), Some(record));
        let text = std::fs::read(&path).unwrap();
        for length in 0..text.len() {
            assert!(Record::parse(&text[..length], "builder").is_err(), "cut at {length}");
        }
    }

    #[test]
    fn sv3_a_record_of_another_vm_or_schema_or_behind_a_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        record().write(&path).unwrap();
        assert!(matches!(Record::read(&path, "cache"), Err(RecordError::OtherVm(_))));
        let newer = Record { schema: 99, ..record() };
        assert!(matches!(
            Record::parse(&serde_json::to_vec(&newer).unwrap(), "builder"),
            Err(RecordError::Schema { found: 99, .. })
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Record::read(&link, "builder"), Err(RecordError::Io(_))));
        assert!(matches!(Record::read(directory.path(), "builder"), Err(RecordError::Io(_))));
    }

    #[test]
    fn sv3_a_file_without_end_is_read_to_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        std::fs::write(&path, " ".repeat(100)).unwrap();
        assert!(matches!(read(&path, 99), Err(RecordError::TooLong(99))));
        assert_eq!(read(&path, 100).unwrap().unwrap().len(), 100);
    }
}
