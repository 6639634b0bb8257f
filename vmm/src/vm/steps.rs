//! The steps of a start and the stages of an end: the effects behind [`super::machine::Step`] and [`super::machine::Stage`]. Each step may
//! be repeated; [`Running::clean_up`] undoes them.
//!
//! A step runs in a task of its own and may be dropped at any await: what it started by then is in [`Running`].

mod arguments;
mod devices;
mod error;

pub use error::StepError;

use self::arguments::{STORE_CONTROL, store_arguments, virtiofs_arguments, vsock_arguments};
use super::{
    budget::Budget,
    checkpoint, generation, limits,
    machine::{Part, Stage, Step},
    orphan,
    plan::{Plan, plan},
    running::Running,
    users::Users,
};
use crate::{
    cgroup::{self, VmCgroup},
    error::chain,
    fleet::schema::{Fleet, Vm},
    host::{
        Host,
        confine::Confinement,
        listen::listen,
        memory,
        process::{self, Launch, Process, ProcessError, Sink},
        thread, tools,
    },
    hypervisor::{
        Heard,
        ports::{self, Port},
        qemu::{command, qmp::Qmp},
    },
    passthrough::window::{self, Guest},
    shim::client,
    state::{dirs::Dirs, file},
};
use lair_guest::{initramfs, wire::message::Ask};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{Instant, sleep, timeout},
};

/// How long a program of ours may take to listen, or to end when told to. A loaded host has been seen to need over a second.
const PROMPT: Duration = Duration::from_secs(10);

/// The pauses between two looks at a condition that is waited for: an eighth of the time that it has taken already, within these. So
/// hardly any time is lost after it has come true, and many VMs at once do not keep a processor busy.
const POLL_MIN: Duration = Duration::from_millis(1);
const POLL_MAX: Duration = Duration::from_millis(20);

/// How long the end of a hypervisor may take to be seen after that of its control socket.
const ENDING: Duration = Duration::from_secs(1);

/// How long a step may take that does much work: closures, indexing and formatting, on a disk that others use as well.
const WORK: Duration = Duration::from_secs(15 * 60);

/// How long any other step may take.
const STEP: Duration = Duration::from_secs(60);

/// How many closures are computed and initramfs made at once: each takes some ten megabytes for a moment, and all VMs of a host may start
/// together.
static LARGE: Semaphore = Semaphore::const_new(2);

/// What the steps may use.
#[derive(Debug, Clone)]
pub struct Context {
    /// The VM's name.
    pub name: String,
    /// `laird`'s directories.
    pub dirs: Dirs,
    /// The host.
    pub host: Arc<Host>,
    /// The host's memory.
    pub budget: Arc<Budget>,
}

impl Context {
    /// The VM's cgroup, where there are any.
    pub fn cgroup(&self) -> Option<VmCgroup> {
        Some(self.host.cgroups.as_ref()?.vm(&self.name))
    }

    /// How much longer than others its hypervisor may be busy, and its guest stand still, while a device comes: before the first one is there, all of
    /// the guest's memory is pinned, at some GiB a second.
    pub fn pinning(&self, plan: &Plan) -> Duration {
        let gib = plan.machine.memory.0 >> 30;
        let seconds = if self.host.devices.has_any(&self.name) { gib.saturating_add(10) } else { 0 };
        Duration::from_secs(seconds)
    }
}

/// One effect on a VM: a step of its start, or a stage of its end.
#[derive(Debug, Clone)]
pub struct Job {
    /// What it may use.
    pub context: Context,
    /// The fleet.
    pub fleet: Arc<Fleet>,
    /// What runs of the VM.
    pub running: Running,
    /// Told when a process has been started, so that it is written down.
    pub started: Arc<Notify>,
    /// Becomes true when the effect is no longer wanted.
    pub cancel: watch::Receiver<bool>,
}

impl Job {
    /// Performs a step, within its deadline and unless it is cancelled.
    pub async fn perform(self, step: Step) -> Result<(), StepError> {
        let deadline = match step {
            Step::View | Step::Index | Step::Volumes | Step::Initramfs | Step::Devices => WORK,
            Step::Hypervisor => {
                STEP + self.running.plan().map_or(Duration::ZERO, |plan| self.context.pinning(&plan))
            }
            _ => STEP,
        };
        let mut cancel = self.cancel.clone();
        tokio::select! {
            outcome = timeout(deadline, self.step(step)) => {
                outcome.unwrap_or(Err(StepError::Overdue(deadline)))?;
                self.running.note(|stopwatch| stopwatch.step(step));
                checkpoint::reach(&format!("{step:?}: done"));
                Ok(())
            }
            _ = cancel.wait_for(|cancelled| *cancelled) => Err(StepError::Cancelled),
        }
    }

