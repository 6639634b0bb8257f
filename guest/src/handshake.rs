//! The first words on the control channel, which init and agent say alike, and what both take from them.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use lair_guest::wire::{
    VERSION,
    message::{Hello, HelloReply, Phase},
};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use std::{
    fs, io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long a peer may take for the first message of a connection, and for a reply.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The guest kernel's boot id.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_string())
}

/// The answer to a greeting. Only a `Welcome` opens the channel.
pub(crate) fn answer(hello: &Hello, boot_id: &str, phase: Phase) -> HelloReply {
    if hello.version == VERSION {
        HelloReply::Welcome { version: VERSION, boot_id: boot_id.to_string(), phase }
    } else {
        let host = hello.version;
        HelloReply::Refused {
            reason: format!("The host speaks version {host}, this guest version {VERSION}"),
        }
    }
}

/// Sets the clock to the host's if it is off by more than two seconds. A guest without a time server has no
/// better one; failure to set it is not worth a boot.
pub(crate) fn set_clock(host_unix_ms: u64) {
    const TOLERANCE: u64 = 2_000;
    if host_unix_ms.abs_diff(unix_ms()) > TOLERANCE
        && let Some(time) = to_timespec(host_unix_ms)
    {
        let _ = clock_settime(ClockId::CLOCK_REALTIME, time);
    }
}

fn to_timespec(unix_ms: u64) -> Option<TimeSpec> {
    // Before 2001 or beyond 2200 the host is wrong, not the guest.
    (1_000_000_000_000..7_258_118_400_000)
        .contains(&unix_ms)
        .then(|| TimeSpec::from_duration(Duration::from_millis(unix_ms)))
}

/// The guest's clock, milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
            HelloReply::Welcome { version: VERSION, phase: Phase::Init, boot_id } if boot_id == "id"
        ));
    }

    #[test]
    fn a_senseless_clock_is_not_taken_over() {
        assert!(to_timespec(0).is_none());
        assert!(to_timespec(u64::MAX).is_none());
        assert_eq!(to_timespec(1_700_000_000_123).unwrap().tv_sec(), 1_700_000_000);
    }
}
