//! Starts of one guest in pairs: by `vmctl start`, and by hand.

use super::{StepRow, by_hand::Recipe};
use crate::note;
use anyhow::{Context, Result, ensure};
use lair_harness::{fleet, host::Host, testbed::Testbed};
use lair_vmm::{
    fleet::schema::Restart,
    shim::{client, protocol::AgentState},
    vm::{record::Record, trace},
};
use serde::Serialize;
use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};
use tokio::{runtime::Runtime, time::timeout};

/// The VM that is started.
const VM: &str = "bench";

/// How long a start, or an end, may take under emulation.
const PATIENCE: Duration = Duration::from_secs(300);

/// The pause between two looks at what is waited for.
pub(super) const POLL: Duration = Duration::from_millis(1);

/// When a start came how far, in milliseconds from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Start {
    /// The guest's processors run.
    pub(crate) runs_ms: f64,
    /// The shim says that the agent is ready.
    pub(crate) ready_ms: f64,
}

/// Two starts, one after the other.
#[derive(Debug, Serialize)]
pub(crate) struct Pair {
    pub(crate) laird: Start,
    pub(crate) by_hand: Start,
    /// `laird`'s steps in the former.
    pub(crate) steps: Vec<StepRow>,
}

/// Takes this many pairs.
pub(super) fn measure(testbed: &Testbed, count: usize) -> Result<Vec<Pair>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut host = Host::temporary("boot")?.run_in_memory("boot");
    let mut fleet = fleet::empty(testbed);
    let mut vm = fleet::vm(testbed, &["profile-plain"])?;
    (vm.autostart, vm.restart) = (false, Restart::Never);
    fleet.vms.insert(VM.into(), vm);
    host.write_fleet(&fleet)?;
    host.start()?;
    note("a start that does not count: its programs are those that are started by hand");
    by_laird(&host, &runtime)?;
    let record = Record::read(&host.run_file(VM, "state.json"), VM)?.context("laird has no record of it")?;
    let recipe = Recipe::of(&record)?;
    end(&host)?;
    let mut pairs = Vec::new();
    for number in 1..=count {
        // Whoever is first may find the caches less warm.
        let laird_first = number % 2 == 1;
        let early = if laird_first { None } else { Some(recipe.start(&runtime)?) };
        let (laird, steps) = by_laird(&host, &runtime)?;
        end(&host)?;
        let by_hand = early.map_or_else(|| recipe.start(&runtime), Ok)?;
        note(&format!(
            "pair {number} of {count}: {:.0} ms by laird, {:.0} ms by hand",
            laird.ready_ms, by_hand.ready_ms
        ));
        pairs.push(Pair { laird, by_hand, steps });
    }
    host.stop()?;
    Ok(pairs)
}

/// By `vmctl start`.
fn by_laird(host: &Host, runtime: &Runtime) -> Result<(Start, Vec<StepRow>)> {
    let control = host.run_file(VM, "control.sock");
    let (began, began_ms) = (Instant::now(), trace::now_ms());
    let mut vmctl = host.vmctl(&["start", VM]).spawn().context("Cannot run vmctl")?;
    let ready = ready(runtime, &control);
    let ready_ms = began.elapsed().as_secs_f64() * 1e3;
    ensure!(vmctl.wait()?.success(), "vmctl start failed:\n{}", host.laird_log());
    ready.with_context(|| host.laird_log())?;
    // Not before: it would be asked while it works.
    let status = host.wait_ready(VM, PATIENCE)?;
    let spans = status.trace.iter().filter_map(|point| Some((point, point.span?)));
    let steps: Vec<_> = spans
        .map(|(point, span)| StepRow {
            step: point.name.clone(),
            worked_us: span.worked_us,
            waited_us: span.waited_us,
        })
        .collect();
    ensure!(steps.last().is_some_and(|step| step.step == "ready"), "laird's trace is not whole: {steps:?}");
    let record = Record::read(&host.run_file(VM, "state.json"), VM)?.context("laird has no record of it")?;
    let resumed = record.start.0.iter().find(|mark| mark.name == "resume").context("no step resume")?;
    Ok((Start { runs_ms: resumed.at_ms.saturating_sub(began_ms) as f64, ready_ms }, steps))
}

/// Waits until the shim behind `control`, which may not be there yet, says that the agent is ready.
pub(super) fn ready(runtime: &Runtime, control: &Path) -> Result<()> {
    let ready = async {
        while !control.exists() {
            tokio::time::sleep(POLL).await;
        }
        let mut changes = loop {
            match client::watch(control).await {
                Ok(changes) => break changes,
                Err(_) => tokio::time::sleep(POLL).await,
            }
        };
        while let Some(status) = changes.next().await? {
            if matches!(status.agent, AgentState::Ready { .. }) {
                return Ok(());
            }
        }
        anyhow::bail!("The shim has ended")
    };
    runtime.block_on(async { timeout(PATIENCE, ready).await }).context("The guest is not ready in time")?
}

/// Ends the VM by `laird`.
fn end(host: &Host) -> Result<()> {
    host.run_vmctl(&["kill", VM])?;
    host.wait_for(VM, PATIENCE, |status| status.state == "stopped")?;
    // What it has written is not for the next start to wait for.
    sleep(Duration::from_millis(100));
    Ok(())
}
