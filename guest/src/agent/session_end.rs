//! Ends all processes of a session: a shell puts its jobs into process groups of their own, and a signal to one group
//! would leave the others.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{fs, time::Duration};
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

/// How long a command may take to end after SIGHUP.
const GRACE: Duration = Duration::from_secs(2);

/// How often SIGKILL is sent: a process may fork between the look at `/proc` and its signal.
const ROUNDS: usize = 20;

/// Between two of them.
const PAUSE: Duration = Duration::from_millis(20);

/// Ends the command, the leader of session `session`, and all of that session. A process that has made itself a session
/// of its own wants to stay.
pub(super) async fn end(child: &mut Child, session: u32) {
    signal(session, &[Signal::HUP, Signal::CONT]);
    let _ = timeout(GRACE, child.wait()).await;
    for _ in 0..ROUNDS {
        if signal(session, &[Signal::KILL]) == 0 {
            break;
        }
        sleep(PAUSE).await;
    }
    // A process that hangs in the kernel is reaped by the runtime when it comes out.
    let _ = timeout(GRACE, child.wait()).await;
}

/// Sends `signals` to all processes of the session; how many there were.
fn signal(session: u32, signals: &[Signal]) -> usize {
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    let mut found: usize = 0;
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw)
        else {
            continue;
        };
        // First the descriptor, then the look: what is seen and what is signalled are the same process.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // A program's name need not be text.
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        if session_of(&String::from_utf8_lossy(&stat)) == Some(session) {
            found = found.saturating_add(1);
            for signal in signals {
                // It may have ended meanwhile.
                let _ = pidfd_send_signal(&process, *signal);
            }
        }
    }
    found
}

/// The session in `/proc/PID/stat` (proc_pid_stat(5), the sixth field). `None` for a process that has ended and only waits for its parent.
fn session_of(stat: &str) -> Option<u32> {
    // The second field is the program's name, in which anything may be.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_whose_name_is_no_text_is_found() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt, process::Stdio};
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(OsStr::from_bytes(b"\xff\xfe) Z"));
        std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        let mut command = tokio::process::Command::new(&program);
        command.args(["-c", "read line"]).stdin(Stdio::piped()).kill_on_drop(true);
        crate::sys::isolate(&mut command, None);
        let mut child = command.spawn().unwrap();
        let session = child.id().unwrap();
        assert_eq!(signal(session, &[]), 1);
        end(&mut child, session).await;
        assert!(child.try_wait().unwrap().is_some(), "It was not ended");
    }

    #[test]
    fn a_programs_name_cannot_forge_its_session() {
        assert_eq!(session_of("7 (sh) S 1 7 7 0 -1 4194304"), Some(7));
        assert_eq!(session_of("7 (a) S 1 2 3 (b) S 1 7 9 0"), Some(9));
        assert_eq!(session_of("7 (sh) Z 1 7 7 0"), None);
        assert_eq!(session_of("7 (sh"), None);
        assert_eq!(session_of(""), None);
    }
}
