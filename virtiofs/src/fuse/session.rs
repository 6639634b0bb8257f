//! The little that is remembered between requests.

use super::wire::flag;
use std::sync::atomic::{AtomicU8, Ordering};

/// Where a mount stands. A connection's device has one.
///
/// Replies do not depend on what INIT negotiated, with one exception: to a guest that cannot do without OPEN, OPEN gives
/// a real answer. No Linux with virtiofs is such a guest, so a session that resumes takes it that the guest can.
#[derive(Debug, Default)]
pub struct Session(AtomicU8);

const LIVE: u8 = 1;
const DESTROYED: u8 = 2;
const NEEDS_OPEN: u8 = 4;
const NEEDS_OPENDIR: u8 = 8;

impl Session {
    /// A session without INIT, which it needs before anything else.
    pub fn new() -> Self {
        Self::default()
    }

    /// The device was in use before this connection, so that INIT was seen by an earlier one. Not after DESTROY.
    pub fn resume(&self) {
        let _ = self.0.compare_exchange(0, LIVE, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(super) fn start(&self, offered: u64) {
        let needs = |flag, bit| if offered & flag == 0 { bit } else { 0 };
        let state =
            LIVE | needs(flag::NO_OPEN_SUPPORT, NEEDS_OPEN) | needs(flag::NO_OPENDIR_SUPPORT, NEEDS_OPENDIR);
        self.0.store(state, Ordering::Relaxed);
    }

    pub(super) fn destroy(&self) {
        self.0.store(DESTROYED, Ordering::Relaxed);
    }

    /// Whether requests are served.
    pub fn is_live(&self) -> bool {
        self.has(LIVE)
    }

    pub(super) fn needs_open(&self) -> bool {
        self.has(NEEDS_OPEN)
    }

    pub(super) fn needs_opendir(&self) -> bool {
        self.has(NEEDS_OPENDIR)
    }

    fn has(&self, bit: u8) -> bool {
        self.0.load(Ordering::Relaxed) & bit != 0
    }
}
