//! `lair-shim`: the process beside each VM that carries what must outlive `laird`.

use clap::Parser;
use lair_vmm::shim::{
    output::Log,
    serve::{ServeError, serve},
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use std::{path::PathBuf, process::ExitCode};

/// Descriptors that a full shim needs: two for each of 1024 links and 64 sessions, and some.
const DESCRIPTORS: u64 = 4096;

/// Carries the links, operators' sessions and console log of one VM.
///
/// It is started by laird, one for each VM, needs no privileges, and outlives laird: a link goes on while laird is
/// restarted or upgraded. It ends on SIGTERM or when laird tells it to.
///
/// It listens on three sockets that the configuration names: control (for laird: state, grants, reload, stop),
/// session (for operators with a ticket from laird) and dial (for the shims of VMs that have a link to this one);
/// on the vsock path with _4000000000 appended, for links that the guest opens; and where links from the host say.
///
/// Each link connection and each session leaves one JSON line in the audit log. What the terminals of sessions have shown is
/// recorded (asciicast v2).
#[derive(Parser)]
#[command(version, name = "lair-shim")]
struct Arguments {
    /// The VM's shim configuration, JSON, written by laird
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Keeps what comes out of a pipe, which is open already with its reading end as descriptor N, in FILE and FILE.1, at most 1 MiB each
    #[arg(long = "log", value_name = "N=FILE")]
    logs: Vec<Log>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Sockets get their exact rights after they are bound; until then they are for nobody else.
    umask(Mode::from_bits_truncate(0o027));
    raise_descriptors();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let usage = matches!(error.downcast_ref(), Some(ServeError::Config(_)));
            eprintln!("lair-shim: {error:#}");
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // One thread for all connections; what may block on a disk has threads of its own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(serve(&arguments.config, &arguments.logs));
    // A read of a file that hangs must not hold up the end.
    runtime.shutdown_background();
    Ok(served?)
}

fn raise_descriptors() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = DESCRIPTORS.min(hard).max(soft);
        // With fewer it works as well, up to that many connections.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
    }
}
