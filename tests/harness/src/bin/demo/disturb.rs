//! What happens to `laird` while the build runs, and what nobody may notice of it.

use crate::job::{BOOT, VMS};
use anyhow::{Context, Result, ensure};
use lair_harness::{host::Host, tree::Random};
use lair_vmm::{api::types::VmStatus, vm::machine::Part};
use std::{
    collections::BTreeMap,
    thread::sleep,
    time::{Duration, Instant},
};

/// What is done to `laird` during the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disturbance {
    /// Nothing.
    None,
    /// It is killed, and started again when the build has ended.
    Kill,
    /// It is killed and started again, so many times in a build that lasts so long.
    Restarts {
        /// How often.
        times: u32,
        /// How long the build lasts.
        seconds: u32,
    },
}

impl Disturbance {
    /// How long the build has to last.
    pub(crate) fn seconds(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Kill => 8,
            Self::Restarts { seconds, .. } => seconds,
        }
    }
}

/// What a restart of `laird` must not change.
#[derive(Debug, PartialEq, Eq)]
struct Lasting {
    state: String,
    /// Its uptime goes on.
    since: String,
    processes: BTreeMap<Part, i32>,
    /// Connections that each link has had: a broken one would be made anew.
    connections: BTreeMap<String, u64>,
}

impl Lasting {
    fn of(vm: &VmStatus) -> Self {
        let connections = vm.counters.iter().map(|link| (link.link.clone(), link.connections));
        Self {
            state: vm.state.clone(),
            since: vm.since.to_string(),
            processes: vm.processes.clone(),
            connections: connections.collect(),
        }
    }

    fn all(host: &Host) -> Result<BTreeMap<String, Self>> {
        Ok(host.status()?.vms.iter().map(|vm| (vm.name.clone(), Self::of(vm))).collect())
    }
}

/// Kills `laird` and starts it again, `times` within `span`, at random. After each start, all is as it was. What happened, in lines.
pub(crate) fn restart(host: &mut Host, times: u32, span: Duration) -> Result<Vec<String>> {
    let mut random = Random(u64::from(std::process::id()));
    let mut said = Vec::new();
    let before = Lasting::all(host)?;
    ensure!(
        VMS.iter().all(|vm| before.get(*vm).is_some_and(|vm| vm.state == "ready")),
        "not ready: {before:?}"
    );
    let slot = span / times.max(1);
    for number in 1..=times {
        // Somewhere in its slot.
        let begin = Instant::now();
        let pause = slot.mul_f64(random.below(1000) as f64 / 1000.0);
        sleep(pause);
        host.kill_laird()?;
        let killed = Instant::now();
        host.start()?;
        let answers = killed.elapsed();
        for vm in VMS {
            host.wait_ready(vm, BOOT)?;
        }
        let now = Lasting::all(host)?;
        ensure!(now == before, "after restart {number}:\n{now:#?}\nbefore:\n{before:#?}");
        said.push(format!(
            "(laird killed and started, {number} of {times}: answers after {} ms, all as before)",
            answers.as_millis()
        ));
        sleep(slot.saturating_sub(begin.elapsed()));
    }
    Ok(said)
}

/// Starts `laird` again, which was killed while the build ran.
pub(crate) fn revive(host: &mut Host) -> Result<()> {
    ensure!(host.status().is_err(), "laird was to be dead until the build had ended");
    host.start().context("Cannot start laird again")?;
    VMS.iter().try_for_each(|vm| host.wait_ready(vm, BOOT).map(drop))
}