    async fn step(&self, step: Step) -> Result<(), StepError> {
        if step == Step::View {
            let (context, fleet) = (self.context.clone(), Arc::clone(&self.fleet));
            let plan = self.large(move || view(&context, &fleet)).await?;
            self.running.set_plan(Arc::new(plan));
            return Ok(());
        }
        let plan = self.running.plan().ok_or(StepError::Lost)?;
        let find = |tool| self.context.host.tools.find(tool);
        let users = Users::of(self.context.host.ids.as_deref(), &self.context.name)?;
        let confined = |part| users.confinement(part, &plan, self.context.host.cgroups.as_ref());
        match step {
            Step::View => Ok(()),
            Step::Directories => {
                let (dirs, made) = (self.context.dirs.clone(), Arc::clone(&plan));
                self.blocking(move || {
                    made.dirs.create()?;
                    Ok(users.own_directories(&dirs, &made)?)
                })
                .await?;
                self.limit(&plan).await
            }
            Step::Index => self.index(&plan, find(tools::VIRTIOFS)?).await,
            Step::Volumes if plan.vm.volumes.is_empty() => Ok(()),
            Step::Volumes => {
                self.volumes(&plan, &find(tools::MKFS)?).await?;
                self.blocking(move || Ok(users.own_volumes(&plan)?)).await
            }
            Step::Initramfs => {
                let guest = find(tools::GUEST)?;
                self.large(move || {
                    write_initramfs(&plan, &guest)?;
                    Ok(users.own_initramfs(&plan)?)
                })
                .await
            }
            Step::Devices if plan.vm.gpus.is_empty() => Ok(()),
            Step::Devices => {
                let given = self.context.host.devices.acquire(&plan.name, &plan.vm.gpus).await?;
                let nodes: Vec<_> = given.iter().flat_map(|given| given.nodes.clone()).collect();
                self.blocking(move || Ok(users.own_nodes(&nodes)?)).await?;
                let windows: Vec<_> = given.iter().flat_map(|given| given.windows.clone()).collect();
                let hole = window::hole(&windows, &guest(&self.context.host, &plan.vm))?;
                let plan = plan.with_devices(&given, hole);
                let cards = (1..).map(Port).zip(&plan.machine.cards);
                let places = ports::places(plan.machine.ports(), cards);
                self.context.host.devices.place(&plan.name, &BTreeSet::new(), &places).await?;
                self.running.set_plan(Arc::new(plan));
                Ok(())
            }
            Step::StoreBackend => {
                let listener = listen(&plan.machine.store_socket, 0o660, users.shared())?;
                let arguments = virtiofs_arguments(&plan, listener.as_raw_fd(), users.store());
                let mut confinement = confined(Part::StoreBackend)?;
                confinement.keep.push(listener.into());
                self.spawn(Part::StoreBackend, &plan, find(tools::VIRTIOFS)?, arguments, confinement)?;
                // It makes this one as soon as it has something to serve.
                self.await_socket(Part::StoreBackend, &plan, &plan.dirs.socket(STORE_CONTROL)).await
            }
            Step::VsockDevice => {
                let arguments = vsock_arguments(&plan.machine.vsock_socket, &plan.shim.vsock);
                let (program, confinement) = (find(tools::VHOST_DEVICE_VSOCK)?, confined(Part::VsockDevice)?);
                self.spawn(Part::VsockDevice, &plan, program, arguments, confinement)?;
                self.await_socket(Part::VsockDevice, &plan, &plan.machine.vsock_socket).await
            }
            Step::Hypervisor => {
                let arguments = command::arguments(&plan.machine);
                self.spawn(
                    Part::Hypervisor,
                    &plan,
                    find(tools::QEMU)?,
                    arguments,
                    confined(Part::Hypervisor)?,
                )?;
                self.connect_qmp().await
            }
            Step::Shim => {
                let config = plan.dirs.run.join("shim.json");
                file::replace_json(&config, &plan.shim, 0o600)?;
                let mut arguments = vec!["--config".into(), text(&config)];
                let (program, mut confinement) = (find(tools::SHIM)?, confined(Part::Shim)?);
                for (part, pipe) in self.running.take_unread() {
                    let log = plan.dirs.log(part.word());
                    arguments.extend(["--log".into(), format!("{}={}", pipe.as_raw_fd(), text(&log))]);
                    confinement.keep.push(pipe);
                }
                self.spawn(Part::Shim, &plan, program, arguments, confinement)?;
                self.await_socket(Part::Shim, &plan, &plan.shim.sockets.control).await
            }
            Step::Resume => self.resume(&plan).await,
        }
    }

