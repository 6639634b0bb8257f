//! `lair-virtiofs`: shows one VM its view of the host's Nix stores.

mod indexing;
mod socket;

use anyhow::{Context, Result, bail};
use clap::Parser;
use lair_virtiofs::{
    control::{self, Control},
    fd,
    files::Files,
    fuse::Server,
    index::{Index, Origin, Tree},
    sandbox::{Identity, Sandbox},
    vhost::{Config, Service, serve},
    view::View,
};
use nix::sys::{prctl, signal::Signal};
use signal_hook::flag;
use std::{
    io::IsTerminal,
    os::fd::{AsFd, RawFd},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Instant,
};
use tracing::{error, info};

/// Shows one VM its view of the host's Nix stores, read-only, as a vhost-user-fs (virtiofs) device.
///
/// The guest sees exactly the store paths that the view file lists, with all that is in them, and mounts them with
/// `mount -t virtiofs -o ro TAG /nix/store`. All files belong to root and date from 1970-01-01 00:00:01.
///
/// Metadata is read once: from the index, or where that has nothing, at the start. The store paths must not change while this
/// runs. One hypervisor may connect at a time; when it disconnects, the next one may. The program runs until SIGTERM or SIGINT;
/// its sockets stay, and the next start replaces them.
///
/// Once it serves, all that it can do is to read files beneath the directories of the sources and the index, and to answer: it
/// has no capabilities, and Landlock and seccomp, which the kernel must have, deny the rest.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    serve: Option<Args>,
}

#[derive(clap::Subcommand)]
enum Command {
    Index(indexing::Args),
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("listen").required(true)))]
struct Args {
    /// The unix socket to make, for the hypervisor to connect to.
    #[arg(long, value_name = "PATH", group = "listen")]
    socket: Option<PathBuf>,

    /// A listening unix socket that is open already, as descriptor N.
    #[arg(long, value_name = "N", group = "listen")]
    fd: Option<RawFd>,

    /// A physical store directory, such as /nix/store. With several, a store path is taken from the first that has it.
    #[arg(long = "source", value_name = "DIR", required = true, num_args = 1..)]
    sources: Vec<PathBuf>,

    /// The view: logical store paths (/nix/store/HASH-NAME), one a line. A missing, empty or damaged file is an error.
    #[arg(long, value_name = "FILE")]
    view: PathBuf,

    /// The index, a directory that `lair-virtiofs index` keeps. It is only read.
    #[arg(long, value_name = "DIR")]
    index: Option<PathBuf>,

    /// The name by which the guest mounts the device, 1 to 36 bytes.
    #[arg(long, default_value = "store")]
    tag: String,

    /// The number of request queues, 1 to 31. QEMU: num-request-queues.
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,

    /// A unix socket to make, for asking what is going on (send the line `stats`, get counters as Prometheus text) and for
    /// granting and revoking store paths while the guest runs.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// The user to become, before anything is served. Only root can ask for it; without it, root becomes 65534.
    #[arg(long, value_name = "N", requires = "gid")]
    uid: Option<u32>,

    /// The group to become, in place of all others.
    #[arg(long, value_name = "N", requires = "uid")]
    gid: Option<u32>,
}

const AFTER_HELP: &str = "\
Example:
  lair-virtiofs index --index index --source /nix/store --view view.txt
  lair-virtiofs --index index --socket fs.sock --source /nix/store --view view.txt
  qemu-system-x86_64 -machine q35,memory-backend=m \\
    -object memory-backend-memfd,id=m,size=1G,share=on \\
    -chardev socket,id=fs,path=fs.sock \\
    -device vhost-user-fs-pci,chardev=fs,tag=store,queue-size=1024 ...

Logs go to standard error; RUST_LOG sets what is logged (error, warn, info).";

fn main() -> ExitCode {
    let cli = Cli::parse();
    init_log();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn init_log() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // Where nobody reads what is said any more, that is not to be said either: it would end the program.
        .log_internal_errors(false)
        .init();
}

fn run(cli: Cli) -> Result<()> {
    prctl::set_no_new_privs().context("Cannot give up gaining privileges")?;
    match cli {
        Cli { command: Some(Command::Index(args)), .. } => indexing::run(&args),
        Cli { serve: Some(args), .. } => serve_view(args),
        // Arguments are required.
        Cli { .. } => bail!("There is nothing to do"),
    }
}

fn serve_view(args: Args) -> Result<()> {
    let config = Config::new(&args.tag, args.queues)?;
    let identity = Identity::choose(args.uid.zip(args.gid))?;
    let view = View::read(&args.view)?;
    exit_on_signal()?;

    let files = Files::open_stores(&args.sources)?;
    let begin = Instant::now();
    let mut index = args.index.as_deref().map(Index::open).transpose()?;
    let (tree, added) = Tree::load(Origin { stores: files.stores(), index: index.as_mut() }, &view)
        .with_context(|| format!("Cannot read the metadata of the view from {:?}", args.sources))?;
    info!(
        view = view.id(),
        paths = tree.entries().len(),
        inodes = tree.inodes(),
        milliseconds = begin.elapsed().as_millis(),
        "Read the view's metadata"
    );
    added.unindexed.log();
    let stores = args.sources.iter().zip(files.stores()).map(|(path, store)| (path.as_path(), store.as_fd()));
    let indexes = args.index.as_deref().zip(index.as_ref().map(AsFd::as_fd));
    let sandbox = Sandbox::prepare(stores.chain(indexes), identity)?;
    // Sockets appear once there is something to serve.
    let control = args.control.as_deref().map(socket::bind).transpose()?;
    let listener = match (&args.socket, args.fd) {
        (Some(path), _) => socket::bind(path)?,
        (None, Some(number)) => fd::inherited_listener(number)?,
        (None, None) => bail!("Neither --socket nor --fd is given"),
    };
    // Before any other thread starts, and before anybody is heard.
    sandbox.close()?;

    let service = Arc::new(Service::new(Server::new(tree), files, &config));
    if let Some(listener) = control {
        let service = service.clone();
        thread::Builder::new()
            .name("control".into())
            .spawn(move || control::serve(&listener, &mut Control { service: &service, index }))?;
    }
    Ok(serve(listener, &service, &config)?)
}

/// Lets SIGTERM and SIGINT end the program with status 0, at once: there is nothing to put away.
fn exit_on_signal() -> Result<()> {
    let always = Arc::new(AtomicBool::new(true));
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        flag::register_conditional_shutdown(signal as i32, 0, always.clone())
            .with_context(|| format!("Cannot handle {signal}"))?;
    }
    Ok(())
}
