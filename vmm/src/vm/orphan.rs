//! Processes of ours that no record names: those that an earlier `laird` had started and could not write down any more.
//!
//! Everything that is started for a VM has three variables in its environment, which its children inherit and nobody else has. Without
//! them no process is ever touched.

use crate::host::{
    process::{self, Process, ProcessId},
    thread,
};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::timeout;

/// The VM's name.
const VM: &str = "LAIR_VM";
/// The VM's run directory, by which VMs of different `laird`s are told apart.
const RUN: &str = "LAIR_RUN";
/// What the process is for.
const PART: &str = "LAIR_PART";

/// The longest environment that is read, in bytes. The kernel's own limit for arguments and environment is below it.
const ENVIRON_MAX: u64 = 8 << 20;

/// How many processes one sweep may end. More than a VM's few parts and their children would be a mistake of ours.
pub const BUDGET: usize = 64;

/// The variables for a process of the VM `vm`.
pub fn tags(vm: &str, run: &Path, part: &str) -> Vec<(&'static str, String)> {
    vec![(VM, vm.into()), (RUN, run.to_string_lossy().into_owned()), (PART, part.into())]
}

/// A running process with our variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tagged {
    /// The process.
    pub id: ProcessId,
    /// Its process group. Each part leads its own, so a child of a part is in the part's.
    pub group: i32,
    /// The VM.
    pub vm: String,
    /// The VM's run directory.
    pub run: PathBuf,
    /// What it is for.
    pub part: String,
}

impl std::fmt::Display for Tagged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.id.pid, self.part)
    }
}

/// [`tagged`], on a thread. Where there is none it is done at once: what runs must not pass for gone.
pub async fn look(below: PathBuf) -> Vec<Tagged> {
    let path = below.clone();
    match thread::run(move || tagged(&path)).await {
        Ok(found) => found,
        Err(_) => tagged(&below),
    }
}

/// All running processes with our variables whose run directory is `below` or in it. Another user's environment is closed to all but
/// root, and so are their processes to us.
pub fn tagged(below: &Path) -> Vec<Tagged> {
    let own = std::process::id().cast_signed();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| *pid != own)
        .filter_map(look_at)
        .filter(|tagged| tagged.run.starts_with(below))
        .collect()
}

fn look_at(pid: i32) -> Option<Tagged> {
    // Before the environment: if the number passes to another process in between, the start time is the former's, and nobody
    // has it any more.
    let start_time = process::start_time(pid).ok()?;
    let mut environ = Vec::new();
    File::open(format!("/proc/{pid}/environ")).ok()?.take(ENVIRON_MAX).read_to_end(&mut environ).ok()?;
    let value = |name: &str| {
        environ.split(|byte| *byte == 0).find_map(|variable| {
            let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            Some(std::ffi::OsStr::from_bytes(value).to_owned())
        })
    };
    let number = nix::unistd::Pid::from_raw(pid);
    Some(Tagged {
        id: ProcessId { pid, start_time },
        group: nix::unistd::getpgid(Some(number)).ok()?.as_raw(),
        vm: value(VM)?.into_string().ok()?,
        run: value(RUN)?.into(),
        part: value(PART)?.into_string().ok()?,
    })
}

/// Those of `tagged` that no record names, neither themselves nor by the group that they are in.
pub fn unnamed(tagged: Vec<Tagged>, named: &BTreeSet<i32>) -> Vec<Tagged> {
    tagged.into_iter().filter(|one| !named.contains(&one.id.pid) && !named.contains(&one.group)).collect()
}

/// Ends these processes, first by SIGTERM, then by SIGKILL, each with as much patience; at most [`BUDGET`] of them. Returns those that
/// still run.
pub async fn end(mut processes: Vec<Tagged>, patience: Duration) -> Vec<Tagged> {
    let mut left = if processes.len() > BUDGET { processes.split_off(BUDGET) } else { vec![] };
    let ended = processes.into_iter().map(|tagged| async move {
        // It is gone if it cannot be found with its start time.
        let Ok(process) = Process::adopt(tagged.id) else { return None };
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            process.signal(signal);
            if timeout(patience, process.ended()).await.is_ok() {
                return None;
            }
        }
        Some(tagged)
    });
    let mut tasks: tokio::task::JoinSet<_> = ended.collect();
    while let Some(outcome) = tasks.join_next().await {
        left.extend(outcome.ok().flatten());
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{
        confine::Confinement,
        process::{Launch, Sink},
    };

    const PATIENCE: Duration = Duration::from_secs(20);

    fn sleep(directory: &Path, script: &str, environment: Vec<(&'static str, String)>) -> Process {
        let arguments = vec!["-c".into(), script.into()];
        let output = Sink::File(directory.join("log"));
        let confinement = Confinement::default();
        let launch = Launch { program: "/bin/sh".into(), arguments, environment, output, confinement };
        Process::spawn(&launch).unwrap()
    }

    #[tokio::test]
    async fn sv1_only_what_has_our_tag_is_found_and_ended() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("vms");
        let other = sleep(directory.path(), "exec sleep 600", vec![]);
        let foreign = sleep(directory.path(), "exec sleep 600", tags("a", Path::new("/elsewhere"), "shim"));
        let recorded = sleep(directory.path(), "sleep 600; :", tags("a", &run.join("a"), "shim"));
        let orphan = sleep(directory.path(), "trap '' TERM; sleep 600; :", tags("b", &run.join("b"), "mkfs"));
        // A child of each is there as well.
        let all = loop {
            let all = tagged(&run);
            if all.len() == 4 {
                break all;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let orphans = unnamed(all, &BTreeSet::from([recorded.id().pid]));
        assert!(orphans.iter().all(|one| one.vm == "b" && one.group == orphan.id().pid), "{orphans:?}");
        assert_eq!(orphans.len(), 2);
        let left = end(orphans, Duration::from_millis(200)).await;
        assert_eq!(left, []);
        assert_eq!(timeout(PATIENCE, orphan.ended()).await.unwrap(), "killed by SIGKILL");
        for process in [other, foreign, recorded] {
            assert!(Process::adopt(process.id()).is_ok());
            for one in tagged(&run).iter().filter(|one| one.group == process.id().pid) {
                Process::adopt(one.id).unwrap().signal(Signal::SIGKILL);
            }
            process.signal(Signal::SIGKILL);
        }
    }

    #[tokio::test]
    async fn hv9_a_pid_that_is_anothers_now_is_not_signalled() {
        let directory = tempfile::tempdir().unwrap();
        let process = sleep(directory.path(), "exec sleep 600", vec![]);
        let id = ProcessId { start_time: process.id().start_time - 1, ..process.id() };
        let reused = Tagged { id, group: id.pid, vm: "a".into(), run: "/r".into(), part: "shim".into() };
        assert_eq!(end(vec![reused], PATIENCE).await, []);
        assert!(Process::adopt(process.id()).is_ok());
        process.signal(Signal::SIGKILL);
        assert_eq!(timeout(PATIENCE, process.ended()).await.unwrap(), "killed by SIGKILL");
    }

    #[tokio::test]
    async fn sv1_a_sweep_has_a_budget() {
        let id = ProcessId { pid: i32::MAX, start_time: 0 };
        let gone = Tagged { id, group: 0, vm: "a".into(), run: "/r".into(), part: "shim".into() };
        let left = end(vec![gone; BUDGET + 3], PATIENCE).await;
        assert_eq!(left.len(), 3);
    }
}
