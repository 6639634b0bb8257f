//! The first words on the control channel, which init and agent say alike, and what both take from them.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use lair_guest::wire::{
    VERSION,
    message::{Features, Hello, HelloReply, Phase},
};
use std::{fs, io, time::Duration};

/// How long a peer may take for the first message of a connection, and for a reply.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The guest kernel's boot id.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_string())
}

/// The answer to a greeting. Only a `Welcome` opens the channel.
pub(crate) fn answer(hello: &Hello, boot_id: &str, phase: Phase) -> HelloReply {
    if hello.version == VERSION {
        HelloReply::Welcome {
            version: VERSION,
            boot_id: boot_id.to_string(),
            phase,
            features: Features::OURS,
        }
    } else {
        let host = hello.version;
        HelloReply::Refused {
            reason: format!("The host speaks version {host}, this guest version {VERSION}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    pub(crate) fn hello(version: u32) -> Hello {
        Hello {
            version,
            ticket: "0".repeat(64),
            links_out: vec![],
            links_in: vec![],
            credentials: BTreeMap::new(),
            unix_ms: 0,
            features: Features::default(),
        }
    }

    #[test]
    fn vs7_another_version_is_refused_with_both_numbers() {
        let HelloReply::Refused { reason } = answer(&hello(7), "id", Phase::Agent) else {
            panic!("not refused");
        };
        assert_eq!(reason, "The host speaks version 7, this guest version 1");
        assert!(matches!(
            answer(&hello(VERSION), "id", Phase::Init),
            HelloReply::Welcome { version: VERSION, phase: Phase::Init, boot_id, .. } if boot_id == "id"
        ));
    }
}
