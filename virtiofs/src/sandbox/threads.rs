//! Whether this is the only thread.

use super::SandboxError;
use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// How long a thread that was joined may still be seen by the kernel.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait before looking again.
const PAUSE: Duration = Duration::from_micros(50);

/// Succeeds if the process has no thread but the caller's.
pub(super) fn only_this_one() -> Result<(), SandboxError> {
    let begin = Instant::now();
    loop {
        let threads = fs::read_dir("/proc/self/task").map_err(SandboxError::Proc)?.count();
        if threads <= 1 {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            return Err(SandboxError::Threads(threads));
        }
        thread::sleep(PAUSE);
    }
}