    /// A program whose output goes to its log.
    fn launch(&self, plan: &Plan, word: &str, program: PathBuf, arguments: Vec<String>) -> Launch {
        let log = plan.dirs.log(word);
        // One start's output explains that start; an earlier one's would only mislead.
        let _ = fs::remove_file(&log);
        let environment = orphan::tags(&plan.name, &plan.dirs.run, word);
        tracing::debug!(vm = plan.name, program = %program.display(), ?arguments, "starting");
        let confinement = Confinement::default();
        Launch { program, arguments, environment, output: Sink::File(log), confinement }
    }

    /// Makes the VM's cgroup with its limits, and watches it. What is in it is of an earlier start that was cut short.
    async fn limit(&self, plan: &Plan) -> Result<(), StepError> {
        let Some(cgroup) = self.context.cgroup() else { return Ok(()) };
        cgroup.kill().await?;
        write_limits(&cgroup, plan)?;
        self.running.watch_cgroup(cgroup, &self.context.host.happened);
        Ok(())
    }

    /// Starts a part. It is known from then on, whatever becomes of the step.
    fn spawn(
        &self,
        part: Part,
        plan: &Plan,
        program: PathBuf,
        arguments: Vec<String>,
        confinement: Confinement,
    ) -> Result<(), StepError> {
        checkpoint::reach(&format!("{part:?}: before its start"));
        let mut launch = Launch { confinement, ..self.launch(plan, part.word(), program, arguments) };
        // What the shim says is little, and nobody else could read it while laird is away.
        if part != Part::Shim {
            let (reader, writer) =
                process::pipe().map_err(|e| ProcessError::Log(plan.dirs.log(part.word()), e))?;
            self.running.add_unread(part, reader);
            launch.output = Sink::Pipe(writer);
        }
        let process = Process::spawn(&launch)?;
        checkpoint::reach(&format!("{part:?}: started, not recorded"));
        self.running.add(part, Arc::new(process));
        self.started.notify_one();
        Ok(())
    }

    /// Runs a program to its end; the error is what it said.
    async fn tool(
        &self,
        plan: &Plan,
        word: &str,
        program: PathBuf,
        arguments: Vec<String>,
    ) -> Result<(), String> {
        let launch = self.launch(plan, word, program, arguments);
        let log = plan.dirs.log(word);
        let process = Arc::new(Process::spawn(&launch).map_err(|error| chain(&error))?);
        // A clean-up ends it, should this be dropped.
        self.running.set_tool(Some(Arc::clone(&process)));
        checkpoint::reach(&format!("{word}: runs"));
        let how = self.running.wait_for(process.ended()).await;
        self.running.set_tool(None);
        if process.succeeded() { Ok(()) } else { Err(format!("it {how}{}", tail(log).await)) }
    }

    /// Brings the index up to date. Runs for several VMs wait for each other.
    async fn index(&self, plan: &Plan, program: PathBuf) -> Result<(), StepError> {
        let arguments = std::iter::once("index".into()).chain(store_arguments(plan)).collect();
        let view = plan.generation.view.clone();
        let indexed = self.tool(plan, "index", program, arguments).await;
        indexed.map_err(|reason| StepError::Index { view, reason })
    }

    async fn volumes(&self, plan: &Plan, mkfs: &Path) -> Result<(), StepError> {
        for (volume, disk) in plan.vm.volumes.iter().zip(&plan.machine.disks) {
            if disk.image.exists() {
                continue;
            }
            let failed = |reason: String| StepError::Volume { path: disk.image.clone(), reason };
            // Made beside and renamed: an interrupted format is never taken for a volume.
            let beside = disk.image.with_extension("new");
            let (path, size) = (beside.clone(), volume.size.0);
            let made = move || Ok(fs::File::create(&path).and_then(|file| file.set_len(size)));
            self.blocking(made).await?.map_err(|error| failed(error.to_string()))?;
            let label = volume.name.chars().take(16).collect::<String>();
            let mut arguments = ["-q", "-F", "-m", "0", "-L", &label].map(String::from).to_vec();
            arguments.push(text(&beside));
            self.tool(plan, "mkfs", mkfs.into(), arguments).await.map_err(failed)?;
            let image = disk.image.clone();
            let kept = move || {
                let synced = fs::File::open(&beside).and_then(|file| file.sync_all());
                Ok(synced.and_then(|()| fs::rename(&beside, &image)))
            };
            self.blocking(kept).await?.map_err(|error| failed(error.to_string()))?;
            checkpoint::reach("a volume is made");
        }
        Ok(())
    }

