//! All VMs of one host: adopts what runs, starts what should, follows the fleet file.

use crate::{
    api::{
        observe::Observed,
        types::{ApplyReply, EventKind, HostStatus, VmStatus},
    },
    fleet::{Loaded, Place, Problem, Problems, diff, schema::Fleet},
    host::Host,
    shim::client,
    state::dirs::Dirs,
    vm::{
        actor::{self, Beginning, Handle, Snapshot},
        adopt,
        budget::Budget,
        machine::{Refusal, Request, State},
        steps::{Context, Instance},
    },
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::timeout};

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
        let fleet = supervisor.fleet();
        let names: std::collections::BTreeSet<_> =
            fleet.vms.keys().cloned().chain(adopt::recorded(&supervisor.dirs)).collect();
        let mut idle = Vec::new();
        for name in names {
            let beginning = adopt::adopt(&name, &fleet, &supervisor.dirs, &supervisor.host.boot_id).await;
            let stopped = beginning.state == State::Stopped;
            let handle = supervisor.spawn(&name, beginning);
            match fleet.vms.get(&name) {
                Some(vm) if vm.autostart && stopped => idle.push(handle),
                Some(_) => {}
                // It runs, and the fleet file no longer has it.
                None => supervisor.remove(name, handle),
            }
        }
        // Only now is it known how much memory those have that run already.
        for handle in idle {
            autostart(&handle).await;
        }
        supervisor
    }

    fn spawn(&self, name: &str, beginning: Beginning) -> Handle {
        let context = Context {
            name: name.into(),
            dirs: self.dirs.clone(),
            host: Arc::clone(&self.host),
            budget: Arc::clone(&self.budget),
        };
        let handle = actor::spawn(context, self.fleet.subscribe(), beginning);
        self.vms().insert(name.into(), handle.clone());
        self.observed.follow(name, handle.watch());
        handle
    }

    /// Stops a VM that the fleet file no longer has, and forgets it once it has stopped.
    fn remove(self: &Arc<Self>, name: String, handle: Handle) {
        let supervisor = Arc::clone(self);
        tokio::spawn(async move {
            let mut changes = handle.watch();
            let _ = handle.request(Request::Stop).await;
            let down = changes.wait_for(|snapshot| !snapshot.state.is_active()).await.is_ok();
            // Another apply may have brought it back meanwhile.
            if down && !supervisor.fleet().vms.contains_key(&name) {
                supervisor.vms().remove(&name);
                supervisor.observed.forget(&name);
                tracing::info!(vm = name, "removed");
            }
        });
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

    /// Stops a VM, and starts it as soon as it is down; one that is down is started. It returns as soon as the stop, or the start, is
    /// taken. Where the start is refused later, the VM is failed.
    pub async fn restart(&self, name: &str) -> Result<(), SupervisorError> {
        let handle = self.vm(name)?;
        if !handle.snapshot().state.is_active() {
            return self.request(name, Request::Start).await;
        }
        let mut changes = handle.watch();
        self.request(name, Request::Stop).await?;
        tokio::spawn(async move {
            let down = changes.wait_for(|snapshot| !snapshot.state.is_active()).await.is_ok();
            if down {
                autostart(&handle).await;
            }
        });
        Ok(())
    }

    /// What differs where `fleet` becomes the fleet.
    fn changes(&self, fleet: &Fleet) -> Vec<diff::Change> {
        let known = self.vms().clone();
        let running = known.into_iter().filter_map(|(name, handle)| Some((name, handle.snapshot().started?)));
        diff::changes(&self.fleet(), fleet, &running.collect())
    }

    /// What [`Self::apply`] would say. Nothing is changed.
    pub fn preview(&self, loaded: Loaded, other_file: Option<String>) -> ApplyReply {
        let Loaded { fleet, mut warnings } = loaded;
        if fleet.host != self.fleet().host {
            warnings.problems.push(self.accel_stays(other_file.as_deref()));
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
            warnings.problems.push(self.accel_stays(other_file.as_deref()));
        }
        log(&warnings);
        let changes = self.changes(&fleet);
        let fleet = Arc::new(fleet);
        let before = self.fleet.send_replace(Arc::clone(&fleet));
        *self.differs.lock().unwrap_or_else(PoisonError::into_inner) = other_file.clone();
        let known = self.vms().clone();
        let mut reply = ApplyReply {
            changes,
            warnings: warnings.problems,
            omitted_warnings: warnings.omitted,
            ..ApplyReply::default()
        };
        for (name, handle) in &known {
            if !fleet.vms.contains_key(name) {
                reply.removed.push(name.clone());
                self.remove(name.clone(), handle.clone());
            }
        }
        for (name, vm) in &fleet.vms {
            let Some(handle) = known.get(name) else {
                let stopped = Beginning {
                    state: State::Stopped,
                    since: jiff::Timestamp::now(),
                    instance: Instance::default(),
                };
                let handle = self.spawn(name, stopped);
                if vm.autostart {
                    autostart(&handle).await;
                }
                reply.added.push(name.clone());
                continue;
            };
            handle.fleet_changed();
            if handle.snapshot().started.is_some_and(|started| started != *vm) {
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

    /// The one thing that an apply does not change.
    fn accel_stays(&self, other_file: Option<&str>) -> Problem {
        let file = other_file.map_or_else(|| self.fleet_file.display().to_string(), Into::into);
        let place = Place { file, line: None, column: None, path: Some("host.accel".into()) };
        let message = "is read when laird starts; until then guests run as before".into();
        Problem { place, message, hint: None, other: None }
    }

    /// The state of one VM, with its counters as they are now.
    pub async fn vm_status(&self, name: &str) -> Result<VmStatus, SupervisorError> {
        let mut snapshot = self.vm(name)?.snapshot();
        refresh(&mut snapshot).await;
        Ok(VmStatus::new(name, &snapshot, &self.fleet()))
    }

    /// The state of all VMs, with their counters as they are now.
    pub async fn status(&self) -> HostStatus {
        let fleet = self.fleet();
        let known = self.vms().clone();
        let mut asked = tokio::task::JoinSet::new();
        for (name, handle) in known {
            let fleet = Arc::clone(&fleet);
            asked.spawn(async move {
                let mut snapshot = handle.snapshot();
                refresh(&mut snapshot).await;
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
            vms,
        }
    }
}

fn log(warnings: &Problems) {
    for text in warnings.texts() {
        tracing::warn!("fleet file: {}", text.replace('\n', ";"));
    }
}

/// Starts a VM that nobody asked for by name. That it cannot start must not be overlooked, so it is failed then.
async fn autostart(handle: &Handle) {
    if let Err(refusal) = handle.request(Request::Start).await {
        handle.not_started(refusal.to_string());
    }
}

/// How long a shim may take to tell its counters; after that those that it told last are shown.
const COUNTERS: Duration = Duration::from_millis(500);

/// A shim tells its state when it changes, which counters do all the time: they are asked for.
async fn refresh(snapshot: &mut Snapshot) {
    if let Some(plan) = &snapshot.plan
        && snapshot.shim.is_some()
        && let Ok(Ok(status)) = timeout(COUNTERS, client::status(&plan.shim.sockets.control)).await
    {
        snapshot.shim = Some(status);
    }
}
