//! What `laird` takes of the host with many VMs. It is the real one; the programs that it starts are real processes with real sockets,
//! and stand-ins (see [`super::stand_in`]).

use super::usage::{Usage, usage};
use crate::statistics::median;
use anyhow::{Context, Result, bail, ensure};
use lair_harness::{
    fleet::{self, mib},
    host::Host,
    testbed::Testbed,
};
use lair_vmm::{fleet::schema::Restart, host::tools};
use serde::Serialize;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

/// How long all may take to be ready.
const PATIENCE: Duration = Duration::from_secs(600);

/// The threads on which `laird` does what blocks end after 10 s without work (tokio's `thread_keep_alive`).
const REST: Duration = Duration::from_secs(13);

/// What a start and an answer took for a moment is given back after a second.
const SETTLED: Duration = Duration::from_secs(3);

/// What `laird` took with so many VMs.
#[derive(Debug, Serialize)]
pub(crate) struct FleetRow {
    pub(crate) vms: usize,
    /// From `vmctl start` of all until all are ready.
    pub(crate) start_ms: u64,
    /// `vmctl --json status`.
    pub(crate) status_ms: u64,
    /// When all are ready, a moment later.
    pub(crate) at_ready: Usage,
    /// When nothing has happened for a while.
    pub(crate) at_rest: Usage,
    /// How long nothing happened then.
    pub(crate) seconds: f64,
    /// CPU time in it.
    pub(crate) idle_cpu_us: u64,
    /// How often a thread of it was woken in it.
    pub(crate) wakes: u64,
}

impl FleetRow {
    /// Resident memory, the most of both.
    pub(crate) fn resident(&self) -> u64 {
        self.at_ready.rss_bytes.max(self.at_rest.rss_bytes)
    }
}

/// Starts so many, and looks at `laird` while it is idle for so long.
pub(super) fn measure(testbed: &Testbed, vms: usize, seconds: u64) -> Result<FleetRow> {
    let directory = std::env::temp_dir().join(format!("lair-vms-{}", std::process::id()));
    let programs = directory.join("bin");
    fs::create_dir_all(&programs)?;
    let installed = std::env::var_os("LAIR_BIN").context("LAIR_BIN is not set")?;
    install(Path::new(&installed), &programs)?;
    let mut host = Host::with_programs(&directory, &programs)?.run_in_memory("vms");
    let mut fleet = fleet::empty(testbed);
    let names: Vec<_> = (0..vms).map(|number| format!("vm-{number}")).collect();
    for name in &names {
        let mut vm = fleet::vm(testbed, &["profile-plain"])?;
        (vm.memory, vm.autostart, vm.restart) = (mib(64), false, Restart::Never);
        fleet.vms.insert(name.clone(), vm);
    }
    host.write_fleet(&fleet)?;
    host.start()?;
    let began = Instant::now();
    let mut start = vec!["start"];
    start.extend(names.iter().map(String::as_str));
    host.run_vmctl(&start)?;
    loop {
        let status = host.status()?;
        if status.vms.iter().all(|vm| vm.state == "ready") {
            break;
        }
        let failed = status.vms.iter().find(|vm| matches!(vm.state.as_str(), "failed" | "quarantined"));
        if let Some(failed) = failed {
            bail!("{} is {}: {:?}\n{}", failed.name, failed.state, failed.detail, host.laird_log());
        }
        if began.elapsed() > PATIENCE {
            bail!("Not all are ready:\n{}", host.laird_log());
        }
        // Rare enough to disturb little.
        sleep(Duration::from_millis(100));
    }
    let start_ms = u64::try_from(began.elapsed().as_millis())?;
    let laird = host.laird_pid().context("laird does not run")?;
    sleep(SETTLED);
    let at_ready = usage(laird)?;
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut status = host.vmctl(&["--json", "status"]);
        let began = Instant::now();
        let output = status.output().context("Cannot run vmctl")?;
        times.push(u64::try_from(began.elapsed().as_millis())?);
        ensure!(output.status.success(), "vmctl status: {}", String::from_utf8_lossy(&output.stderr));
    }
    sleep(REST.saturating_add(SETTLED));
    let (before, began) = (usage(laird)?, Instant::now());
    sleep(Duration::from_secs(seconds));
    let at_rest = usage(laird)?;
    let row = FleetRow {
        vms,
        start_ms,
        status_ms: median(times),
        at_ready,
        at_rest,
        seconds: began.elapsed().as_secs_f64().round(),
        idle_cpu_us: at_rest.cpu_us.saturating_sub(before.cpu_us),
        wakes: at_rest.switches.saturating_sub(before.switches),
    };
    let mut kill = vec!["kill"];
    kill.extend(names.iter().map(String::as_str));
    host.run_vmctl(&kill)?;
    host.stop()?;
    Ok(row)
}

/// Makes a directory with Lair's programs of which those that serve a VM are stand-ins.
fn install(installed: &Path, programs: &Path) -> Result<()> {
    // It looks for the others where it is itself, so a link to it would find the real ones.
    fs::copy(installed.join("laird"), programs.join("laird")).context("Cannot copy laird")?;
    for name in ["vmctl", tools::GUEST.name] {
        symlink(installed.join(name), programs.join(name))?;
    }
    let own = std::env::current_exe()?;
    for tool in [tools::QEMU, tools::VHOST_DEVICE_VSOCK, tools::VIRTIOFS, tools::SHIM] {
        // The indexer is not a program of a VM that runs.
        let real = installed.join(tools::VIRTIOFS.name);
        let index = format!("if [ \"$1\" = index ]; then exec '{}' \"$@\"; fi\n", real.display());
        let script = format!(
            "#!/bin/sh\n{}exec '{}' stand-in {} \"$@\"\n",
            if tool == tools::VIRTIOFS { index } else { String::new() },
            own.display(),
            tool.name
        );
        let file = programs.join(tool.name);
        fs::write(&file, script)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