    /// A process did not do what it is for; what it said is told.
    async fn not_up(&self, part: Part, plan: &Plan, reason: String) -> StepError {
        self.running.keep_unread(&plan.dirs).await;
        StepError::NotUp { part, reason, log: tail(plan.dirs.log(part.word())).await }
    }

    /// Waits until a process listens; its end or its silence is a failure that carries the end of its log.
    async fn await_socket(&self, part: Part, plan: &Plan, socket: &Path) -> Result<(), StepError> {
        let listening = async {
            let began = Instant::now();
            // The vhost-user devices serve one connection, so they are not probed by connecting.
            while !fs::symlink_metadata(socket).is_ok_and(|m| m.file_type().is_socket()) {
                pause(began).await;
            }
        };
        if self.unless_it_ends(part, plan, PROMPT, listening).await?.is_some() {
            return Ok(());
        }
        let reason = format!("{} did not appear within {PROMPT:?}", socket.display());
        Err(self.not_up(part, plan, reason).await)
    }

    async fn unless_it_ends<T>(
        &self,
        part: Part,
        plan: &Plan,
        patience: Duration,
        wait: impl Future<Output = T>,
    ) -> Result<Option<T>, StepError> {
        let process = self.running.process(part).ok_or(StepError::Lost)?;
        let waiting = async {
            tokio::select! {
                how = process.ended() => Err(how),
                outcome = timeout(patience, wait) => Ok(outcome.ok()),
            }
        };
        match self.running.wait_for(waiting).await {
            Ok(outcome) => Ok(outcome),
            Err(how) => Err(self.not_up(part, plan, format!("it {how}")).await),
        }
    }

    /// Connects to the hypervisor's control socket, unless that is done.
    pub async fn connect_qmp(&self) -> Result<(), StepError> {
        let _connecting = self.running.connecting.lock().await;
        if self.running.qmp().is_some() {
            return Ok(());
        }
        let plan = self.running.plan().ok_or(StepError::Lost)?;
        let (sender, heard) = watch::channel(Heard::default());
        let qemu = self.running.process(Part::Hypervisor).ok_or(StepError::Lost)?.id().pid;
        let pinning = if self.running.may_pin() { self.context.pinning(&plan) } else { Duration::ZERO };
        let patience = PROMPT + pinning;
        let connect = Qmp::connect(&plan.machine.control_socket, qemu, patience, sender);
        let connected = self.unless_it_ends(Part::Hypervisor, &plan, patience * 2, connect).await;
        // Whatever came of it: that has had its time.
        self.running.has_pinned();
        let reason = match connected? {
            Some(Ok(qmp)) => {
                self.running.set_qmp(qmp, heard);
                return Ok(());
            }
            // It may have ended, and its connection be seen to end first: what it said is worth more than that.
            Some(Err(error)) => chain(&error),
            None => "no answer on its control socket".into(),
        };
        Err(self.not_up(Part::Hypervisor, &plan, reason).await)
    }

    async fn resume(&self, plan: &Plan) -> Result<(), StepError> {
        let control = &plan.shim.sockets.control;
        let connected = async {
            let began = Instant::now();
            while !client::status(control).await.is_ok_and(|status| status.console) {
                pause(began).await;
            }
        };
        if self.unless_it_ends(Part::Shim, plan, PROMPT, connected).await?.is_none() {
            let reason = format!("it did not connect to the console within {PROMPT:?}");
            return Err(self.not_up(Part::Shim, plan, reason).await);
        }
        checkpoint::reach("Resume: before it");
        let qmp = self.running.qmp().ok_or(StepError::Lost)?;
        self.running.wait_for(qmp.execute("cont")).await?;
        Ok(())
    }

    /// Asks the guest to end, as hard as `stage` says.
    pub async fn end(self, stage: Stage) -> Result<(), StepError> {
        match stage {
            Stage::Agent => {
                let plan = self.running.plan().ok_or(StepError::Lost)?;
                client::ask(&plan.shim.sockets.control, Ask::PowerOff).await?;
            }
            Stage::PowerButton => {
                self.connect_qmp().await?;
                self.running.qmp().ok_or(StepError::Lost)?.execute("system_powerdown").await?;
            }
            Stage::Terminate => self.running.signal(Part::Hypervisor, Signal::SIGTERM),
            Stage::Kill => self.running.signal(Part::Hypervisor, Signal::SIGKILL),
        }
        checkpoint::reach(&format!("{stage:?}: asked"));
        Ok(())
    }

