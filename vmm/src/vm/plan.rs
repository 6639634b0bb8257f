//! What one VM is to be: everything that its steps need, computed from the fleet file (pure).

use crate::{
    fleet::{
        resolve,
        schema::{Fleet, Overlay, Role, Target, Vm},
        units::Size,
    },
    host::facts::Engine,
    hypervisor::{Card, Disk, Machine, qemu::command::CMDLINE},
    passthrough::Given,
    shim::config::{Incoming, JournalTarget, Outgoing, OutgoingTarget, ShimConfig, ShimSockets},
    state::dirs::{Dirs, DirsError, VmDirs},
};
use lair_guest::{boot, wire::message::OutgoingLink};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The host's own name in `from` of a link.
pub const HOST: &str = "host";

/// The size at which a console log is rotated, and a guest's journal where the host has none: two such files hold many boots and bound
/// what a flood can fill.
const CONSOLE_LIMIT: u64 = 4 << 20;

/// The socket of the host's journal (sd_journal_print(3), systemd's "Native Journal Protocol").
const HOST_JOURNAL: &str = "/run/systemd/journal/socket";

/// A view with its registration on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// The view's id, also the name of the directory.
    pub id: String,
    /// The view file.
    pub view: PathBuf,
    /// The registration, as `nix-store --load-db` reads it.
    pub registration: PathBuf,
    /// Store paths in the view.
    pub paths: u64,
    /// The sum of their NAR sizes in bytes.
    pub bytes: u64,
}

/// What one VM is to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The VM's name.
    pub name: String,
    /// Its directories.
    pub dirs: VmDirs,
    /// Its part of the fleet file.
    pub vm: Vm,
    /// Its view.
    pub generation: Generation,
    /// The physical store directories in which the view's paths are looked up.
    pub stores: Vec<PathBuf>,
    /// The index of their metadata.
    pub index: PathBuf,
    /// The physical directory of the kernel's modules.
    pub modules: PathBuf,
    /// The hypervisor's part.
    pub machine: Machine,
    /// The guest's part.
    pub boot: boot::BootConfig,
    /// The shim's part.
    pub shim: ShimConfig,
}

impl Plan {
    /// The same with the devices that it was given, and as much room for them above its memory as the guest must be told of.
    pub fn with_devices(&self, given: &[Given], hole: Option<Size>) -> Self {
        let mut cards: Vec<Card> = Vec::new();
        for address in given.iter().flat_map(|given| &given.functions) {
            match cards.iter_mut().find(|card| card.functions.iter().any(|other| other.same_card(*address))) {
                Some(card) => card.functions.push(*address),
                None => cards.push(Card { functions: vec![*address] }),
            }
        }
        Self { machine: Machine { cards, hole, ..self.machine.clone() }, ..self.clone() }
    }
}

/// Why a plan cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A directory's name is too long.
    #[error(transparent)]
    Dirs(#[from] DirsError),
    /// A path of the fleet file leads nowhere.
    #[error("Cannot use {key} of VM {vm}")]
    Path {
        /// The VM.
        vm: String,
        /// The key.
        key: &'static str,
        /// Why.
        #[source]
        source: resolve::ResolveError,
    },
}

/// Plans the VM `name`, which is `vm` in `fleet`.
pub fn plan(
    name: &str,
    vm: &Vm,
    fleet: &Fleet,
    dirs: &Dirs,
    engine: Engine,
    generation: Generation,
) -> Result<Plan, PlanError> {
    let vm_dirs = dirs.vm(name)?;
    let bad_path = |key| move |source| PlanError::Path { vm: name.to_owned(), key, source };
    let kernel = resolve::file(&vm.kernel, &fleet.store.sources).map_err(bad_path("kernel"))?;
    let modules = resolve::directory(&vm.modules, &fleet.store.sources).map_err(bad_path("modules"))?;
    Ok(Plan {
        name: name.into(),
        machine: machine(name, vm, &vm_dirs, engine, kernel),
        boot: boot_config(name, vm),
        shim: shim(name, vm, fleet, dirs, &vm_dirs)?,
        stores: fleet.store.sources.iter().map(|source| source.store_dir()).collect(),
        index: dirs.index(),
        dirs: vm_dirs,
        vm: vm.clone(),
        generation,
        modules,
    })
}

/// A request queue for each virtual CPU, but no more than a store's page cache can feed. Linux uses the first one only before
/// 6.10, and no more than it has CPUs.
fn store_queues(vcpus: u32) -> u16 {
    const MOST: u16 = 4;
    u16::try_from(vcpus).unwrap_or(MOST).min(MOST)
}

