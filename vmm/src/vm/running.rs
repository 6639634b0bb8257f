//! What runs of one VM: shared by its actor, which watches, and the task of the moment, which changes it.

use super::{
    limits::{self, Happened},
    machine::Part,
    orphan,
    plan::Plan,
    trace::{Start, Stopwatch},
};
use crate::{
    cgroup::VmCgroup,
    error::chain,
    host::{process::Process, thread},
    hypervisor::{Heard, qemu::qmp::Qmp},
    state::{dirs::VmDirs, file},
};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast, watch},
    task::JoinHandle,
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
    /// What its hypervisor had to do before it could answer is done.
    pinned: bool,
    /// What processes have said that no shim reads yet.
    unread: BTreeMap<Part, OwnedFd>,
    /// The task that watches its cgroup.
    cgroup: Option<Watch>,
    /// How its start went.
    stopwatch: Stopwatch,
}

/// A task that watches a cgroup, and ends with this.
#[derive(Debug)]
struct Watch {
    task: JoinHandle<()>,
    last: Arc<Notify>,
}

impl Watch {
    /// Has it look once more, and ends it. Memory that ran out ends the VM, and its cgroup is gone before the next look.
    async fn finish(mut self) {
        self.last.notify_one();
        let _ = timeout(PATIENCE, &mut self.task).await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Default for Running {
    fn default() -> Self {
        Self { inner: Arc::default(), thread: Arc::new(Semaphore::new(1)), connecting: Arc::default() }
    }
}

impl Running {
    /// What an earlier `laird` left running.
    pub fn adopted(plan: Plan, processes: BTreeMap<Part, Arc<Process>>, start: Start) -> Self {
        let running = Self::default();
        let stopwatch = Stopwatch::adopted(start);
        *running.inner() = Inner { plan: Some(Arc::new(plan)), processes, stopwatch, ..Inner::default() };
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
        let mut inner = self.inner();
        inner.processes.insert(part, process);
        inner.stopwatch.process(part);
    }

    /// It is being started, as was decided at `began`.
    pub fn starts(&self, began: Instant) {
        self.inner().stopwatch = Stopwatch::start(began);
    }

    /// How its start went so far.
    pub fn start(&self) -> Arc<Start> {
        self.inner().stopwatch.noted()
    }

    /// Notes something about its start.
    pub fn note(&self, note: impl FnOnce(&mut Stopwatch)) {
        note(&mut self.inner().stopwatch);
    }

    /// Waits for somebody else, which is no work of `laird`'s.
    pub async fn wait_for<T>(&self, other: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let outcome = other.await;
        self.note(|stopwatch| stopwatch.waited(began.elapsed()));
        outcome
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

    /// Whether its hypervisor may be pinning the guest's memory for what was begun before it was connected: its start, or a plug of an earlier
    /// `laird`'s. It answers after that.
    pub fn may_pin(&self) -> bool {
        !self.inner().pinned
    }

    /// Its hypervisor has answered, or was waited for long enough.
    pub fn has_pinned(&self) {
        self.inner().pinned = true;
    }

    /// Keeps what a process says until there is a shim to read it.
    pub fn add_unread(&self, part: Part, pipe: OwnedFd) {
        self.inner().unread.insert(part, pipe);
    }

    /// What is to be read by the shim from now on.
    pub fn take_unread(&self) -> BTreeMap<Part, OwnedFd> {
        std::mem::take(&mut self.inner().unread)
    }

    /// Puts on disk what processes have said, where there is no shim to do that.
    pub async fn keep_unread(&self, dirs: &VmDirs) {
        let (unread, dirs) = (self.take_unread(), dirs.clone());
        let keep = move || {
            for (part, pipe) in unread {
                let log = dirs.log(part.word());
                if let Err(error) = file::replace(&log, &waiting(pipe), 0o640) {
                    tracing::warn!(log = %log.display(), error = chain(&error), "cannot keep what {part} said");
                }
            }
        };
        let _ = thread::run(keep).await;
    }

    /// Watches the VM's cgroup until the clean-up: what happens to it is logged and sent to `happened`.
    pub fn watch_cgroup(&self, cgroup: VmCgroup, happened: &broadcast::Sender<Happened>) {
        let last = Arc::<Notify>::default();
        let task = tokio::spawn(limits::follow(cgroup, happened.clone(), Arc::clone(&last)));
        self.inner().cgroup = Some(Watch { task, last });
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
    pub async fn clean_up(&self, dirs: &VmDirs, cgroup: Option<VmCgroup>) -> Result<(), String> {
        let watch = self.inner().cgroup.take();
        if let Some(watch) = watch {
            watch.finish().await;
        }
        self.keep_unread(dirs).await;
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
        let strays = orphan::look(run).await;
        if !strays.is_empty() {
            tracing::warn!(directory = %dirs.run.display(), count = strays.len(), "ending processes that were not recorded");
            left.extend(orphan::end(strays, PATIENCE).await.iter().map(ToString::to_string));
        }
        // What its processes left, and the cgroup itself.
        if let Some(cgroup) = cgroup
            && let Err(error) = cgroup.remove().await
        {
            tracing::error!(vm = cgroup.name(), error = chain(&error), "degraded");
            if cgroup.populated().unwrap_or(false) {
                left.push(error.to_string());
            }
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

/// All that waits in a pipe, at most what one holds.
fn waiting(pipe: OwnedFd) -> Vec<u8> {
    const MOST: u64 = 1 << 20;
    let mut bytes = Vec::new();
    let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    if nix::fcntl::fcntl(&pipe, nonblocking).is_ok() {
        // It ends with an error, as the writer lives, or with its end.
        let _ = fs::File::from(pipe).take(MOST).read_to_end(&mut bytes);
    }
    bytes
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
