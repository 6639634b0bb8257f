//! `vmctl`: the operator's command. A client of `laird`'s API and of the shims' sessions, nothing else.

mod apply;
mod audit;
mod change;
mod check;
mod completions;
mod connect;
mod console;
mod doctor;
mod error;
mod escape;
mod events;
mod exec;
mod gpu;
mod guest;
mod interactive;
mod logs;
#[cfg(test)]
#[path = "../../../tests/common/machine.rs"]
mod machine;
mod man;
mod metrics;
mod output;
mod schema;
mod session;
mod shell;
mod status;
mod terminal;
mod top;
mod wait;

use clap::{Parser, Subcommand};
use error::CommandError;
use lair_vmm::{api::client::Client, state::dirs::Dirs};
use std::{path::PathBuf, process::ExitCode};

/// The heading of the options that all verbs take.
const EVERY_VERB: &str = "Options of every verb";

/// Operates the microVMs of a Lair host.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 not permitted, 4 no such thing, 5 timed out.
/// `exec` and `shell` give the command's own status, and 125 where Lair failed.
#[derive(Debug, Parser)]
#[command(name = "vmctl", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The socket of laird [default: /run/lair/laird.sock as root, otherwise lair/laird.sock below $XDG_RUNTIME_DIR, or
    /// /tmp/lair-UID/laird.sock where that is not set]
    #[arg(
        long,
        value_name = "PATH",
        env = "LAIR_SOCKET",
        hide_env_values = true,
        global = true,
        help_heading = EVERY_VERB
    )]
    socket: Option<PathBuf>,
    /// Print JSON with stable field names: one document, or one a line where it goes on; errors too
    #[arg(long, global = true, help_heading = EVERY_VERB)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show the VMs, or one VM with its processes and links
    ///
    /// A VM is `stopped`, `starting`, `booting` (the guest runs, its services are not up), `ready`, `stopping`, `cleaning` (what is left
    /// of it is being removed), `waiting` (it failed, and is started again after a pause), `failed` (it is down and should not be, and is
    /// not started again by itself; the reason is below the table) or `quarantined` (what was recorded of it is not to be trusted, so
    /// nothing of it is touched; stop it, which looks again). A `*` behind it: the fleet file has changed, and it follows when it is
    /// restarted.
    ///
    /// In LINKS, `NAME>` is a link by which the VM connects, `>NAME` one by which it is reached.
    Status(status::Arguments),
    /// Start VMs
    ///
    /// A start is refused where the host has not enough memory left, where a program is missing, and where the VM is up already. It
    /// returns once the start is taken; whether the guest becomes ready shows in `vmctl status`, or with --wait.
    Start(change::Arguments),
    /// Stop VMs: ask the guest, then press its power button, then end the hypervisor
    ///
    /// The guest's agent has 20 s to power off, the power button 5 s, the hypervisor 10 s to end; then it is killed. It returns once the
    /// stop is taken, or with --wait when the VM is down.
    Stop(change::Arguments),
    /// Stop VMs and start them again, with what the fleet file says now
    ///
    /// Each is stopped as by `vmctl stop`, and started as soon as it is down; one that is down is started. With --wait it returns when
    /// the VM is ready again.
    Restart(change::Arguments),
    /// End VMs at once, without asking their guests
    ///
    /// It is like pulling the plug: the guest loses what it has not written. For a guest that hangs `vmctl stop` does the same in the
    /// end.
    Kill(change::Arguments),
    /// Print a VM's console log
    ///
    /// It is kept over starts and stops; what was written before its last rotation comes first. Control characters of the guest
    /// are shown as `\x1b`.
    Logs(logs::Arguments),
    /// Run a command in a VM
    ///
    /// Standard input, output and error are the command's; there is no terminal, unless -t asks for one. The exit status is the command's
    /// own, 128 and the number of the signal that killed it, or 125 where Lair failed.
    ///
    /// On a terminal, `~.` at the beginning of a line ends the session and what runs in it (exit status 125), `~~` sends a `~`, `~?` shows
    /// a help. A session goes on while laird is restarted.
    Exec(exec::Arguments),
    /// Open a login shell in a VM
    ///
    /// It is root's shell, on the terminal of standard input. `~.` at the beginning of a line ends the session and what runs in it (exit
    /// status 125), `~~` sends a `~`, `~?` shows a help. Through ssh, which has the same escapes, type `~~.`. Otherwise the exit status is the
    /// shell's own, or 125 where Lair failed. A session goes on while laird is restarted. What the terminal shows is recorded.
    Shell(shell::Arguments),
    /// Show a VM's console as it is, and type on it
    ///
    /// Its recent end comes first. Unlike in `vmctl logs`, escape sequences of the guest reach the terminal. One session types at a time; others
    /// only see. `~.` at the beginning of a line leaves, `~~` sends a `~`, `~?` shows a help. A session goes on while laird is restarted and
    /// while the guest reboots. What the terminal shows in a session that types is recorded.
    Console(console::Arguments),
    /// Connect standard input and output to a vsock port of a VM
    Connect(connect::Arguments),
    /// Print what happens: VMs that change their state, fleets that are applied
    ///
    /// Begins with the last thousand events or so since laird started. Times are UTC. Where events are missing, because there were too
    /// many, a line says how many.
    Events(events::Arguments),
    /// Print who asked for what, and what went over links and sessions
    ///
    /// One line for each attempt, refusals included, and for each connection over a link and each session when it ends: time (UTC), user,
    /// what, VM, verdict, and more about it. Reads are recorded only where they are refused, apart from console logs and the audit log
    /// itself. It takes the role `administer`.
    Audit(audit::Arguments),
    /// Print counters for Prometheus, in OpenMetrics' text format
    Metrics,
    /// Make a fleet file the fleet: new VMs start, removed VMs stop, links change at once
    ///
    /// A VM that is otherwise changed runs on as it is, and follows when it is restarted; `vmctl status` marks it. All is
    /// checked first, as by `vmctl check`: a file with a problem changes nothing (exit status 2).
    ///
    /// `+` is new, `-` is gone, `~` is changed; below it the keys that differ.
    Apply(apply::Arguments),
    /// Check a fleet file for this host; needs no running laird
    ///
    /// What is wrong is told with FILE:LINE:COLUMN, its path in the file and what is allowed, and the exit status is 2. Warnings are
    /// told as well and are no failure. Also looked at is whether the host has what the file names: stores, kernels, modules, roots,
    /// credentials.
    Check(check::Arguments),
    /// Print the JSON Schema of the fleet file, or the OpenAPI document of laird's API
    Schema(schema::Arguments),
    /// Show what the VMs use, each second
    ///
    /// CPU% is of one processor, all processes of a VM together. MEMORY is what its hypervisor has, with all of the guest's memory that was
    /// touched, and what the guest is given. STORE/S is requests to its store, IN/S and OUT/S bytes that its links carry, whoever opened
    /// them (K, M and G are powers of 1024). SINCE is how long it has been in its state.
    ///
    /// Keys: q ends, s sorts by the next column, the arrows select a VM, about which the line at the bottom says more. With --json it prints a
    /// line each second and needs no terminal.
    Top(top::Arguments),
    /// Show the host's GPUs, and whether VMs can have them
    #[command(subcommand)]
    Gpu(gpu::Verb),
    /// Check this host point by point, and say how to mend each; needs no running laird
    ///
    /// `warning`: Lair works, with less or with a risk. `bad`: VMs do not start as the host is set up, and the exit status is 1. What the fleet
    /// file says is taken into account: without KVM is bad only where it asks for KVM.
    ///
    /// Programs are looked for beside vmctl and in PATH; laird looks beside itself and in its own PATH. Run it as the user that laird
    /// runs as.
    Doctor(doctor::Arguments),
    /// Write man pages of Lair's programs into a directory
    ///
    /// As root: vmctl man /usr/local/share/man/man1 && mandb
    Man(man::Arguments),
    /// Print the completions for a shell
    ///
    /// For bash: vmctl completions bash > ~/.local/share/bash-completion/completions/vmctl
    Completions(completions::Arguments),
}

