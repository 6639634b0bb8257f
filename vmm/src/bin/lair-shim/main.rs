//! `lair-shim`: the process beside each VM that carries what must outlive `laird`.

use clap::Parser;
use lair_vmm::{
    arguments::Shim as Arguments,
    shim::serve::{ServeError, serve},
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use std::process::ExitCode;

/// Descriptors that a full shim needs: two for each of 1024 links and 64 sessions, and some.
const DESCRIPTORS: u64 = 4096;

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
