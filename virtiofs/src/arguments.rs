//! The command line of `lair-virtiofs`. Here, so that `vmctl man` knows it, too.

use clap::Parser;
use std::{num::NonZero, os::fd::RawFd, path::PathBuf};

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
#[derive(Debug, Parser)]
#[command(name = "lair-virtiofs", version, max_term_width = 100, after_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// Anything but to serve.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to serve.
    #[command(flatten)]
    pub serve: Option<Serve>,
}

/// What else it does.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    #[expect(missing_docs, reason = "its text is that of its arguments")]
    Index(Index),
}

/// How to serve.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("listen").required(true)))]
pub struct Serve {
    /// The unix socket to make, for the hypervisor to connect to.
    #[arg(long, value_name = "PATH", group = "listen")]
    pub socket: Option<PathBuf>,

    /// A listening unix socket that is open already, as descriptor N.
    #[arg(long, value_name = "N", group = "listen")]
    pub fd: Option<RawFd>,

    /// A physical store directory, such as /nix/store. With several, a store path is taken from the first that has it.
    #[arg(long = "source", value_name = "DIR", required = true, num_args = 1..)]
    pub sources: Vec<PathBuf>,

    /// The view: logical store paths (/nix/store/HASH-NAME), one a line. A missing, empty or damaged file is an error.
    #[arg(long, value_name = "FILE")]
    pub view: PathBuf,

    /// The index, a directory that `lair-virtiofs index` keeps. It is only read.
    #[arg(long, value_name = "DIR")]
    pub index: Option<PathBuf>,

    /// The name by which the guest mounts the device, 1 to 36 bytes.
    #[arg(long, default_value = "store")]
    pub tag: String,

    /// The number of request queues, 1 to 31. QEMU: num-request-queues.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: u16,

    /// A unix socket to make, for asking what is going on (send the line `stats`, get counters as Prometheus text) and for
    /// granting and revoking store paths while the guest runs.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// The user to become, before anything is served. Only root can ask for it; without it, root becomes 65534.
    #[arg(long, value_name = "N", requires = "gid")]
    pub uid: Option<u32>,

    /// The group to become, in place of all others.
    #[arg(long, value_name = "N", requires = "uid")]
    pub gid: Option<u32>,
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

/// Brings an index up to date, so that backends find in it what they would else read from the stores at each start.
///
/// Everything that the views list is indexed; what is there already and sound stays. Backends that run are not disturbed. Runs on
/// the same index wait for each other. The exit status is 0 only if all of the views is indexed.
#[derive(Debug, clap::Args)]
pub struct Index {
    /// The directory of the index. It is made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub index: PathBuf,

    /// A physical store directory, such as /nix/store. With several, a store path is taken from the first that has it.
    #[arg(long = "source", value_name = "DIR", required = true, num_args = 1..)]
    pub sources: Vec<PathBuf>,

    /// A view: logical store paths, one a line.
    #[arg(long = "view", value_name = "FILE", required = true, num_args = 1..)]
    pub views: Vec<PathBuf>,

    /// How many threads read. As many as there are processors if not given.
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZero<usize>>,

    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}