fn machine(name: &str, vm: &Vm, dirs: &VmDirs, engine: Engine, kernel: PathBuf) -> Machine {
    Machine {
        name: name.into(),
        engine,
        vcpus: vm.vcpus,
        memory: vm.memory,
        kernel,
        initramfs: dirs.socket("initramfs"),
        cmdline: [CMDLINE, vm.cmdline.trim()].join(" ").trim_end().into(),
        store_socket: dirs.socket("store.sock"),
        store_queues: store_queues(vm.vcpus),
        vsock_socket: dirs.device().join("vhost.sock"),
        disks: vm
            .volumes
            .iter()
            .map(|volume| Disk { serial: volume.name.clone(), image: dirs.volume(&volume.name) })
            .collect(),
        cards: vec![],
        known_slots: true,
        hole: None,
        console_socket: dirs.hypervisor().join("console.sock"),
        control_socket: dirs.hypervisor().join("qmp.sock"),
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn boot_config(name: &str, vm: &Vm) -> boot::BootConfig {
    boot::BootConfig {
        hostname: name.into(),
        init: vm.init.as_deref().map(text),
        profile: vm.profile.as_deref().map(text),
        overlay: vm.overlay.as_ref().map(|overlay| match overlay {
            Overlay::Tmpfs(size) => boot::Overlay::Tmpfs { bytes: size.0 },
            Overlay::Volume(name) => boot::Overlay::Volume { name: name.clone() },
        }),
        volumes: vm
            .volumes
            .iter()
            .map(|volume| boot::Volume { name: volume.name.clone(), mount: text(&volume.mount) })
            .collect(),
        services: vm
            .services
            .iter()
            .map(|service| boot::Service {
                name: service.name.clone(),
                command: service.command.clone(),
                environment: service.environment.clone(),
                ready: service.ready.clone(),
            })
            .collect(),
        credentials: vm.credentials.keys().cloned().collect(),
        deny_vsock: vm.role == Role::Builder,
    }
}

/// The links of `name` as its shim needs them. The same file decides at both ends of a link, so a shim refuses what
/// another one's stale configuration would allow.
pub fn shim(
    name: &str,
    vm: &Vm,
    fleet: &Fleet,
    dirs: &Dirs,
    vm_dirs: &VmDirs,
) -> Result<ShimConfig, DirsError> {
    let mut outgoing = Vec::new();
    let mut incoming = Vec::new();
    for (link, rule) in &fleet.links {
        if rule.from.iter().any(|from| from == name) {
            let to = match &rule.to {
                Target::Host(target) => OutgoingTarget::Host { socket: target.host.clone() },
                Target::Vm(target) => {
                    OutgoingTarget::Vm { vm: target.vm.clone(), dial: sockets(&dirs.vm(&target.vm)?).dial }
                }
            };
            outgoing.push(Outgoing {
                link: OutgoingLink { name: link.clone(), listen: rule.listen.clone() },
                to,
            });
        }
        if let Target::Vm(target) = &rule.to
            && target.vm == name
        {
            let from_host = rule.from.iter().any(|from| from == HOST);
            incoming.push(Incoming {
                name: link.clone(),
                port: target.port,
                connect: target.connect.clone(),
                from: rule.from.clone(),
                host_listen: rule.listen.clone().filter(|_| from_host),
            });
        }
    }
    Ok(ShimConfig {
        vm: name.into(),
        vsock: vm_dirs.device().join("vsock"),
        console: vm_dirs.hypervisor().join("console.sock"),
        console_log: vm_dirs.log("console"),
        console_limit: CONSOLE_LIMIT,
        journal: Some(JournalTarget {
            socket: HOST_JOURNAL.into(),
            log: vm_dirs.log("journal"),
            limit: CONSOLE_LIMIT,
        }),
        audit_log: vm_dirs.state.join("audit.jsonl"),
        recordings: Some(vm_dirs.state.join("sessions")),
        sockets: sockets(vm_dirs),
        outgoing,
        incoming,
        credentials: vm.credentials.clone(),
    })
}

/// Where a VM's shim listens.
pub fn sockets(dirs: &VmDirs) -> ShimSockets {
    ShimSockets {
        control: dirs.socket("control.sock"),
        session: dirs.socket("session.sock"),
        dial: dirs.socket("dial.sock"),
    }
}

/// A plan for tests, of a VM with nothing special.
#[cfg(test)]
pub(crate) fn example(name: &str) -> Plan {
    let vm: Vm = serde_json::from_value(serde_json::json!({
        "vcpus": 1, "memory": "512MiB", "kernel": "/k", "modules": "/m", "roots": [],
    }))
    .unwrap();
    let fleet = serde_json::from_value(serde_json::json!({ "schema": 1, "store": { "sources": [] } }));
    let fleet: Fleet = fleet.unwrap();
    let dirs = Dirs { state: "/s".into(), run: "/r".into() };
    let vm_dirs = dirs.vm(name).unwrap();
    let generation =
        Generation { id: "g".into(), view: "/v".into(), registration: "/r".into(), paths: 1, bytes: 2 };
    Plan {
        name: name.into(),
        machine: machine(name, &vm, &vm_dirs, Engine::Tcg, "/k".into()),
        boot: boot_config(name, &vm),
        shim: shim(name, &vm, &fleet, &dirs, &vm_dirs).unwrap(),
        stores: vec![],
        index: dirs.index(),
        dirs: vm_dirs,
        vm,
        generation,
        modules: "/m".into(),
    }
}
