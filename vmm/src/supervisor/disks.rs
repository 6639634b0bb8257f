//! Limits of reads and writes are of a disk: where another one is mounted under the volumes, they follow (faults.md, CG5).

use super::Supervisor;
use crate::{
    host::{mounts::Mounts, thread},
    vm::limits,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::sleep;

/// The pause after a change: mounts come in numbers, and one look does for all of them.
const PAUSE: Duration = Duration::from_secs(1);

/// Looks at the disks of all VMs whenever something is mounted, until the supervisor is gone.
pub(super) async fn follow(supervisor: Weak<Supervisor>) {
    let mounts = match Mounts::watch() {
        Ok(mounts) => mounts,
        Err(error) => return tracing::error!(%error, "limits of reads and writes do not follow mounts"),
    };
    // A busy host mounts all day: what is wrong is told once.
    let mut told = BTreeMap::new();
    while mounts.changed().await.is_ok() {
        sleep(PAUSE).await;
        let Some(supervisor) = supervisor.upgrade() else { return };
        let wrong = look(&supervisor).await;
        for (vm, reason) in wrong.iter().filter(|(vm, reason)| told.get(*vm) != Some(*reason)) {
            tracing::error!(vm, "degraded: {reason}");
        }
        told = wrong;
    }
}

/// Has the limits of all VMs follow their disks. What is wrong with them, by VM.
async fn look(supervisor: &Arc<Supervisor>) -> BTreeMap<String, String> {
    let Some(cgroups) = supervisor.host.cgroups.clone() else { return BTreeMap::new() };
    let plans: Vec<_> = supervisor.vms().values().filter_map(|handle| handle.snapshot().plan).collect();
    let followed = thread::run(move || {
        let wrong = plans.into_iter().filter_map(|plan| {
            let cgroup = cgroups.vm(&plan.name);
            let reason = limits::follow_io(&cgroup, &plan).filter(|_| cgroup.exists())?.err()?;
            Some((plan.name.clone(), reason))
        });
        wrong.collect()
    });
    followed.await.unwrap_or_else(|error| {
        tracing::error!(%error, "limits of reads and writes do not follow mounts");
        BTreeMap::new()
    })
}
