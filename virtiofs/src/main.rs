//! `lair-virtiofs`: shows one VM its view of the host's Nix stores.

mod indexing;
mod socket;

use anyhow::{Context, Result, bail};
use clap::Parser;
use lair_virtiofs::{
    arguments::{Cli, Command, Serve},
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
    os::fd::AsFd,
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Instant,
};
use tracing::{error, info};

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

fn serve_view(args: Serve) -> Result<()> {
    let config = Config::new(&args.tag, args.queues)?;
    let identity = Identity::choose(args.uid.zip(args.gid))?;
    let view = View::read(&args.view)?;
    exit_on_signal()?;

    let files = Files::open_stores(&args.sources)?;
    let begin = Instant::now();
    let index = args.index.as_deref().map(Index::open).transpose()?;
    let (tree, added) = Tree::load(Origin { stores: files.stores(), index: index.as_ref() }, &view)
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
