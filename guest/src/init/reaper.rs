//! PID 1 of a guest without an init of its own: keeps the agent running, reaps what others leave, ends the guest.
//!
//! | signal | from | what happens |
//! |---|---|---|
//! | SIGCHLD | the kernel | every ended process is reaped; an agent that ended is started again |
//! | SIGUSR2 | the agent | all ends, power off |
//! | SIGTERM | the agent | all ends, reboot |
//! | SIGINT | the kernel (ctrl-alt-del) | as SIGTERM |
//!
//! The agent's services are its children. When it ends, everything else is ended too, because the next agent
//! starts them anew. Nothing here waits without a bound but the wait for a signal.

use super::{end, say};
use crate::paths::PROGRAM;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        reboot::{RebootMode, set_cad_enabled},
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sync},
};
use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// How long programs may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// The shortest and the longest wait before the agent is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Runs until the guest ends.
pub(super) fn run() -> ! {
    let _ = set_cad_enabled(false);
    let signals = [Signal::SIGCHLD, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGINT];
    let signals: SigSet = signals.into_iter().collect();
    // Children inherit this; the agent lifts it for itself and for all that it starts.
    let _ = signals.thread_block();

    let mut back_off = BACK_OFF.0;
    let mut started = Instant::now();
    let mut agent = start_agent();
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {}
            Ok(Signal::SIGUSR2) => stop(RebootMode::RB_POWER_OFF),
            Ok(Signal::SIGTERM | Signal::SIGINT) => stop(RebootMode::RB_AUTOBOOT),
            _ => continue,
        }
        if reap(agent) == Agent::Runs {
            continue;
        }
        say("the agent ended; it is started again, with all services");
        end_processes();
        back_off = next_back_off(back_off, started.elapsed());
        thread::sleep(back_off);
        started = Instant::now();
        agent = start_agent();
    }
}

fn next_back_off(last: Duration, ran: Duration) -> Duration {
    if ran > Duration::from_secs(60) { BACK_OFF.0 } else { (last * 2).min(BACK_OFF.1) }
}

/// The agent's process id. Without one the machine is of no use, and ends.
fn start_agent() -> Pid {
    match Command::new(PROGRAM).arg("agent").spawn() {
        Ok(child) => Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)),
        Err(error) => {
            say(&format!("could not start the agent `{PROGRAM}`: {error}"));
            stop(RebootMode::RB_POWER_OFF)
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Agent {
    Runs,
    Ended,
}

/// Reaps all that has ended by now.
fn reap(agent: Pid) -> Agent {
    let mut state = Agent::Runs;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return state,
            Ok(status) if status.pid() == Some(agent) => state = Agent::Ended,
            Ok(_) | Err(Errno::EINTR) => {}
            // ECHILD: there is no process at all.
            Err(_) => return Agent::Ended,
        }
    }
}

/// Ends every process but this one: SIGTERM, then SIGKILL for what is left.
fn end_processes() {
    let everyone = Pid::from_raw(-1);
    let _ = kill(everyone, Signal::SIGTERM);
    // A stopped process would not see SIGTERM.
    let _ = kill(everyone, Signal::SIGCONT);
    if !all_gone(GRACE) {
        let _ = kill(everyone, Signal::SIGKILL);
        all_gone(Duration::from_secs(2));
    }
}

/// Reaps until no process is left, at most for `wait`.
fn all_gone(wait: Duration) -> bool {
    let deadline = Instant::now() + wait;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) if Instant::now() >= deadline => return false,
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
    }
}

fn stop(how: RebootMode) -> ! {
    end_processes();
    sync();
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for point in to_unmount(&table) {
        if umount2(point.as_str(), MntFlags::UMOUNT_NOFOLLOW).is_err() {
            // Below an overlay, for instance. Read-only it is as safe.
            let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            let _ = mount(None::<&str>, point.as_str(), None::<&str>, read_only, None::<&str>);
        }
    }
    end(how)
}

/// The mount points of disks and what lies over them, the newest first, so that what is mounted in another mount
/// goes before it.
fn to_unmount(table: &str) -> Vec<String> {
    let points = table.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        matches!(kind, "ext4" | "overlay" | "virtiofs").then(|| unescape(point))
    });
    let mut points: Vec<_> = points.collect();
    points.reverse();
    points
}

/// The kernel writes blanks in this table as octal numbers.
fn unescape(point: &str) -> String {
    point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_unmounted_from_the_top() {
        let table = "proc /proc proc rw 0 0\n/dev/vda /var/my\\040data ext4 rw 0 0\nstore /run/lair/store virtiofs ro 0 0\n\
                     store /nix/store overlay rw 0 0\nroot / tmpfs rw 0 0\nbroken\n";
        assert_eq!(to_unmount(table), ["/nix/store", "/run/lair/store", "/var/my data"]);
    }

    #[test]
    fn vs7_an_agent_that_keeps_ending_is_started_ever_more_slowly() {
        let mut wait = BACK_OFF.0;
        for _ in 0..20 {
            wait = next_back_off(wait, Duration::from_secs(1));
        }
        assert_eq!(wait, BACK_OFF.1);
        assert_eq!(next_back_off(wait, Duration::from_secs(61)), BACK_OFF.0);
    }
}
