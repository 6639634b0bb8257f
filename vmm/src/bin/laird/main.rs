//! `laird`: the supervisor.

use anyhow::{Context, Result};
use clap::Parser;
use lair_vmm::{
    api,
    arguments::Laird as Arguments,
    cgroup::Hierarchy,
    fleet::{
        self, Loaded,
        limits::HostFacts,
        schema::{Fleet, Limits, Users},
    },
    host::{
        Host, facts, happenings,
        ids::{self, Ids},
        memory,
        pci::Sysfs,
        process,
        tools::Tools,
    },
    passthrough::{
        Devices,
        write::{self, Writer},
    },
    state::{
        dirs::{self, Dirs},
        lock,
    },
    supervisor::{Supervisor, shutdown},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};

fn main() -> ExitCode {
    if let Some(done) = write::run(std::env::args_os()) {
        return done;
    }
    memory::set_up();
    lair_vmm::host::logging::start();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("laird: {error:#}");
            let wrong_configuration = error.is::<fleet::Problems>();
            ExitCode::from(if wrong_configuration { 2 } else { 1 })
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    raise_descriptors();
    // Whatever it was started with: others may look into the run directory, and write nowhere.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let absolute = |path: PathBuf| std::path::absolute(path);
    let dirs = Dirs {
        state: absolute(arguments.state_dir.unwrap_or_else(Dirs::default_state))?,
        run: absolute(arguments.run_dir.unwrap_or_else(Dirs::default_run))?,
    };
    let fleet_file = absolute(arguments.fleet.unwrap_or_else(Dirs::default_fleet))?;
    let facts = HostFacts::read().context("Cannot read how much memory the host has")?;
    let loaded = fleet::load_file(&fleet_file, &facts)?;
    let engine = facts::engine(loaded.fleet.host.accel)
        .with_context(|| format!("{} has host.accel = \"kvm\"", fleet_file.display()))?;
    if engine == facts::Engine::Tcg {
        tracing::warn!("no KVM: guests run under emulation, many times slower");
    }
    let boot_id = process::boot_id().context("Cannot read the boot id")?;
    dirs.create()?;
    let _lock = lock::lock(&dirs.run)?;
    let (cgroups, ids) = (cgroups(&loaded.fleet)?, ids(&loaded.fleet, &dirs)?);
    let (sysfs, writer) = kernel();
    let host = Host {
        facts,
        engine,
        tools: Tools::of_this_process(),
        cgroups,
        ids,
        devices: Devices::open(sysfs.clone(), &dirs, &boot_id, writer),
        address_bits: facts::address_bits(),
        sysfs,
        boot_id,
        happened: happenings(),
    };
    // One thread suffices: laird is in no data path, and what blocks runs on threads of its own.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(dirs, host, fleet_file, loaded))
}

/// The kernel's files, and who writes to them. Tests put others in their place; a release build has no such seam.
fn kernel() -> (Sysfs, Writer) {
    let (mut sysfs, mut writer) = (Sysfs::of_this_host(), Writer::of_this_program());
    if cfg!(debug_assertions) {
        if let Some(root) = std::env::var_os("LAIR_SYSFS") {
            sysfs = Sysfs::at(Path::new(&root));
        }
        if let Some(program) = std::env::var_os("LAIR_SYSFS_WRITER") {
            writer.program = program.into();
        }
    }
    (sysfs, writer)
}

/// More connections than a service has descriptors by default (1024) must not keep VMs from being started.
fn raise_descriptors() {
    const WANTED: u64 = 16_384;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer it works as well, up to that many connections and VMs.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, WANTED.min(hard).max(soft), hard);
    }
}

/// Where VMs get their cgroups. A host that cannot limit them must be told that it need not.
fn cgroups(fleet: &Fleet) -> Result<Option<Hierarchy>> {
    if fleet.host.limits == Limits::None {
        tracing::warn!("host.limits is \"none\": VMs are not limited, and can take all that the host has");
        return Ok(None);
    }
    let io = fleet.vms.values().any(|vm| vm.limits.io.is_some());
    let hierarchy = Hierarchy::find(io).context("VMs cannot be limited")?;
    tracing::info!(cgroup = %hierarchy.dir().display(), "VMs are limited");
    Ok(Some(hierarchy))
}

/// Who has which users.
fn ids(fleet: &Fleet, dirs: &Dirs) -> Result<Option<Arc<Ids>>> {
    if !dirs::is_root() {
        if fleet.host.ids.is_some() {
            tracing::warn!("host.ids is of no use where laird is not root: all processes share its user");
        }
        return Ok(None);
    }
    if fleet.host.users == Users::Shared {
        tracing::warn!("host.users is \"shared\": processes of VMs run as root");
        return Ok(None);
    }
    let range = fleet.host.ids.unwrap_or(ids::DEFAULT);
    ids::mapped(range)?;
    let (file, vms) = (dirs.state.join("ids.json"), dirs.state.join("vms"));
    Ok(Some(Arc::new(Ids::open(&file, &vms, range, |vm| fleet.vms.contains_key(vm))?)))
}

async fn serve(dirs: Dirs, host: Host, fleet_file: PathBuf, loaded: Loaded) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = listen(&dirs)?;
    tokio::spawn(memory::give_back());
    let supervisor = Supervisor::start(dirs, host, fleet_file, loaded).await;
    // Not an error where no systemd waits for it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!("ready");
    tokio::select! {
        served = api::server::serve(listener, Arc::clone(&supervisor)) => return served.context("The API ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => return Ok(()),
    }
    if shutdown::host_stops(Path::new("systemctl")).await {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        supervisor.shut_down(shutdown::LIMIT).await;
    }
    Ok(())
}

/// Binds the API socket. The lock is held, so a socket that is there is of a `laird` that is gone.
fn listen(dirs: &Dirs) -> Result<UnixListener> {
    let path = dirs.api_socket();
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("Cannot listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660))?;
    // Where there is no such group, only root is served.
    if let Ok(Some(group)) = nix::unistd::Group::from_name("lair") {
        let _ = nix::unistd::chown(&path, None, Some(group.gid));
    }
    Ok(listener)
}
