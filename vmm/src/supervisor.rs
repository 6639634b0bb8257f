//! All VMs of one host: adopts what runs, starts what should, follows the fleet file.

use crate::{
    api::{
        observe::Observed,
        types::{ApplyReply, EventKind, HostStatus, VmStatus},
    },
    fleet::{
        Loaded, Place, Problem, Problems, diff,
        gpus::Gpu,
        schema::{Fleet, Limits, Users},
    },
    host::{Host, thread},
    passthrough::{self, watch::Pace},
    shim::client,
    state::dirs::Dirs,
    vm::{
        actor::{self, Beginning},
        adopt,
        budget::Budget,
        handle::{Handle, Snapshot},
        limits,
        machine::{Refusal, Request, Stage, State, Wanted},
        steps::Context,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

mod claims;
mod disks;
mod leftovers;
mod reports;
pub mod shutdown;
#[cfg(test)]
mod tests;

/// The pause before a VM whose task panicked is adopted, so that one that always panics does not fill the log.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a new VM may take to take the request to start.
const TAKEN: Duration = Duration::from_secs(5);

/// How long VMs may take to end that are killed.
const KILLED: Duration = Duration::from_secs(10);

/// All VMs of one host.
#[derive(Debug)]
pub struct Supervisor {
    dirs: Dirs,
    host: Arc<Host>,
    budget: Arc<Budget>,
    fleet_file: PathBuf,
    fleet: watch::Sender<Arc<Fleet>>,
    /// Set by an `apply` of something else than the fleet file, which holds until the next start.
    differs: Mutex<Option<String>>,
    /// Held by an apply: two at once would both make a VM that is new to them.
    applying: tokio::sync::Mutex<()>,
    vms: Mutex<BTreeMap<String, Handle>>,
    observed: Observed,
}

/// Why a VM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// There is no such VM.
    #[error("There is no VM {0}{1}")]
    NoSuchVm(String, Nearest),
    /// The VM is not where the request makes sense.
    #[error("VM {vm}: {refusal}")]
    Refused {
        /// The VM.
        vm: String,
        /// Why.
        refusal: Refusal,
    },
}

/// The name that was meant, perhaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nearest(Option<String>);

impl std::fmt::Display for Nearest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "; did you mean {name}?"),
            None => Ok(()),
        }
    }
}

impl Supervisor {
    /// Adopts what runs of the last `laird` and starts what should run, as far as `host` has memory for it.
    pub async fn start(dirs: Dirs, host: Host, fleet_file: PathBuf, loaded: Loaded) -> Arc<Self> {
        let Loaded { fleet, warnings } = loaded;
        log(&warnings);
        let (sender, _) = watch::channel(Arc::new(fleet));
        let supervisor = Arc::new(Self {
            dirs,
            budget: Arc::new(Budget::new(host.facts)),
            host: Arc::new(host),
            fleet_file,
            fleet: sender,
            differs: Mutex::new(None),
            applying: tokio::sync::Mutex::new(()),
            vms: Mutex::new(BTreeMap::new()),
            observed: Observed::default(),
        });
        supervisor.observed.listen(supervisor.host.happened.subscribe());
        supervisor.observed.listen_to_devices(supervisor.host.devices.subscribe());
        tokio::spawn(disks::follow(Arc::downgrade(&supervisor)));
        let devices = Arc::downgrade(&supervisor.host.devices);
        tokio::spawn(passthrough::watch::follow(devices, Pace::default()));
        let fleet = supervisor.fleet();
        leftovers::remove(&supervisor.dirs, &fleet).await;
        let names: BTreeSet<_> =
            fleet.vms.keys().cloned().chain(adopt::run_directories(&supervisor.dirs)).collect();
        let mut idle = Vec::new();
        for name in names {
            let beginning = supervisor.adopt(&name);
            let down = beginning.life.state == State::Stopped && beginning.actions.is_empty();
            let starts = down && beginning.life.wanted == Wanted::Running;
            if !down || fleet.vms.contains_key(&name) {
                let handle = supervisor.keep(&name, beginning);
                if starts && fleet.vms.get(&name).is_some_and(|vm| vm.autostart) {
                    idle.push(handle);
                }
            }
        }
        // Who is down by now has devices no longer.
        let known = supervisor.vms().clone();
        let active = known.iter().filter(|(_, handle)| handle.snapshot().state.holds_memory());
        let active = active.map(|(name, _)| name.clone()).collect();
        supervisor.host.devices.resume(active);
        supervisor.host.devices.want(wanted_devices(&fleet));
        // Only now is it known how much memory those have that run already.
        for handle in idle {
            autostart(&handle).await;
        }
        supervisor
    }

