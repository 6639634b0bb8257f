//! The command line of `laird`.

use clap::Parser;
use std::path::PathBuf;

/// Runs the microVMs of this host, as its fleet file says.
///
/// It may be killed and started again at any moment: VMs, their builds and their links go on without it, and it finds them
/// again. SIGTERM ends it alone, unless systemd says that the host shuts down: then the VMs are ended first. `vmctl stop` ends VMs.
///
/// It logs to stderr; LAIR_LOG says how much: error, warn, info (the default), debug.
#[derive(Debug, Parser)]
#[command(name = "laird", version, max_term_width = 100)]
pub struct Laird {
    /// The fleet file, JSON or TOML [default: /etc/lair/fleet.json as root, otherwise lair/fleet.json below $XDG_CONFIG_HOME or ~/.config]
    #[arg(long, value_name = "FILE")]
    pub fleet: Option<PathBuf>,
    /// Where volumes, views and logs are kept [default: /var/lib/lair as root, otherwise lair below $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where sockets are [default: /run/lair as root, otherwise lair below $XDG_RUNTIME_DIR, or /tmp/lair-UID]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}
