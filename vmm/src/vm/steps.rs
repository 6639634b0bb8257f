//! The steps of a start: the effects behind [`super::machine::Step`]. Each may be repeated; [`Instance::clean_up`] undoes them.

use super::{
    budget::Budget,
    generation::{self, GenerationError},
    machine::{Part, Stage, Step},
    plan::{Plan, PlanError, plan},
    users::Users,
};
use crate::{
    cgroup::{self, CgroupError, VmCgroup, values::Values},
    error::chain,
    fleet::schema::Fleet,
    host::{
        Host,
        confine::Confinement,
        facts::Engine,
        ids::IdsError,
        listen::{ListenError, listen},
        process::{self, Launch, Process, ProcessError, Sink},
        tools::{self, Missing},
    },
    hypervisor::{
        Event,
        qemu::{
            command,
            qmp::{Qmp, QmpError},
        },
    },
    shim::client::{self, ClientError},
    state::{
        dirs::{Dirs, DirsError},
        file::{self, WriteError},
    },
};
use lair_guest::{initramfs, wire::message::Ask};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

/// How long a program of ours may take to listen, or to end when told to. A loaded host has been seen to need over a second.
const PROMPT: Duration = Duration::from_secs(10);

/// How often a condition is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(10);

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The fleet file has no such VM any more.
    #[error("The fleet file has no VM of this name")]
    NotInFleet,
    /// The view cannot be made.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A directory cannot be used.
    #[error(transparent)]
    Dirs(#[from] DirsError),
    /// There are no users for it.
    #[error(transparent)]
    Ids(#[from] IdsError),
    /// It cannot be limited.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A socket for it cannot be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A program is missing.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A volume cannot be made.
    #[error("Cannot make the volume {path}: {reason}")]
    Volume {
        /// The image.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The view's metadata cannot be indexed.
    #[error("Cannot index the view {view}: {reason}")]
    Index {
        /// The view file.
        view: PathBuf,
        /// What was said about it.
        reason: String,
    },
    /// The initramfs cannot be made.
    #[error("Cannot make the initramfs")]
    Initramfs(#[from] initramfs::InitramfsError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file cannot be read.
    #[error("Cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// A process cannot be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A process ended at once, or does not do what it is for.
    #[error("{part} did not start: {reason}{log}")]
    NotUp {
        /// Which.
        part: Part,
        /// What was seen.
        reason: String,
        /// The end of its log, on lines of its own.
        log: String,
    },
    /// QEMU does not obey.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The shim does not obey.
    #[error(transparent)]
    Shim(#[from] ClientError),
    /// A task of ours was lost.
    #[error("Internal error: a task ended without a result")]
    Lost,
}

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

/// A VM that is being started, runs, or ends.
#[derive(Debug, Default)]
pub struct Instance {
    /// What it is to be, once the first step has found out.
    pub plan: Option<Arc<Plan>>,
    /// What runs of it.
    pub processes: BTreeMap<Part, Arc<Process>>,
    /// What processes have said that no shim reads yet.
    unread: BTreeMap<Part, OwnedFd>,
    /// What it is limited by.
    pub cgroup: Option<VmCgroup>,
    qmp: Option<Qmp>,
}

impl Instance {
    /// An instance that runs already.
    pub fn adopted(plan: Plan, processes: BTreeMap<Part, Arc<Process>>, cgroup: Option<VmCgroup>) -> Self {
        Self { plan: Some(Arc::new(plan)), processes, cgroup, ..Self::default() }
    }

    /// Performs a step. The hypervisor's events go to `events`.
    pub async fn perform(
        &mut self,
        step: Step,
        context: &Context,
        fleet: &Arc<Fleet>,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Result<(), StepError> {
        if step == Step::View {
            let (context, fleet) = (context.clone(), Arc::clone(fleet));
            let plan = blocking(move || view(&context, &fleet)).await?;
            self.plan = Some(Arc::new(plan));
            return Ok(());
        }
        let plan = self.plan.clone().ok_or(StepError::Lost)?;
        let find = |tool| context.host.tools.find(tool);
        let users = Users::of(context.host.ids.as_deref(), &context.name)?;
        let confined = |part| users.confinement(part, &plan, context.host.cgroups.as_ref());
        match step {
            Step::View => Ok(()),
            Step::Directories => {
                plan.dirs.create()?;
                users.own_directories(&context.dirs, &plan)?;
                self.cgroup = context.host.cgroups.as_ref().map(|cgroups| cgroups.vm(&plan.name));
                if let Some(cgroup) = &self.cgroup {
                    limit(cgroup, &plan)?;
                }
                Ok(())
            }
            Step::Index => index(&plan, &find(tools::VIRTIOFS)?).await,
            Step::Volumes if plan.vm.volumes.is_empty() => Ok(()),
            Step::Volumes => {
                let mkfs = find(tools::MKFS)?;
                let made = move || {
                    volumes(&plan, &mkfs)?;
                    Ok(users.own_volumes(&plan)?)
                };
                blocking(made).await
            }
            Step::Initramfs => {
                let guest = find(tools::GUEST)?;
                let written = move || {
                    write_initramfs(&plan, &guest)?;
                    Ok(users.own_initramfs(&plan)?)
                };
                blocking(written).await
            }
            Step::StoreBackend => {
                let listener = listen(&plan.machine.store_socket, 0o660, users.shared())?;
                let arguments = virtiofs_arguments(&plan, listener.as_raw_fd(), users.store());
                let mut confinement = confined(Part::StoreBackend)?;
                confinement.keep.push(listener.into());
                self.spawn(Part::StoreBackend, &plan, find(tools::VIRTIOFS)?, arguments, confinement).await?;
                // It makes this one as soon as it has something to serve.
                self.await_socket(Part::StoreBackend, &plan, &plan.dirs.socket(STORE_CONTROL)).await
            }
            Step::VsockDevice => {
                let arguments = vsock_arguments(&plan.machine.vsock_socket, &plan.shim.vsock);
                let confinement = confined(Part::VsockDevice)?;
                let program = find(tools::VHOST_DEVICE_VSOCK)?;
                self.spawn(Part::VsockDevice, &plan, program, arguments, confinement).await?;
                self.await_socket(Part::VsockDevice, &plan, &plan.machine.vsock_socket).await
            }
            Step::Hypervisor => {
                let arguments = command::arguments(&plan.machine);
                let confinement = confined(Part::Hypervisor)?;
                self.spawn(Part::Hypervisor, &plan, find(tools::QEMU)?, arguments, confinement).await?;
                self.connect_qmp(&plan, events).await
            }
            Step::Shim => {
                let config = plan.dirs.run.join("shim.json");
                write_json(&config, &plan.shim)?;
                let mut arguments = vec!["--config".into(), text(&config)];
                let mut confinement = confined(Part::Shim)?;
                for (part, pipe) in std::mem::take(&mut self.unread) {
                    let log = plan.dirs.log(log_name(part));
                    arguments.extend(["--log".into(), format!("{}={}", pipe.as_raw_fd(), text(&log))]);
                    confinement.keep.push(pipe);
                }
                self.spawn(Part::Shim, &plan, find(tools::SHIM)?, arguments, confinement).await?;
                self.await_socket(Part::Shim, &plan, &plan.shim.sockets.control).await
            }
            Step::Resume => self.resume(&plan).await,
        }
    }

    async fn spawn(
        &mut self,
        part: Part,
        plan: &Plan,
        program: PathBuf,
        arguments: Vec<String>,
        confinement: Confinement,
    ) -> Result<(), StepError> {
        let log = plan.dirs.log(log_name(part));
        // One start's output explains that start; an earlier one's would only mislead.
        let _ = fs::remove_file(&log);
        let output = match part {
            // It says little, and nobody else could read it.
            Part::Shim => Sink::File(log),
            Part::Hypervisor | Part::StoreBackend | Part::VsockDevice => {
                let (reader, writer) = process::pipe().map_err(|e| ProcessError::Log(log, e))?;
                self.unread.insert(part, reader);
                Sink::Pipe(writer)
            }
        };
        let launch = Launch { program, arguments, environment: vec![], output, confinement };
        tracing::debug!(vm = plan.name, program = %launch.program.display(), arguments = ?launch.arguments, "starting");
        self.processes.insert(part, Arc::new(Process::spawn(&launch)?));
        Ok(())
    }

    /// Waits until a process listens; its end or its silence is a failure that carries the end of its log.
    async fn await_socket(&mut self, part: Part, plan: &Plan, socket: &Path) -> Result<(), StepError> {
        let listening = async {
            // The vhost-user devices serve one connection, so they are not probed by connecting.
            while !fs::symlink_metadata(socket).is_ok_and(|m| m.file_type().is_socket()) {
                sleep(POLL).await;
            }
        };
        self.unless_it_ends(part, plan, PROMPT, listening).await?.ok_or_else(|| {
            self.not_up(part, plan, format!("{} did not appear within {PROMPT:?}", socket.display()))
        })
    }

    /// A process did not do what it is for; what it said is told.
    fn not_up(&mut self, part: Part, plan: &Plan, reason: String) -> StepError {
        self.keep_unread(plan);
        StepError::NotUp { part, reason, log: last_lines(&tail(&plan.dirs.log(log_name(part)))) }
    }

    /// Puts on disk what processes have said, where there is no shim to do that.
    fn keep_unread(&mut self, plan: &Plan) {
        for (part, pipe) in std::mem::take(&mut self.unread) {
            let said = waiting(pipe);
            if let Err(error) = file::replace(&plan.dirs.log(log_name(part)), &said, 0o640) {
                tracing::warn!(vm = plan.name, error = chain(&error), "cannot keep what {part} said");
            }
        }
    }

    async fn unless_it_ends<T>(
        &mut self,
        part: Part,
        plan: &Plan,
        patience: Duration,
        wait: impl Future<Output = T>,
    ) -> Result<Option<T>, StepError> {
        let process = self.processes.get(&part).cloned().ok_or(StepError::Lost)?;
        tokio::select! {
            how = process.ended() => Err(self.not_up(part, plan, format!("it {how}"))),
            outcome = timeout(patience, wait) => Ok(outcome.ok()),
        }
    }

    /// Connects to the hypervisor's control socket.
    pub async fn connect_qmp(
        &mut self,
        plan: &Plan,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Result<(), StepError> {
        let connect = Qmp::connect(&plan.machine.control_socket, PROMPT, events.clone());
        let qmp = self.unless_it_ends(Part::Hypervisor, plan, PROMPT * 2, connect).await?;
        let qmp =
            qmp.ok_or_else(|| self.not_up(Part::Hypervisor, plan, "no answer on its control socket".into()))?;
        // It may have ended, and its connection be seen to end first: what it said is worth more than that.
        self.qmp = Some(qmp.map_err(|error| self.not_up(Part::Hypervisor, plan, chain(&error)))?);
        Ok(())
    }

    async fn resume(&mut self, plan: &Plan) -> Result<(), StepError> {
        let control = &plan.shim.sockets.control;
        let connected = async {
            loop {
                if client::status(control).await.is_ok_and(|status| status.console) {
                    return;
                }
                sleep(POLL).await;
            }
        };
        self.unless_it_ends(Part::Shim, plan, PROMPT, connected).await?.ok_or_else(|| {
            self.not_up(Part::Shim, plan, format!("it did not connect to the console within {PROMPT:?}"))
        })?;
        self.qmp.as_mut().ok_or(StepError::Lost)?.execute("cont").await?;
        Ok(())
    }

    /// Asks the guest to end, as hard as `stage` says.
    pub async fn end(&mut self, stage: Stage) -> Result<(), StepError> {
        match stage {
            Stage::Agent => {
                let plan = self.plan.clone().ok_or(StepError::Lost)?;
                client::ask(&plan.shim.sockets.control, Ask::PowerOff).await?;
            }
            Stage::PowerButton => {
                self.qmp.as_mut().ok_or(StepError::Lost)?.execute("system_powerdown").await?;
            }
            Stage::Terminate => self.signal(Part::Hypervisor, Signal::SIGTERM),
            Stage::Kill => self.signal(Part::Hypervisor, Signal::SIGKILL),
        }
        Ok(())
    }

    fn signal(&self, part: Part, signal: Signal) {
        if let Some(process) = self.processes.get(&part) {
            process.signal(signal);
        }
    }

    /// Ends every process, the hypervisor first, and removes the runtime files.
    pub async fn clean_up(&mut self) {
        self.qmp = None;
        if let Some(plan) = self.plan.clone() {
            self.keep_unread(&plan);
        }
        for part in [Part::Hypervisor, Part::VsockDevice, Part::StoreBackend, Part::Shim] {
            let Some(process) = self.processes.remove(&part) else { continue };
            process.signal(Signal::SIGTERM);
            if timeout(PROMPT, process.ended()).await.is_err() {
                process.signal(Signal::SIGKILL);
                let _ = timeout(PROMPT, process.ended()).await;
            }
        }
        // What a process started and left, and the cgroup itself.
        if let Some(cgroup) = self.cgroup.take()
            && let Err(error) = cgroup.remove().await
        {
            tracing::error!(vm = cgroup.name(), error = chain(&error), "degraded");
        }
        if let Some(plan) = self.plan.take()
            && let Err(error) = fs::remove_dir_all(&plan.dirs.run)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(vm = plan.name, directory = %plan.dirs.run.display(), %error, "cannot remove the run directory");
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(StepError::Lost))
}

/// Makes the VM's cgroup with its limits.
fn limit(cgroup: &VmCgroup, plan: &Plan) -> Result<(), StepError> {
    let values = Values::of(&plan.vm, plan.machine.engine == Engine::Tcg);
    let device = match &values.io {
        None => None,
        Some(_) => {
            cgroup::backing(&plan.dirs.state).map_err(|e| StepError::Read(plan.dirs.state.clone(), e))?
        }
    };
    if values.io.is_some() && device.is_none() {
        let directory = plan.dirs.state.display();
        tracing::warn!(vm = plan.name, %directory, "its reads and writes are not limited: the file system has no disk of its own");
    }
    Ok(cgroup.create(&values, device)?)
}

fn view(context: &Context, fleet: &Fleet) -> Result<Plan, StepError> {
    let vm = fleet.vms.get(&context.name).ok_or(StepError::NotInFleet)?;
    let generation = generation::make(vm, &fleet.store.sources, &context.dirs.generations())?;
    Ok(plan(&context.name, vm, fleet, &context.dirs, context.host.engine, generation)?)
}

/// Brings the index up to date. Runs for several VMs wait for each other.
async fn index(plan: &Plan, program: &Path) -> Result<(), StepError> {
    let failed = |reason: String| StepError::Index { view: plan.generation.view.clone(), reason };
    let mut command = tokio::process::Command::new(program);
    command.arg("index").args(store_arguments(plan)).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|e| failed(e.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(failed(last_lines(&output.stderr))) }
}

fn volumes(plan: &Plan, mkfs: &Path) -> Result<(), StepError> {
    for (volume, disk) in plan.vm.volumes.iter().zip(&plan.machine.disks) {
        if disk.image.exists() {
            continue;
        }
        let failed = |reason: String| StepError::Volume { path: disk.image.clone(), reason };
        // Made beside and renamed: an interrupted format is never taken for a volume.
        let beside = disk.image.with_extension("new");
        let file = fs::File::create(&beside).map_err(|e| failed(e.to_string()))?;
        file.set_len(volume.size.0).map_err(|e| failed(e.to_string()))?;
        let output = std::process::Command::new(mkfs)
            .args(["-q", "-F", "-m", "0", "-L", &volume.name.chars().take(16).collect::<String>()])
            .arg(&beside)
            .output()
            .map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        file.sync_all().map_err(|e| failed(e.to_string()))?;
        fs::rename(&beside, &disk.image).map_err(|e| failed(e.to_string()))?;
    }
    Ok(())
}

fn write_initramfs(plan: &Plan, guest: &Path) -> Result<(), StepError> {
    let registration = fs::read(&plan.generation.registration)
        .map_err(|e| StepError::Read(plan.generation.registration.clone(), e))?;
    let mut archive = initramfs::base(guest, &plan.modules, initramfs::WANTED_MODULES)?;
    archive.extend(initramfs::overlay(&plan.boot, &registration)?);
    Ok(file::replace(&plan.machine.initramfs, &archive, 0o600)?)
}

/// What indexing and serving have in common.
fn store_arguments(plan: &Plan) -> Vec<String> {
    let mut arguments = vec!["--index".into(), text(&plan.index)];
    for store in &plan.stores {
        arguments.extend(["--source".into(), text(store)]);
    }
    arguments.extend(["--view".into(), text(&plan.generation.view)]);
    arguments
}

/// The store backend's control socket.
const STORE_CONTROL: &str = "store-control.sock";

/// `listener` is its vhost-user socket, `becomes` the user and group that it shall have.
fn virtiofs_arguments(plan: &Plan, listener: RawFd, becomes: Option<(u32, u32)>) -> Vec<String> {
    let mut arguments = vec!["--fd".into(), listener.to_string()];
    if let Some((uid, gid)) = becomes {
        arguments.extend(["--uid".into(), uid.to_string(), "--gid".into(), gid.to_string()]);
    }
    arguments.extend(store_arguments(plan));
    arguments.extend(["--queues".into(), plan.machine.store_queues.to_string()]);
    arguments.extend(["--control".into(), text(&plan.dirs.socket(STORE_CONTROL))]);
    arguments
}

/// `socket` is for the hypervisor, `hybrid` for the shim.
fn vsock_arguments(socket: &Path, hybrid: &Path) -> Vec<String> {
    // Not by its `--vm KEY=VALUE,...`, in which a comma cannot be escaped.
    let options = [
        // The guest's own number; it is not seen outside this device, so all VMs may have the same.
        ("--guest-cid", "3".into()),
        ("--socket", text(socket)),
        ("--uds-path", text(hybrid)),
        // The device drops packets of about 32 KiB and more, and so hangs the connection; a guest sends none larger than this.
        ("--tx-buffer-size", "16384".into()),
    ];
    options.into_iter().flat_map(|(option, value)| [option.into(), value]).collect()
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), StepError> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| WriteError {
        path: path.to_owned(),
        step: "encoding",
        source: e.into(),
    })?;
    Ok(file::replace(path, &text, 0o600)?)
}

/// Writes a VM's links again and has its shim read them.
pub async fn reload_links(plan: &Plan) -> Result<(), StepError> {
    write_json(&plan.dirs.run.join("shim.json"), &plan.shim)?;
    Ok(client::reload(&plan.shim.sockets.control).await?)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn log_name(part: Part) -> &'static str {
    match part {
        Part::Hypervisor => "hypervisor",
        Part::StoreBackend => "store",
        Part::VsockDevice => "vsock",
        Part::Shim => "shim",
    }
}

/// As much of a log's end as is looked at, in bytes.
const TAIL: u64 = 8 << 10;

/// The end of a log.
fn tail(log: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Nobody but laird and the shim writes there; it is not to be led elsewhere all the same.
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    if let Ok(mut file) = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(log) {
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(TAIL)));
        let _ = file.take(TAIL).read_to_end(&mut bytes);
    }
    bytes
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

/// The last lines of a text, indented below the message that they explain; at most 50 lines and 8 KiB.
fn last_lines(bytes: &[u8]) -> String {
    let most = usize::try_from(TAIL).unwrap_or(usize::MAX);
    let bytes = &bytes[bytes.len().saturating_sub(most)..];
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(50)..].iter().map(|line| format!("\n  {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cf12_paths_are_arguments_of_their_own() {
        for c in [",uds-path=", "=", " ", "+", "--config=", "%", "\""] {
            let (socket, hybrid) = (format!("/run/a{c}b/vsock.sock"), format!("/run/a{c}b/vsock"));
            let arguments = vsock_arguments(Path::new(&socket), Path::new(&hybrid));
            assert_eq!(arguments[2..6], ["--socket", &socket, "--uds-path", &hybrid]);
            assert_eq!(arguments.len(), 8);
        }
    }
}
