//! `vmctl`: the operator's command. A client of `laird`'s API and of the shims' sessions, nothing else.

mod apply;
mod check;
mod completions;
mod connect;
mod doctor;
mod error;
mod exec;
mod logs;
mod output;
mod schema;
mod session;
mod start;
mod status;
mod stop;
mod wait;

use clap::{Parser, Subcommand};
use error::CommandError;
use lair_vmm::{api::client::Client, state::dirs::Dirs};
use std::{path::PathBuf, process::ExitCode};

/// Operates the microVMs of a Lair host.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 not permitted, 4 no such thing, 5 timed out.
/// `exec` gives the command's own status, and 125 where Lair failed.
#[derive(Debug, Parser)]
#[command(name = "vmctl", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The socket of laird [default: laird.sock in /run/lair as root, otherwise in lair below $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "PATH", env = "LAIR_SOCKET", hide_env_values = true, global = true)]
    socket: Option<PathBuf>,
    /// Print JSON: one document, with stable field names
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show the VMs, or one VM with its processes and links
    Status(status::Arguments),
    /// Start VMs
    Start(start::Arguments),
    /// Stop VMs: ask the guest, then press its power button, then end the hypervisor
    Stop(stop::Arguments),
    /// Print a VM's console log
    Logs(logs::Arguments),
    /// Run a command in a VM
    Exec(exec::Arguments),
    /// Connect standard input and output to a vsock port of a VM
    Connect(connect::Arguments),
    /// Make a fleet file the fleet: new VMs start, removed VMs stop, links change at once
    Apply(apply::Arguments),
    /// Check a fleet file; needs no running laird
    Check(check::Arguments),
    /// Print the JSON Schema of the fleet file
    Schema,
    /// Check this host point by point, and say how to mend what is missing
    Doctor,
    /// Print the completions for a shell
    Completions(completions::Arguments),
}

/// What every verb may use.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) json: bool,
}

fn main() -> ExitCode {
    // A reader that has seen enough ends us as it ends any other program, without a message.
    reset_broken_pipe();
    let arguments = Arguments::parse();
    let socket = arguments
        .socket
        .unwrap_or_else(|| Dirs { state: Dirs::default_state(), run: Dirs::default_run() }.api_socket());
    let context = Context { client: Client::new(&socket), json: arguments.json };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CommandError::failed(format!("Cannot start: {error}")).report(),
    };
    let outcome = runtime.block_on(run(arguments.verb, &context));
    // A read of standard input cannot be cancelled; it must not hold up the end.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| error.report())
}

async fn run(verb: Verb, context: &Context) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::Status(arguments) => status::run(arguments, context).await,
        Verb::Start(arguments) => start::run(arguments, context).await,
        Verb::Stop(arguments) => stop::run(arguments, context).await,
        Verb::Logs(arguments) => logs::run(arguments, context).await,
        Verb::Exec(arguments) => Ok(exec::run(arguments, context).await),
        Verb::Connect(arguments) => connect::run(arguments, context).await,
        Verb::Apply(arguments) => apply::run(arguments, context).await,
        Verb::Check(arguments) => check::run(&arguments, context),
        Verb::Schema => schema::run(),
        Verb::Doctor => doctor::run(context),
        Verb::Completions(arguments) => completions::run(&arguments),
    }
}

fn reset_broken_pipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    #[expect(unsafe_code, reason = "the one call that changes a signal's disposition")]
    // SAFETY: the default disposition runs no code of ours.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn help() {
        insta::assert_snapshot!(Arguments::command().render_long_help());
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
