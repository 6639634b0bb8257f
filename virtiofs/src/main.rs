//! `lair-virtiofs`: the store backend of one VM.

use anyhow::{Context, Result};
use clap::Parser;
use lair_virtiofs::{
    control,
    fuse::server::Server,
    index::Index,
    quiet::Quiet,
    stats::Stats,
    store::Source,
    vhost::{device::Shared, files::Files, listen},
    view::View,
};
use std::{
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

/// Shows one guest its view of a Nix store, read-only, as a vhost-user virtiofs device.
///
/// It serves one connection after the other until it is told to stop (SIGTERM), so a guest may reboot and a hypervisor may start anew.
/// There is no way to write: requests to change anything are answered with EROFS, and what is not in the view does not exist.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Where to listen for the hypervisor
    #[arg(long, value_name = "PATH", required_unless_present = "fd")]
    socket: Option<PathBuf>,
    /// A descriptor that listens already
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    fd: Option<RawFd>,
    /// A directory of store paths on the host; each path of the view is looked up in them in order
    #[arg(long = "source", value_name = "DIR", required = true)]
    sources: Vec<PathBuf>,
    /// The view: logical store paths, one a line
    #[arg(long, value_name = "FILE")]
    view: PathBuf,
    /// The tag by which the guest mounts
    #[arg(long, default_value = "store", value_parser = tag)]
    tag: String,
    /// How many queues for requests there are
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    queues: u8,
    /// Where to tell counters: a client sends the line `stats` and gets Prometheus text
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

fn tag(text: &str) -> Result<String, String> {
    match text.len() {
        1..=36 => Ok(text.into()),
        length => Err(format!("a tag has 1 to 36 bytes, not {length}")),
    }
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LAIR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    match run(Arguments::parse()) {
        Ok(never) => never,
        Err(error) => {
            eprintln!("lair-virtiofs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    nix::sys::prctl::set_no_new_privs().context("Cannot give up new privileges")?;
    let began = Instant::now();
    let sources: Vec<_> = arguments
        .sources
        .iter()
        .map(|store| Source { store: store.clone(), database: PathBuf::new() })
        .collect();
    let view = View::read(&arguments.view)?;
    let index = Index::build(&sources, &view)?;
    tracing::info!(paths = index.paths(), inodes = index.inodes(), took = ?began.elapsed(), "indexed");
    let stats = Arc::new(Stats::default());
    let shared = Arc::new(Shared {
        server: Server::new(index),
        files: Files::new(&sources).context("Cannot open a source")?,
        stats: Arc::clone(&stats),
        tag: arguments.tag,
        request_queues: usize::from(arguments.queues),
        trouble: Quiet::default(),
        failures: Quiet::default(),
    });
    if let Some(path) = &arguments.control {
        let listener = bind(path)?;
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || control::serve(&listener, &stats))?;
    }
    // Last, so that a hypervisor that connects is answered.
    let listener = match (&arguments.socket, arguments.fd) {
        (Some(path), _) => bind(path)?,
        (None, Some(fd)) => adopt(fd)?,
        (None, None) => anyhow::bail!("Neither --socket nor --fd is given"),
    };
    listen::serve(listener, &shared)
}

fn bind(path: &Path) -> Result<UnixListener> {
    // Left by one that was killed; whoever starts us sees to it that there is only one.
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path).with_context(|| format!("Cannot listen on {}", path.display()))
}

fn adopt(fd: RawFd) -> Result<UnixListener> {
    anyhow::ensure!(fd > 2, "--fd {fd} is a standard stream");
    nix::fcntl::fcntl(borrow(fd), nix::fcntl::FcntlArg::F_GETFD)
        .with_context(|| format!("--fd {fd} is not open"))?;
    #[expect(unsafe_code, reason = "a descriptor by its number is how a parent hands it over")]
    // SAFETY: it is open, as was just seen, and nothing else in this process knows its number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd.into())
}

fn borrow(fd: RawFd) -> std::os::fd::BorrowedFd<'static> {
    #[expect(unsafe_code, reason = "the only way to ask whether a number is an open descriptor")]
    // SAFETY: used for one query, which fails for a number that is not open.
    unsafe {
        std::os::fd::BorrowedFd::borrow_raw(fd)
    }
}
