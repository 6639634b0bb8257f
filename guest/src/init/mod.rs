//! PID 1 of the initramfs: makes the guest's root, then becomes its system or keeps the agent running.
//!
//! The steps are in [`boot`], in order. Any that fails ends the boot: one line on the console, then power off.
//! Nothing here comes from a peer but the credentials; the configuration is the host's.

mod credentials;
mod kernel;
mod mounts;
mod profile;
mod reaper;
mod root;
mod store;
mod system;
mod volumes;

use crate::{clock, paths, report, trace::Trace};
use lair_guest::boot::{BootConfig, CONFIG, MODULES, REGISTRATION};
use nix::sys::{
    reboot::{RebootMode, reboot},
    stat::{Mode, umask},
};
use std::{
    convert::Infallible,
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::Duration,
};

/// Why the guest did not boot.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("Could not {what} `{path}`")]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{path}` is not a boot configuration")]
    Config {
        path: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Mount(#[from] mounts::MountError),
    #[error(transparent)]
    Root(#[from] root::RootError),
    #[error(transparent)]
    Volume(#[from] volumes::VolumeError),
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error(transparent)]
    Profile(#[from] profile::ProfileError),
    #[error(transparent)]
    Credentials(#[from] credentials::TakeError),
    #[error(transparent)]
    System(#[from] system::SystemError),
    #[error("Defect: init panicked")]
    Panicked,
}

/// Runs as PID 1, never returns: a PID 1 that ends is a kernel panic. `arguments` go to the system's own init.
pub(crate) fn run(arguments: &[OsString]) -> ! {
    let error = match catch_unwind(AssertUnwindSafe(|| boot(arguments))) {
        Ok(Err(error)) => error,
        Ok(Ok(never)) => match never {},
        Err(_) => InitError::Panicked,
    };
    // The failure may have come before there was a console.
    let _ = kernel::open_console();
    say(&format!("init failed: {}", report::chain(&error)));
    end(RebootMode::RB_POWER_OFF)
}

/// One line on the console.
fn say(line: &str) {
    // Not `eprintln!`: it panics where the console is gone.
    let _ = writeln!(io::stderr(), "lair-guest: {line}");
}

/// Powers off or restarts the machine.
fn end(how: RebootMode) -> ! {
    nix::unistd::sync();
    let _ = reboot(how);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn boot(arguments: &[OsString]) -> Result<Infallible, InitError> {
    let started = clock::uptime_ms();
    umask(Mode::from_bits_truncate(0o022));
    mounts::early()?;
    fs::create_dir_all(paths::RUN).map_err(failed("create", paths::RUN))?;
    let trace = Trace::new(paths::TRACE);
    trace.mark_at("init", started);
    kernel::load_modules(&text(MODULES)?)?;
    trace.mark("modules");
    let _ = kernel::open_console();
    let json = text(CONFIG)?;
    let config: BootConfig =
        serde_json::from_str(&json).map_err(|source| InitError::Config { path: CONFIG, source })?;
    kernel::set_up(&config.hostname)?;

    keep_for_the_agent(&json)?;
    // Open beyond the deletion of the initramfs; a registration can be some megabytes.
    let registration = File::open(REGISTRATION).ok();
    root::switch()?;
    trace.mark("root");

    volumes::mount_all(&config.volumes)?;
    trace.mark("volumes");
    store::mount(config.overlay.as_ref(), &config.volumes)?;
    trace.mark("store");
    profile::populate(&config.hostname, config.profile.as_deref())?;
    if let (Some(registration), Some(profile), Some(_)) = (registration, &config.profile, &config.overlay) {
        store::register(registration, profile)?;
        trace.mark("registration");
    }
    if !config.credentials.is_empty() {
        credentials::take(&config.credentials, config.init.is_some())?;
        trace.mark("credentials");
    }

    match &config.init {
        Some(init) => {
            if config.deny_vsock {
                say(
                    "deny_vsock has no effect on a system with its own init: its units have to deny AF_VSOCK",
                );
            }
            trace.mark("system");
            Ok(system::become_init(init, arguments)?)
        }
        None => reaper::run(),
    }
}

/// Copies what the agent needs out of the initramfs.
fn keep_for_the_agent(config: &str) -> Result<(), InitError> {
    fs::copy("/proc/self/exe", paths::PROGRAM).map_err(failed("write", paths::PROGRAM))?;
    fs::set_permissions(paths::PROGRAM, fs::Permissions::from_mode(0o755))
        .map_err(failed("set the mode of", paths::PROGRAM))?;
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(paths::CONFIG)
        .map_err(failed("create", paths::CONFIG))?;
    file.write_all(config.as_bytes()).map_err(failed("write", paths::CONFIG))
}

fn failed(what: &'static str, path: &'static str) -> impl FnOnce(io::Error) -> InitError {
    move |source| InitError::File { what, path: PathBuf::from(path), source }
}

fn text(path: &str) -> Result<String, InitError> {
    fs::read_to_string(path).map_err(|source| InitError::File {
        what: "read",
        path: PathBuf::from(path),
        source,
    })
}
