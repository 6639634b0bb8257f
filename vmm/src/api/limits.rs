//! Every bound of the API in one place.

use std::time::Duration;

/// What one client, and all of them, may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a request's head may take to come, and its body as long again. Answers have no deadline.
    pub request: Duration,
    /// The longest head, in bytes. hyper takes nothing below 8 KiB.
    pub head: usize,
    /// Connections of one uid.
    pub per_uid: usize,
    /// Connections of all uids.
    pub total: usize,
    /// How many of them only root and `laird`'s own uid may have, and how many more than [`Self::per_uid`] these may have.
    pub reserved: usize,
    /// How long no connection is accepted after one could not be, as for want of descriptors.
    pub accept_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(5),
            head: 16 << 10,
            per_uid: 128,
            total: 1024,
            reserved: 16,
            accept_pause: Duration::from_millis(100),
        }
    }
}

/// How long a look at the host's devices may take: some milliseconds, unless one of them does not answer.
pub(super) const LOOK: Duration = Duration::from_secs(10);

/// The longest body of a request, in bytes.
pub(super) const BODY: usize = 64 << 10;

/// The longest body of a request with a fleet file in it, in bytes: that file has 1 MiB at most, and a character of it may take
/// several as JSON.
pub(super) const FLEET_BODY: usize = 4 << 20;

/// Records of one uid in the audit log in a second, allowed and refused ones apart; the rest is counted.
pub(super) const AUDIT_EACH_SECOND: u32 = 20;

/// The longest name of a VM in a record, in bytes: that of a VM that there can be.
pub(super) const AUDIT_NAME: usize = 64;

/// Uids, with what they attempt, whose rates are kept apart; all others share one.
pub(super) const AUDIT_UIDS: usize = 256;

/// The size at which the audit log is rotated, in bytes. There are two such files.
pub(super) const AUDIT_FILE: u64 = 16 << 20;

/// Records that wait for the disk.
pub(super) const AUDIT_QUEUE: usize = 4096;

/// How long an answer waits for its record to be on disk.
pub(super) const AUDIT_PATIENCE: Duration = Duration::from_secs(2);

/// The longest text in a record, in bytes: commands, reasons.
pub(super) const AUDIT_TEXT: usize = 4096;

/// The longest line that is read of an audit log, in bytes; a longer one is skipped.
pub(super) const AUDIT_LINE: u64 = 64 << 10;

/// The most records in one answer.
pub(super) const AUDIT_ANSWER: usize = 10_000;

/// Events that are kept for readers that come later or are slow.
pub(super) const EVENTS: usize = 1024;

/// How often files are looked at that are followed.
pub(super) const POLL: Duration = Duration::from_millis(200);

/// The longest wait for a VM, in seconds: a week.
pub(super) const WAIT_SECONDS: u64 = 7 * 24 * 3600;

/// How long one of a VM's processes may take to tell its counters; after that they are left out.
pub(super) const COUNTERS: Duration = Duration::from_millis(500);

/// The longest answer of a store backend's control socket that is read, in bytes.
pub(super) const STORE_STATS: u64 = 256 << 10;

/// Connections to the metrics' TCP address at once, and how long each may take.
pub(super) const SCRAPES: usize = 8;
/// See [`SCRAPES`].
pub(super) const SCRAPE: Duration = Duration::from_secs(10);