    fn adopt(&self, name: &str) -> Beginning {
        let autostart = self.fleet.borrow().vms.get(name).is_some_and(|vm| vm.autostart);
        adopt::adopt(name, autostart, &self.dirs, &self.host.boot_id, actor::moment())
    }

    /// Starts the task of a VM, and another one should it be lost, until the fleet no longer has the VM.
    fn keep(self: &Arc<Self>, name: &str, beginning: Beginning) -> Handle {
        let (handle, mut task) = self.spawn(name, beginning);
        let (supervisor, name) = (Arc::clone(self), name.to_owned());
        tokio::spawn(async move {
            loop {
                match task.await {
                    Ok(()) => {
                        let mut vms = supervisor.vms();
                        if !supervisor.fleet.borrow().vms.contains_key(&name) {
                            vms.remove(&name);
                            supervisor.observed.forget(&name);
                            tracing::info!(vm = name, "removed");
                            return;
                        }
                        drop(vms);
                        // It came back into the fleet in the moment in which its task ended.
                        let beginning = supervisor.adopt(&name);
                        let (handle, next) = supervisor.spawn(&name, beginning);
                        task = next;
                        if supervisor.fleet().vms.get(&name).is_some_and(|vm| vm.autostart) {
                            autostart(&handle).await;
                        }
                    }
                    Err(lost) if lost.is_cancelled() => return,
                    Err(_) => {
                        tracing::error!(vm = name, "its task panicked; it is adopted anew");
                        sleep(AGAIN).await;
                        (_, task) = supervisor.spawn(&name, supervisor.adopt(&name));
                    }
                }
            }
        });
        handle
    }

    fn spawn(&self, name: &str, beginning: Beginning) -> (Handle, JoinHandle<()>) {
        let context = Context {
            name: name.into(),
            dirs: self.dirs.clone(),
            host: Arc::clone(&self.host),
            budget: Arc::clone(&self.budget),
        };
        let (handle, task) = actor::spawn(context, self.fleet.subscribe(), beginning);
        self.vms().insert(name.into(), handle.clone());
        self.observed.follow(name, handle.watch());
        tokio::spawn(reports::follow(Arc::clone(&self.host.devices), name.into(), handle.watch()));
        (handle, task)
    }

