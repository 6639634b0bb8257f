//! What a process has used of the machine, read from `/proc`.

use anyhow::{Context, Result};
use lair_harness::process::kib;
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use serde::Serialize;
use std::{fs, time::Duration};

/// What a process has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// Resident memory, all of it.
    pub(crate) rss_bytes: u64,
    /// Anonymous memory that is resident.
    pub(crate) rss_anon_bytes: u64,
    /// Pages of files that are resident, most of them the program's own.
    pub(crate) rss_file_bytes: u64,
    /// The most resident memory that it ever had.
    pub(crate) peak_bytes: u64,
    /// Threads.
    pub(crate) threads: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
    /// CPU time.
    pub(crate) cpu_us: u64,
    /// How often its threads that live have slept and been woken.
    pub(crate) switches: u64,
}

/// What the process `pid` has used until now.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("Process {pid} is gone"))?;
    let mut switches = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // One that has ended meanwhile counts as little as one that ended before.
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        switches += number(&status, "voluntary_ctxt_switches:").unwrap_or_default();
    }
    let cpu: Duration = clock_gettime(clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?)?.into();
    Ok(Usage {
        rss_bytes: kib(&status, "VmRSS:")?,
        rss_anon_bytes: kib(&status, "RssAnon:")?,
        rss_file_bytes: kib(&status, "RssFile:")?,
        peak_bytes: kib(&status, "VmHWM:")?,
        threads: number(&status, "Threads:")?,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
        cpu_us: u64::try_from(cpu.as_micros())?,
        switches,
    })
}

fn number(status: &str, key: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("No {key}"))?;
    line.trim().parse().with_context(|| format!("{key}{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_and_working_are_seen() {
        let own = std::process::id();
        let before = usage(own).unwrap();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let after = usage(own).unwrap();
        assert!(after.switches >= before.switches + 20, "{before:?} {after:?}");
        assert!(after.rss_bytes > 0 && after.rss_anon_bytes < after.rss_bytes && after.threads > 0);
        assert!(
            after.peak_bytes >= after.rss_bytes && after.cpu_us >= before.cpu_us && after.descriptors > 2
        );
    }
}
