//! The command line of `lair-shim`.

use crate::shim::output::Log;
use clap::Parser;
use std::path::PathBuf;

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
#[derive(Debug, Parser)]
#[command(version, name = "lair-shim")]
pub struct Shim {
    /// The VM's shim configuration, JSON, written by laird
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Keeps what comes out of a pipe, which is open already with its reading end as descriptor N, in FILE and FILE.1, at most 1 MiB each
    #[arg(long = "log", value_name = "N=FILE")]
    pub logs: Vec<Log>,
}
