//! What is wanted of a VM and what it has been through, in its lasting directory: it outlives the VM, `laird` and the host's boot.

use super::{
    machine::{Life, Wanted},
    record::{self, RecordError},
};
use crate::state::file::{self, WriteError};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The version of the format.
const SCHEMA: u32 = 1;

/// The longest file that is read, in bytes; a real one has a few hundred.
const LENGTH_MAX: u64 = 1 << 16;

/// A VM's life as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lasting {
    /// The version of the format.
    pub schema: u32,
    /// The boot of the host's kernel in which it was written.
    pub boot_id: String,
    /// The life.
    pub life: Life,
}

impl Lasting {
    /// Reads it; `None` if there is none, because the VM was never asked to start or stop.
    pub fn read(path: &Path) -> Result<Option<Self>, RecordError> {
        let Some(text) = record::read(path, LENGTH_MAX)? else { return Ok(None) };
        record::parse(&text, SCHEMA).map(Some)
    }

    /// The life with which a VM begins of which nothing was recorded to run in the boot `boot_id`.
    pub fn life_in(self, boot_id: &str) -> Life {
        if self.boot_id == boot_id {
            return self.life;
        }
        // Nothing of an earlier boot runs, and its failures may have ended with it.
        Life { last_stop: self.life.last_stop, ..Life::stopped(self.life.wanted) }
    }
}

/// Replaces what is kept of `life`. Its directory is made if it is missing.
pub fn write(path: &Path, boot_id: &str, life: &Life) -> Result<(), WriteError> {
    let lasting = Lasting { schema: SCHEMA, boot_id: boot_id.into(), life: life.lasting() };
    file::replace_json(path, &lasting, 0o600)
}

/// What is wanted, if that was ever said.
pub fn wanted(lasting: Option<&Lasting>, autostart: bool) -> Wanted {
    match lasting {
        Some(lasting) => lasting.life.wanted,
        None if autostart => Wanted::Running,
        None => Wanted::Stopped,
    }
}
