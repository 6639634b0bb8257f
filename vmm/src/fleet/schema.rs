//! The types of the fleet file, schema 1. Unknown keys are refused everywhere.

use super::{
    gpus::Gpu,
    limits::{CPU_PERCENT_MAX, CPU_WEIGHT_MAX, PIDS_MAX, PIDS_MIN, VCPUS_MAX},
    units::Size,
};
use lair_guest::wire::AGENT_PORT;
use lair_virtiofs::store;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// The schema number that this release reads and writes.
pub const SCHEMA: u32 = 1;

/// The first vsock port that a link may use.
const PORT_MIN: u32 = AGENT_PORT + 1;

/// The last vsock port that a link may use; the one after it is vsock's word for "any".
const PORT_MAX: u32 = u32::MAX - 1;

/// A fleet: all that one host runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// The version of this format: 1.
    pub schema: u32,
    /// How this host runs its VMs.
    #[serde(default)]
    pub host: Host,
    /// Where store paths come from.
    pub store: Store,
    /// The VMs, by name.
    #[serde(default)]
    pub vms: BTreeMap<String, Vm>,
    /// The links, by name: which VM may connect to what. Anything else is refused.
    #[serde(default)]
    pub links: BTreeMap<String, Link>,
    /// Who may do what over the API of laird.
    #[serde(default)]
    pub access: Access,
    /// Counters for Prometheus.
    #[serde(default)]
    pub metrics: Metrics,
}

/// Who may do what over the API of laird: names of users, or of groups with an `@` before them, or their numbers.
///
/// Root and the user who runs laird may always administer. Whoever else is to be served must be in the group `lair`, to which the socket
/// belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Who may look: status, logs, events, metrics.
    pub view: Vec<String>,
    /// Who may also start, stop, restart and kill VMs, and get into them (exec, shell, console, connect).
    pub operate: Vec<String>,
    /// Who may also apply a fleet file and read the audit log.
    pub administer: Vec<String>,
}

impl Default for Access {
    fn default() -> Self {
        Self { view: vec![], operate: vec!["@lair".into()], administer: vec![] }
    }
}

impl Access {
    /// No access but for root and the user who runs laird.
    pub fn nobody() -> Self {
        Self { view: vec![], operate: vec![], administer: vec![] }
    }
}

/// Counters for Prometheus.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// A loopback `ADDRESS:PORT` where everybody on this host may read them, besides the API of laird.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

/// How this host runs its VMs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// Hardware acceleration.
    pub accel: Accel,
    /// What holds VMs to what they may take of the host.
    pub limits: Limits,
    /// Whom the processes of VMs run as, where `laird` is root. Otherwise all share its user.
    pub users: Users,
    /// The numbers from which VMs get their users and groups. Without it, 65536 from 2100000000 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<IdRange>,
}

/// What holds VMs to what they may take of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Limits {
    /// cgroup v2, with the controllers cpu, memory and pids (and io, where a VM has limits for its disks), or do not start.
    #[default]
    Cgroup,
    /// Nothing: a VM can take all that the host has. Said by `vmctl status` and `vmctl doctor`.
    None,
}

/// Whom the processes of VMs run as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Users {
    /// Users of their own, and a group for each VM. They have to reach kernels and the directories of `laird`.
    #[default]
    Own,
    /// The user of `laird`. Said by `vmctl status`.
    Shared,
}

/// A range of numbers for users and groups that nobody else on the host uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// The first number.
    pub first: u32,
    /// How many there are; each VM takes eight.
    pub count: u32,
}

/// Hardware acceleration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM if `/dev/kvm` opens and the CPU shows vmx or svm, emulation otherwise.
    #[default]
    Auto,
    /// KVM, or do not start.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Where store paths come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Nix stores of the host, in the order in which a path is looked up.
    pub sources: Vec<Source>,
}

/// A Nix store on the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Source {
    /// A store directory and its database.
    Store(StoreSource),
    /// A chroot store: `nix/store` and `nix/var/nix/db` below a root.
    Root(RootSource),
}

impl Source {
    /// The directory that holds the store paths.
    pub fn store_dir(&self) -> PathBuf {
        match self {
            Self::Store(source) => source.store.clone(),
            Self::Root(source) => source.root.join("nix/store"),
        }
    }

    /// The directory that holds `db.sqlite`.
    pub fn database_dir(&self) -> PathBuf {
        match self {
            Self::Store(source) => source.database.clone(),
            Self::Root(source) => source.root.join("nix/var/nix/db"),
        }
    }

    /// Both, for reading it.
    pub fn as_store(&self) -> store::Source {
        store::Source { store: self.store_dir(), database: self.database_dir() }
    }
}

/// A store directory and its database.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StoreSource {
    /// The directory that holds the store paths, such as `/nix/store`.
    pub store: PathBuf,
    /// The directory that holds `db.sqlite`, such as `/nix/var/nix/db`.
    pub database: PathBuf,
}

/// A chroot store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RootSource {
    /// The directory that holds `nix/store` and `nix/var/nix/db`.
    pub root: PathBuf,
}

/// What a VM is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Evaluates and hands out builds.
    Hydra,
    /// Signs and serves results.
    Cache,
    /// Builds. Its services, and so its builds, cannot open vsock.
    Builder,
    /// Nothing special.
    #[default]
    Plain,
}