    /// Ends all VMs, because the host shuts down: those first that no other one has a link to, all within `limit`. What is wanted of
    /// them stays, so they start with the host.
    pub async fn shut_down(&self, limit: Duration) {
        let waves = shutdown::waves(&self.fleet(), self.vms().keys().cloned().collect());
        let end = Instant::now() + limit;
        for wave in waves {
            let handles: Vec<_> = wave.iter().filter_map(|name| self.vms().get(name).cloned()).collect();
            tracing::info!(vms = ?wave, "ending, because the host shuts down");
            for handle in &handles {
                handle.close(Stage::Agent);
            }
            let down = async {
                for handle in &handles {
                    handle.down().await;
                }
            };
            if timeout_at(end, down).await.is_err() {
                tracing::warn!(vms = ?wave, "they have not ended in time, and are killed");
            }
        }
        let handles: Vec<_> = self.vms().values().cloned().collect();
        for handle in &handles {
            if handle.snapshot().state.is_active() {
                handle.close(Stage::Kill);
            }
        }
        let down = async {
            for handle in &handles {
                handle.down().await;
            }
        };
        let _ = timeout(KILLED, down).await;
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<String, Handle>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fleet as it is now.
    pub fn fleet(&self) -> Arc<Fleet> {
        Arc::clone(&self.fleet.borrow())
    }

    /// The fleet, as it becomes another.
    pub fn watch_fleet(&self) -> watch::Receiver<Arc<Fleet>> {
        self.fleet.subscribe()
    }

    /// What is told and counted of VMs.
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// `laird`'s directories.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// The fleet file that `laird` was started with.
    pub fn fleet_file(&self) -> &std::path::Path {
        &self.fleet_file
    }

    /// A VM's task.
    pub fn vm(&self, name: &str) -> Result<Handle, SupervisorError> {
        let vms = self.vms();
        vms.get(name).cloned().ok_or_else(|| {
            let nearest = vms
                .keys()
                .map(|known| (strsim::damerau_levenshtein(known, name), known))
                .filter(|(distance, _)| *distance <= 2)
                .min();
            SupervisorError::NoSuchVm(name.into(), Nearest(nearest.map(|(_, known)| known.clone())))
        })
    }

    /// Asks a VM for a change.
    pub async fn request(&self, name: &str, request: Request) -> Result<(), SupervisorError> {
        let refused = |refusal| SupervisorError::Refused { vm: name.into(), refusal };
        self.vm(name)?.request(request).await.map_err(refused)
    }

    /// What differs where `fleet` becomes the fleet.
    fn changes(&self, fleet: &Fleet) -> Vec<diff::Change> {
        let known = self.vms().clone();
        let running =
            known.into_iter().filter_map(|(name, handle)| Some((name, handle.snapshot().started()?.clone())));
        diff::changes(&self.fleet(), fleet, &running.collect())
    }

    /// What [`Self::apply`] would say. Nothing is changed.
    pub fn preview(&self, loaded: Loaded, other_file: Option<String>) -> ApplyReply {
        let Loaded { fleet, mut warnings } = loaded;
        if fleet.host != self.fleet().host {
            warnings.problems.push(self.host_stays(other_file.as_deref()));
        }
        let changes = self.changes(&fleet);
        let vms = |actions: &[diff::Action]| {
            let vms = changes.iter().filter(|change| change.what == diff::What::Vm);
            vms.filter(|change| actions.contains(&change.action)).map(|change| change.name.clone()).collect()
        };
        use diff::Action::{Add, PendingRestart, Remove, Start, Stop};
        ApplyReply {
            dry_run: true,
            added: vms(&[Start, Add]),
            removed: vms(&[Stop, Remove]),
            pending_restart: vms(&[PendingRestart]),
            links_changed: self.fleet().links != fleet.links,
            changes,
            warnings: warnings.problems,
            omitted_warnings: warnings.omitted,
        }
    }

    /// Makes `fleet` the fleet: VMs that are new start, VMs that are gone stop, links change at once; a VM that is
    /// otherwise different keeps what it was started with until its next start.
    pub async fn apply(self: &Arc<Self>, loaded: Loaded, other_file: Option<String>) -> ApplyReply {
        let _applying = self.applying.lock().await;
        let Loaded { fleet, mut warnings } = loaded;
        if fleet.host != self.fleet().host {
            warnings.problems.push(self.host_stays(other_file.as_deref()));
        }
        log(&warnings);
        let changes = self.changes(&fleet);
        let fleet = Arc::new(fleet);
        let before = self.fleet.send_replace(Arc::clone(&fleet));
        *self.differs.lock().unwrap_or_else(PoisonError::into_inner) = other_file.clone();
        self.host.devices.want(wanted_devices(&fleet));
        let known = self.vms().clone();
        let mut reply = ApplyReply {
            changes,
            warnings: warnings.problems,
            omitted_warnings: warnings.omitted,
            ..ApplyReply::default()
        };
        let gone = known.iter().filter(|(name, _)| !fleet.vms.contains_key(*name));
        let gone: Vec<_> = gone.map(|(name, handle)| (name.clone(), handle.clone())).collect();
        for (_, handle) in &gone {
            handle.removed();
        }
        reply.removed = gone.iter().map(|(name, _)| name.clone()).collect();
        for (name, vm) in &fleet.vms {
            let Some(handle) = known.get(name) else {
                let wanted = if vm.autostart { Wanted::Running } else { Wanted::Stopped };
                let handle = self.keep(name, Beginning::stopped(wanted));
                if vm.autostart {
                    let claims = claims::of(name, &fleet);
                    let before =
                        gone.iter().filter(|(gone, _)| !claims.is_disjoint(&claims::of(gone, &before)));
                    let before: Vec<_> = before.map(|(_, handle)| handle.clone()).collect();
                    let gone: Vec<_> = gone.iter().map(|(_, handle)| handle.clone()).collect();
                    autostart_after(handle, before, gone).await;
                }
                reply.added.push(name.clone());
                continue;
            };
            if handle.snapshot().started().is_some_and(|started| diff::needs_restart(started, vm)) {
                reply.pending_restart.push(name.clone());
            }
        }
        reply.links_changed = before.links != fleet.links;
        self.observed.events.publish(EventKind::Applied {
            file: other_file,
            added: reply.added.clone(),
            removed: reply.removed.clone(),
            pending_restart: reply.pending_restart.clone(),
            links_changed: reply.links_changed,
        });
        reply
    }

    /// What an apply does not change.
    fn host_stays(&self, other_file: Option<&str>) -> Problem {
        let file = other_file.map_or_else(|| self.fleet_file.display().to_string(), Into::into);
        let place = Place { file, line: None, column: None, path: Some("host".into()) };
        let message = "is read when laird starts; until then all is as before".into();
        Problem { place, message, hint: None, other: None }
    }

    /// The state of one VM, with its counters as they are now.
    pub async fn vm_status(&self, name: &str) -> Result<VmStatus, SupervisorError> {
        let mut snapshot = self.vm(name)?.snapshot();
        refresh(&mut snapshot, &self.host).await;
        Ok(VmStatus::new(name, &snapshot, &self.fleet()))
    }

    /// The state of all VMs, with their counters as they are now.
    pub async fn status(&self) -> HostStatus {
        let fleet = self.fleet();
        let known = self.vms().clone();
        let mut asked = tokio::task::JoinSet::new();
        for (name, handle) in known {
            let (fleet, host) = (Arc::clone(&fleet), Arc::clone(&self.host));
            asked.spawn(async move {
                let mut snapshot = handle.snapshot();
                refresh(&mut snapshot, &host).await;
                VmStatus::new(&name, &snapshot, &fleet)
            });
        }
        let mut vms = asked.join_all().await;
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        HostStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            fleet_file: self.fleet_file.clone(),
            applied: self.differs.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            engine: self.host.engine,
            root: crate::state::dirs::is_root(),
            users: if self.host.ids.is_some() { Users::Own } else { Users::Shared },
            limits: if self.host.cgroups.is_some() { Limits::Cgroup } else { Limits::None },
            vms,
        }
    }
}