    /// Whether the hypervisor is silent. One that has ended is not: its end is told, and why.
    pub async fn is_silent(self) -> bool {
        let answers = self.connect_qmp().await.is_ok()
            && match self.running.qmp() {
                Some(qmp) => qmp.execute("query-status").await.is_ok(),
                None => false,
            };
        if answers {
            return false;
        }
        match self.running.process(Part::Hypervisor) {
            Some(process) => timeout(ENDING, process.ended()).await.is_err(),
            None => false,
        }
    }

    /// Does work that blocks on a thread and takes much memory.
    async fn large<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
    ) -> Result<T, StepError> {
        let place = LARGE.acquire().await;
        // Kept by the thread, which goes on should this be dropped.
        let outcome = self.blocking(move || {
            let _place = place;
            work()
        });
        let outcome = outcome.await;
        memory::used();
        outcome
    }

    /// Does work that blocks on a thread. It cannot be cancelled, so a clean-up waits for its end.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
    ) -> Result<T, StepError> {
        let permit = self.running.thread().await;
        let task = thread::run(move || {
            let _permit = permit;
            work()
        });
        task.await?
    }
}

/// What decides how much room a VM has for devices.
pub(super) fn guest(host: &Host, vm: &Vm) -> Guest {
    Guest { memory: vm.memory, engine: host.engine, host_bits: host.address_bits }
}

/// Makes a VM's cgroup have the plan's limits.
fn write_limits(cgroup: &VmCgroup, plan: &Plan) -> Result<(), StepError> {
    let values = limits::values(plan);
    let device = match &values.io {
        None => None,
        Some(_) => {
            cgroup::backing(&plan.dirs.state).map_err(|e| StepError::Read(plan.dirs.state.clone(), e))?
        }
    };
    if values.io.is_some() && device.is_none() {
        tracing::warn!(vm = plan.name, "{}", limits::unlimited(plan));
    }
    Ok(cgroup.create(&values, device)?)
}

/// Waits before another look at a condition that has been waited for since `began`.
async fn pause(began: Instant) {
    sleep((began.elapsed() / 8).clamp(POLL_MIN, POLL_MAX)).await;
}

fn view(context: &Context, fleet: &Fleet) -> Result<Plan, StepError> {
    let vm = fleet.vms.get(&context.name).ok_or(StepError::NotInFleet)?;
    let generation = generation::make(vm, &fleet.store.sources, &context.dirs.generations())?;
    Ok(plan(&context.name, vm, fleet, &context.dirs, context.host.engine, generation)?)
}

fn write_initramfs(plan: &Plan, guest: &Path) -> Result<(), StepError> {
    let registration = fs::read(&plan.generation.registration)
        .map_err(|e| StepError::Read(plan.generation.registration.clone(), e))?;
    let mut archive = initramfs::base(guest, &plan.modules, initramfs::WANTED_MODULES)?;
    archive.extend(initramfs::overlay(&plan.boot, &registration)?);
    Ok(file::replace(&plan.machine.initramfs, &archive, 0o600)?)
}

/// Writes a VM's links again and has its shim read them.
pub async fn reload_links(plan: &Plan) -> Result<(), StepError> {
    file::replace_json(&plan.dirs.run.join("shim.json"), &plan.shim, 0o600)?;
    Ok(client::reload(&plan.shim.sockets.control).await?)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// As much of a log's end as is shown, in bytes.
const TAIL: u64 = 8 << 10;

/// The last lines of a log, indented below the message that they explain; at most 50 lines and 8 KiB.
async fn tail(log: PathBuf) -> String {
    let read = move || {
        use std::io::{Read, Seek, SeekFrom};
        let mut bytes = Vec::new();
        if let Ok(mut file) = fs::File::open(log) {
            let length = file.metadata().map_or(0, |metadata| metadata.len());
            let _ = file.seek(SeekFrom::Start(length.saturating_sub(TAIL)));
            let _ = file.take(TAIL).read_to_end(&mut bytes);
        }
        bytes
    };
    last_lines(&thread::run(read).await.unwrap_or_default())
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(50)..].iter().map(|line| format!("\n  {line}")).collect()
}

#[cfg(test)]
mod tests;