/// A microVM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What it is for.
    #[serde(default)]
    pub role: Role,
    /// The number of virtual CPUs.
    #[schemars(range(min = 1, max = VCPUS_MAX))]
    pub vcpus: u32,
    /// Its memory.
    pub memory: Size,
    /// The kernel image: a path in a source, or any other absolute path on the host.
    pub kernel: PathBuf,
    /// The directory of the kernel's modules (`lib/modules/VERSION`), from which Lair builds the initramfs.
    pub modules: PathBuf,
    /// The system's own init, in the view. Without it the agent runs the services listed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Added to the kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Store paths whose closure is the VM's view.
    pub roots: Vec<PathBuf>,
    /// A store path of the view whose `bin` is the guest's PATH and whose `etc` becomes its `/etc`; for VMs without `init`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PathBuf>,
    /// What makes the guest's `/nix/store` writable. Without it the store is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// Disks, made and formatted on first use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Devices of the host that only this VM has while it runs: GPUs, or others. Its memory is pinned then. They come and go at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
    /// The network card.
    #[serde(default)]
    pub network: Network,
    /// Secrets, by name: the files on the host that hold them, and what to restart in the guest when they change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub credentials: BTreeMap<String, Credential>,
    /// Programs that the agent keeps running; for VMs without `init`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// What its processes may take of the host, where the defaults do not fit.
    #[serde(default, skip_serializing_if = "VmLimits::is_default")]
    pub limits: VmLimits,
    /// Whether `laird` starts the VM by itself.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Whether it is started again when it fails or its guest powers off.
    #[serde(default)]
    pub restart: Restart,
}

/// Whether a VM is started again by itself: after a pause that doubles from 1 s to 5 min, at most 5 times in 10 minutes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// When it fails; a guest that powers itself off stays off.
    #[default]
    OnFailure,
    /// Never.
    Never,
    /// When it fails, and when its guest powers itself off.
    Always,
}

fn yes() -> bool {
    true
}

/// What the processes of a VM may take of the host together. Memory needs no number: it is that of the guest, what its processes
/// need besides, and `store_cache`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmLimits {
    /// Time on the host's processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuLimits>,
    /// The most processes and threads on the host, 1024 and one for each virtual CPU if not given.
    #[schemars(range(min = PIDS_MIN, max = PIDS_MAX))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// Reads and writes on the disk that holds the VM's volumes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoLimits>,
    /// How much of the store the host may keep in its page cache for this VM, 512MiB if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_cache: Option<Size>,
}

impl VmLimits {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Time on the host's processors.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuLimits {
    /// At most this much, in percent of one processor: 250 is two and a half of them. No bound if not given.
    #[schemars(range(min = 1, max = CPU_PERCENT_MAX))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
    /// The share beside other VMs where there is not enough for all, 100 if not given.
    #[schemars(range(min = 1, max = CPU_WEIGHT_MAX))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

/// Reads and writes a second; no bound for what is not given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IoLimits {
    /// Bytes read a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<Size>,
    /// Bytes written a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<Size>,
    /// Reads a second.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_ops: Option<u32>,
    /// Writes a second.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_ops: Option<u32>,
}

/// A secret for a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Credential {
    /// The file on the host that holds it. The guest is given what it holds later on as well.
    File(PathBuf),
    /// The same, and who has to know of a change.
    Rotated(RotatedCredential),
}

/// A secret of which something in the guest has to know when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RotatedCredential {
    /// The file on the host that holds it.
    pub file: PathBuf,
    /// What is restarted in the guest after a change: units of a system with `init`, such as `nginx.service`; otherwise names of services
    /// listed here.
    #[serde(default)]
    pub restart: Vec<String>,
}

impl Credential {
    /// The file on the host.
    pub fn file(&self) -> &std::path::Path {
        match self {
            Self::File(file) | Self::Rotated(RotatedCredential { file, .. }) => file,
        }
    }

    /// What is restarted after a change.
    pub fn restart(&self) -> &[String] {
        match self {
            Self::File(_) => &[],
            Self::Rotated(rotated) => &rotated.restart,
        }
    }
}

impl From<PathBuf> for Credential {
    fn from(file: PathBuf) -> Self {
        Self::File(file)
    }
}

/// What makes a guest's `/nix/store` writable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Overlay {
    /// Writes go to memory, at most this much, and are gone with the guest.
    Tmpfs(Size),
    /// Writes go to the volume of this name.
    Volume(String),
}

/// A disk of a VM: a file on the host with an ext4 file system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name: at most 20 letters, digits and hyphens.
    pub name: String,
    /// Its size. The file is sparse.
    pub size: Size,
    /// Where the guest mounts it.
    pub mount: PathBuf,
}

/// A VM's network card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// None: links only.
    #[default]
    None,
}

/// A program that the agent keeps running.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name in logs and events.
    pub name: String,
    /// The program, an absolute path, and its arguments.
    pub command: Vec<String>,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// What accepts connections once it is up: a unix socket's path or `ADDRESS:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
}

/// A permission to connect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Who may connect: VMs, or `host`.
    pub from: Vec<String>,
    /// Where the connecting side finds it besides `/run/lair/links/NAME`: a loopback `ADDRESS:PORT` (in the guest, or on the
    /// host for links from `host`) or, on the host, a unix socket's path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// What is reached.
    pub to: Target,
}

/// What a link reaches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Target {
    /// A VM.
    Vm(VmTarget),
    /// A unix socket of the host.
    Host(HostTarget),
}

/// A port of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmTarget {
    /// The VM's name.
    pub vm: String,
    /// The vsock port; those below 2 are Lair's own.
    #[schemars(range(min = PORT_MIN, max = PORT_MAX))]
    pub port: u32,
    /// What the agent dials behind the port: a unix socket's path or `ADDRESS:PORT`. Without it, a program in the guest
    /// listens on the vsock port itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<String>,
}

/// A unix socket of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostTarget {
    /// The socket's path.
    pub host: PathBuf,
}