/// All devices that VMs ask for.
fn wanted_devices(fleet: &Fleet) -> Vec<Gpu> {
    fleet.vms.values().flat_map(|vm| vm.gpus.clone()).collect()
}

fn log(warnings: &Problems) {
    for text in warnings.texts() {
        tracing::warn!("fleet file: {}", text.replace('\n', ";"));
    }
}

/// Starts a VM that nobody asked for by name. That it cannot start must not be overlooked, so it is failed then.
async fn autostart(handle: &Handle) {
    if let Err(refusal) = handle.request(Request::Start).await {
        handle.not_started(refusal.to_string()).await;
    }
}

/// Starts a VM that is new, once those are down `before` it that have what it claims; and where there is no memory for it, once all are
/// down that are `gone`.
async fn autostart_after(handle: Handle, before: Vec<Handle>, gone: Vec<Handle>) {
    let all_down = |handles: &[Handle]| handles.iter().all(|handle| !handle.snapshot().state.is_active());
    if before.is_empty() && all_down(&gone) {
        // In the order of the fleet file, which decides who gets the memory; but a disk that hangs must not hold up the others.
        let _ = timeout(TAKEN, tokio::spawn(async move { autostart(&handle).await })).await;
        return;
    }
    tokio::spawn(async move {
        for other in &before {
            other.down().await;
        }
        if let Err(Refusal::OverBudget(_)) = handle.request(Request::Start).await {
            for other in &gone {
                other.down().await;
            }
        } else if handle.snapshot().state != State::Stopped {
            return;
        }
        autostart(&handle).await;
    });
}

/// How long a shim may take to tell its counters; after that those that it told last are shown.
const COUNTERS: Duration = Duration::from_millis(500);

/// A shim tells its state when it changes, which counters do all the time: they are asked for. So are the limits, which anybody with
/// enough rights may have changed.
async fn refresh(snapshot: &mut Snapshot, host: &Host) {
    let Some(plan) = snapshot.plan.clone() else { return };
    snapshot.degraded.extend(host.devices.faults(&plan.name));
    if let Some(cgroups) = &host.cgroups
        && matches!(snapshot.state, State::Booting | State::Ready)
    {
        let (cgroup, plan) = (cgroups.vm(&plan.name), Arc::clone(&plan));
        let faults = thread::run(move || limits::faults(&cgroup, &plan)).await;
        snapshot.degraded.extend(faults.unwrap_or_default());
    }
    if snapshot.shim.is_some()
        && let Ok(Ok(status)) = timeout(COUNTERS, client::status(&plan.shim.sockets.control)).await
    {
        snapshot.shim = Some(status);
    }
}
