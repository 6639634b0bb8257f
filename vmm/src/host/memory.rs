//! How this process takes memory from the system, and gives it back. What comes of it is measured by `tests/bench boot`.

#![allow(unsafe_code)] // The allocator is told by C functions.

use std::time::Duration;
use tokio::{sync::Notify, time::sleep};

/// The pause after a use before what is free is given back: more of the kind often follows.
const SOON: Duration = Duration::from_secs(1);

static USED: Notify = Notify::const_new();

/// Has the allocator give large pieces back at once, and keep all others in one place.
///
/// glibc (mallopt(3)) would otherwise give threads arenas of their own, eight for each processor, which keep what they had; and once a
/// large piece has been given back it would take the next one of that size from an arena as well. With 100 VMs that is ten times
/// what `laird` needs. Another C library does as it likes.
pub fn set_up() {
    #[cfg(target_env = "gnu")]
    {
        use nix::libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, mallopt};
        /// Larger pieces are mapped each by itself: glibc's own first threshold, in bytes.
        const LARGE: i32 = 128 << 10;
        for (parameter, value) in [(M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE)] {
            // SAFETY: It may be called at any time; it takes two numbers, and changes nothing that has been allocated.
            unsafe { mallopt(parameter, value) };
        }
    }
}

/// Memory was used for a moment: a step of a start, an answer. What is free is given back soon.
pub fn used() {
    USED.notify_one();
}

/// Gives back what is free, soon after each use. Nothing happens where nothing was used.
pub async fn give_back() {
    loop {
        USED.notified().await;
        sleep(SOON).await;
        trim();
    }
}

/// Gives back what is free: also the holes among what is in use, which the allocator keeps otherwise (malloc_trim(3)).
fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: It may be called at any time, and touches only what nobody has.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
