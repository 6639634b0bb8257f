//! What runs of one VM: shared by its actor, which watches, and the task of the moment, which changes it.

use super::{machine::Part, orphan, plan::Plan};
use crate::{
    host::process::Process,
    hypervisor::{Heard, qemu::qmp::Qmp},
    state::dirs::VmDirs,
};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeMap,
    fs, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

/// How long a process may take to end when told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// What runs of one VM.
#[derive(Debug, Clone)]
pub struct Running {
    inner: Arc<Mutex<Inner>>,
    /// Held by work on a thread, which cannot be cancelled.
    thread: Arc<Semaphore>,
    /// Held while the hypervisor is being connected, which serves one client at a time.
    pub(super) connecting: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Inner {
    plan: Option<Arc<Plan>>,
    processes: BTreeMap<Part, Arc<Process>>,
    /// A program that a step runs and waits for.
    tool: Option<Arc<Process>>,
    qmp: Option<(Arc<Qmp>, watch::Receiver<Heard>)>,
}

impl Default for Running {
    fn default() -> Self {
        Self { inner: Arc::default(), thread: Arc::new(Semaphore::new(1)), connecting: Arc::default() }
    }
}

impl Running {
    /// What an earlier `laird` left running.
    pub fn adopted(plan: Plan, processes: BTreeMap<Part, Arc<Process>>) -> Self {
        let running = Self::default();
        *running.inner() = Inner { plan: Some(Arc::new(plan)), processes, ..Inner::default() };
        running
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is to be, once the first step has found out.
    pub fn plan(&self) -> Option<Arc<Plan>> {
        self.inner().plan.clone()
    }

    /// Sets what it is to be.
    pub fn set_plan(&self, plan: Arc<Plan>) {
        self.inner().plan = Some(plan);
    }

    /// Its processes.
    pub fn processes(&self) -> BTreeMap<Part, Arc<Process>> {
        self.inner().processes.clone()
    }

    /// One of its processes.
    pub fn process(&self, part: Part) -> Option<Arc<Process>> {
        self.inner().processes.get(&part).cloned()
    }

    /// Adds a process that was just started.
    pub fn add(&self, part: Part, process: Arc<Process>) {
        self.inner().processes.insert(part, process);
    }

    /// Sets the program that a step waits for.
    pub fn set_tool(&self, tool: Option<Arc<Process>>) {
        self.inner().tool = tool;
    }

    /// The connection to the hypervisor, unless it has ended.
    pub fn qmp(&self) -> Option<Arc<Qmp>> {
        self.inner().qmp.as_ref().filter(|(_, heard)| !heard.borrow().lost).map(|(qmp, _)| Arc::clone(qmp))
    }

    /// What the hypervisor says by itself, while it is connected.
    pub fn heard(&self) -> Option<watch::Receiver<Heard>> {
        self.inner().qmp.as_ref().map(|(_, heard)| heard.clone())
    }

    /// Sets the connection to the hypervisor.
    pub fn set_qmp(&self, qmp: Qmp, heard: watch::Receiver<Heard>) {
        self.inner().qmp = Some((Arc::new(qmp), heard));
    }

    /// Signals one of its processes.
    pub fn signal(&self, part: Part, signal: Signal) {
        if let Some(process) = self.process(part) {
            process.signal(signal);
        }
    }

    /// A permit for work on a thread; a clean-up waits for it.
    pub async fn thread(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.thread).acquire_owned().await.ok()
    }

    /// Ends every process, the hypervisor first, then what has the VM's tag and is not known, and removes the runtime files. The error
    /// says what still runs.
    pub async fn clean_up(&self, dirs: &VmDirs) -> Result<(), String> {
        let tool = self.inner().tool.take();
        if let Some(tool) = tool {
            tool.signal(Signal::SIGKILL);
            end(&tool).await;
        }
        // It may still write to the run directory. One that hangs in the kernel is not waited for without end.
        let _thread = timeout(PATIENCE, self.thread()).await;
        self.inner().qmp = None;
        let mut processes = self.processes();
        let mut left = Vec::new();
        if let Some(hypervisor) = processes.remove(&Part::Hypervisor)
            && !end(&hypervisor).await
        {
            left.push(format!("{} {}", hypervisor.id().pid, Part::Hypervisor));
        }
        super::checkpoint::reach("clean-up: the hypervisor has ended");
        let mut ends = tokio::task::JoinSet::new();
        for (part, process) in processes {
            ends.spawn(async move { (!end(&process).await).then(|| format!("{} {part}", process.id().pid)) });
        }
        left.extend(ends.join_all().await.into_iter().flatten());
        super::checkpoint::reach("clean-up: all processes have ended");
        let run = dirs.run.clone();
        let strays = tokio::task::spawn_blocking(move || orphan::tagged(&run)).await.unwrap_or_default();
        if !strays.is_empty() {
            tracing::warn!(directory = %dirs.run.display(), count = strays.len(), "ending processes that were not recorded");
            left.extend(orphan::end(strays, PATIENCE).await.iter().map(ToString::to_string));
        }
        if !left.is_empty() {
            return Err(format!("processes of it cannot be ended: {}", left.join(", ")));
        }
        if let Err(error) = fs::remove_dir_all(&dirs.run)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %dirs.run.display(), %error, "cannot remove the run directory");
        }
        super::checkpoint::reach("clean-up: the run directory is removed");
        *self.inner() = Inner::default();
        Ok(())
    }
}

/// Ends a process; whether it has ended.
async fn end(process: &Process) -> bool {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        process.signal(signal);
        if timeout(PATIENCE, process.ended()).await.is_ok() {
            return true;
        }
    }
    false
}