/// What every verb may use.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) socket: PathBuf,
    pub(crate) json: bool,
}

fn main() -> ExitCode {
    // A reader that has seen enough ends us as it ends any other program, without a message.
    reset_broken_pipe();
    let arguments = Arguments::parse();
    let socket = arguments
        .socket
        .unwrap_or_else(|| Dirs { state: Dirs::default_state(), run: Dirs::default_run() }.api_socket());
    let context = Context { client: Client::new(&socket), socket, json: arguments.json };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CommandError::failed(format!("Cannot start: {error}")).report(context.json),
    };
    let outcome = runtime.block_on(run(arguments.verb, &context));
    // A read of standard input cannot be cancelled; it must not hold up the end.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| error.report(context.json))
}

async fn run(verb: Verb, context: &Context) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::Status(arguments) => status::run(arguments, context).await,
        Verb::Start(arguments) => change::run(change::Verb::Start, arguments, context).await,
        Verb::Stop(arguments) => change::run(change::Verb::Stop, arguments, context).await,
        Verb::Restart(arguments) => change::run(change::Verb::Restart, arguments, context).await,
        Verb::Kill(arguments) => change::run(change::Verb::Kill, arguments, context).await,
        Verb::Logs(arguments) => logs::run(arguments, context).await,
        Verb::Exec(arguments) => Ok(exec::run(arguments, context).await),
        Verb::Shell(arguments) => Ok(shell::run(arguments, context).await),
        Verb::Console(arguments) => console::run(arguments, context).await,
        Verb::Connect(arguments) => connect::run(arguments, context).await,
        Verb::Events(arguments) => events::run(arguments, context).await,
        Verb::Audit(arguments) => audit::run(arguments, context).await,
        Verb::Metrics => metrics::run(context).await,
        Verb::Apply(arguments) => apply::run(arguments, context).await,
        Verb::Check(arguments) => check::run(&arguments, context),
        Verb::Schema(arguments) => schema::run(&arguments),
        Verb::Top(arguments) => top::run(arguments, context).await,
        Verb::Gpu(verb) => gpu::run(verb, context).await,
        Verb::Doctor(arguments) => doctor::run(arguments, context).await,
        Verb::Man(arguments) => man::run(&arguments),
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

    /// As wide on every terminal.
    fn command() -> clap::Command {
        Arguments::command().term_width(100)
    }

    #[test]
    fn help() {
        insta::assert_snapshot!(command().render_long_help());
    }

    #[test]
    fn help_of_each_verb() {
        let mut command = command();
        // Hands the options of every verb to them.
        command.build();
        insta::assert_snapshot!(helps("", &mut command).join("\n"));
    }

    /// Of its verbs and of theirs.
    fn helps(above: &str, command: &mut clap::Command) -> Vec<String> {
        let mut found = Vec::new();
        for verb in command.get_subcommands_mut().filter(|verb| verb.get_name() != "help") {
            let name = format!("{above}{}", verb.get_name());
            found.push(format!("=== {name}\n{}", verb.render_long_help()));
            found.extend(helps(&format!("{name} "), verb));
        }
        found
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
