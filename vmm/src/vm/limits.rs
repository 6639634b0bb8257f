//! What happens to a VM's limits while it runs.

use super::plan::Plan;
use crate::{
    cgroup::{Event, VmCgroup, Watcher, values::Values},
    error::chain,
    host::facts::Engine,
};
use std::sync::Arc;
use tokio::sync::{Notify, broadcast};

/// What happened to the cgroup of which VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// The VM.
    pub vm: String,
    /// What.
    pub event: Event,
}

/// Logs what happens to `cgroup` and sends it to `happened`, until the cgroup is gone or somebody wants a `last` look at it.
pub(super) async fn follow(cgroup: VmCgroup, happened: broadcast::Sender<Happened>, last: Arc<Notify>) {
    let vm = cgroup.name().to_owned();
    let mut watcher = match Watcher::new(cgroup) {
        Ok(watcher) => watcher,
        Err(error) => {
            return tracing::error!(vm, error = chain(&error), "its limits are not watched");
        }
    };
    let mut ends = false;
    while !ends {
        let event = tokio::select! {
            event = watcher.next() => event,
            () = last.notified() => {
                ends = true;
                match watcher.look() {
                    Some(event @ Event::Oom { .. }) => event,
                    // That a VM which ends has no processes is no news.
                    _ => return,
                }
            }
        };
        match event {
            Event::Oom { killed } => {
                tracing::error!(vm, killed, "it ran out of memory, and its processes were killed")
            }
            Event::Pressure(pressure) => {
                let percent = pressure.full.avg10 / 100;
                tracing::warn!(vm, percent, "all of it waits for memory (share of the last 10 s)");
            }
            Event::Empty => {
                tracing::error!(
                    vm,
                    "degraded: there is no process in its cgroup any more, so it is not limited"
                )
            }
            Event::Gone => {
                tracing::error!(vm, "degraded: its cgroup was removed by somebody else, so it is not limited")
            }
        }
        // Nobody has to listen.
        let _ = happened.send(Happened { vm: vm.clone(), event });
        ends |= event == Event::Gone;
    }
}

/// The limits of a VM.
pub(super) fn values(plan: &Plan) -> Values {
    Values::of(&plan.vm, plan.machine.engine == Engine::Tcg)
}

/// Says what is wrong with the cgroup of a VM that an earlier `laird` started.
pub(super) fn look(cgroup: &VmCgroup, plan: &Plan) {
    for fault in faults(cgroup, plan) {
        tracing::error!(vm = plan.name, "degraded: {fault}");
    }
}

/// What is wrong with the limits of a VM that runs, as they are now: nothing if all is as it was made. It reads a few files.
pub fn faults(cgroup: &VmCgroup, plan: &Plan) -> Vec<String> {
    let values = values(plan);
    let device = values.io.as_ref().and_then(|_| crate::cgroup::backing(&plan.dirs.state).ok().flatten());
    let unlimited = (values.io.is_some() && device.is_none()).then(|| unlimited(plan));
    let fault = cgroup.check(&values, device).map(|fault| fault.to_string());
    fault.into_iter().chain(unlimited).collect()
}

/// Has `io.max` follow the disk under the VM's volumes. What it is then, or nothing where the VM has no such limits.
pub fn follow_io(cgroup: &VmCgroup, plan: &Plan) -> Option<Result<(), String>> {
    let values = values(plan);
    let io = values.io.as_ref()?;
    let followed = match crate::cgroup::backing(&plan.dirs.state) {
        Ok(Some(device)) => cgroup.follow_io(Some(io), Some(device)).map_err(|error| chain(&error)),
        Ok(None) => cgroup.follow_io(Some(io), None).map_err(|error| chain(&error)).and(Err(unlimited(plan))),
        Err(error) => Err(error.to_string()),
    };
    Some(followed)
}

/// What is said where reads and writes cannot be limited.
pub(super) fn unlimited(plan: &Plan) -> String {
    let directory = plan.dirs.state.display();
    format!("its reads and writes are not limited: the file system of {directory} has no disk of its own")
}

/// Whether processes in `cgroup` were killed for want of memory since it was made: why a process that was killed was.
pub(super) fn ran_out(cgroup: &VmCgroup) -> bool {
    cgroup.usage().is_ok_and(|usage| usage.memory_events.oom_kill > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::fake::Fake;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn cg2_what_happens_is_sent_with_the_vms_name() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("builder");
        let values = Values { memory_max: 1 << 20, cpu_quota: None, cpu_weight: 100, pids_max: 9, io: None };
        group.create(&values, None).unwrap();
        fake.write("lair/vms/builder/cgroup.events", "populated 1\nfrozen 0\n");
        let (happened, mut heard) = broadcast::channel(8);
        let last = Arc::<Notify>::default();
        let task = tokio::spawn(follow(group.clone(), happened.clone(), Arc::clone(&last)));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!ran_out(&group));
        fake.write("lair/vms/builder/memory.events", "low 0\nhigh 0\nmax 1\noom 1\noom_kill 3\n");
        let first = timeout(Duration::from_secs(30), heard.recv()).await.unwrap().unwrap();
        assert_eq!(first, Happened { vm: "builder".into(), event: Event::Oom { killed: 3 } });
        assert!(ran_out(&group));
        // What comes just before the end is told as well, and then nothing more.
        fake.write("lair/vms/builder/memory.events", "low 0\nhigh 0\nmax 1\noom 1\noom_kill 4\n");
        last.notify_one();
        let second = timeout(Duration::from_secs(30), heard.recv()).await.unwrap().unwrap();
        assert_eq!(second.event, Event::Oom { killed: 1 });
        timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
        last.notify_one();
        timeout(Duration::from_secs(30), follow(group.clone(), happened.clone(), last)).await.unwrap();
        assert!(heard.is_empty());

        let task = tokio::spawn(follow(group.clone(), happened, Arc::default()));
        tokio::time::sleep(Duration::from_millis(100)).await;
        fake.write("lair/vms/builder/memory.events", "nonsense");
        std::fs::remove_dir_all(group.dir()).unwrap();
        let last = timeout(Duration::from_secs(30), heard.recv()).await.unwrap().unwrap();
        assert_eq!(last.event, Event::Gone);
        timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
    }
}
