//! Limits of reads and writes are of a disk: where another one is mounted under the volumes, they follow (faults.md, CG5).

use super::Supervisor;
use crate::{
    host::{mounts::Mounts, thread},
    vm::limits,
};
use std::{
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
    while mounts.changed().await.is_ok() {
        sleep(PAUSE).await;
        let Some(supervisor) = supervisor.upgrade() else { return };
        look(&supervisor).await;
    }
}

async fn look(supervisor: &Arc<Supervisor>) {
    let Some(cgroups) = supervisor.host.cgroups.clone() else { return };
    let plans: Vec<_> = supervisor.vms().values().filter_map(|handle| handle.snapshot().plan).collect();
    let followed = thread::run(move || {
        for plan in plans {
            let cgroup = cgroups.vm(&plan.name);
            if let Some(Err(reason)) = limits::follow_io(&cgroup, &plan).filter(|_| cgroup.exists()) {
                tracing::error!(vm = plan.name, "degraded: {reason}");
            }
        }
    });
    if let Err(error) = followed.await {
        tracing::error!(%error, "limits of reads and writes do not follow mounts");
    }
}
