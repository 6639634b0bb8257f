//! `vmctl exec`.

use crate::{
    Context,
    error::CommandError,
    interactive::{self, Interactive, Left},
    session, terminal,
};
use lair_guest::wire::{
    frame::{self, FrameError, Kind},
    message::{Exec, ExecEvent, TerminalSize},
};
use lair_vmm::{error::chain, shim::protocol::Session};
use std::{collections::BTreeMap, io::Write, process::ExitCode};
use tokio::net::{UnixStream, unix::OwnedReadHalf};

/// The exit status where Lair failed, not the command.
pub(crate) const FAILED: u8 = 125;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Set a variable for the command; may be given several times
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    environment: Vec<(String, String)>,
    /// Run the command on a terminal, for which standard input must be one; what it shows is recorded
    #[arg(short, long)]
    terminal: bool,
    /// The VM
    vm: String,
    /// The command and its arguments; it is looked up in the guest's PATH
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("write NAME=VALUE".into()),
    }
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> ExitCode {
    let environment: BTreeMap<_, _> = arguments.environment.into_iter().collect();
    let exec = Exec { command: arguments.command, environment, terminal: None };
    let outcome = if arguments.terminal {
        on_terminal(context, &arguments.vm, exec).await
    } else {
        on_pipes(context, &arguments.vm, exec).await
    };
    outcome.unwrap_or_else(|error| error.report_as(FAILED, context.json))
}

async fn on_pipes(context: &Context, vm: &str, exec: Exec) -> Result<ExitCode, CommandError> {
    let stream = session::open(context, vm, Session::Exec(exec)).await?;
    let (from, to) = stream.into_split();
    tokio::spawn(session::send_input(to));
    let mut frames = Frames { from, payload: Vec::new() };
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    loop {
        match frames.next().await? {
            Said::Stdout(bytes) => {
                out.write_all(bytes)?;
                out.flush()?;
            }
            Said::Stderr(bytes) => err.write_all(bytes)?,
            Said::Event(event) => {
                if let Some(status) = ended(vm, event)? {
                    return Ok(status);
                }
            }
        }
    }
}

/// Runs a command, or without one a shell, on the terminal of standard input.
pub(crate) async fn on_terminal(
    context: &Context,
    vm: &str,
    mut exec: Exec,
) -> Result<ExitCode, CommandError> {
    if !terminal::present() {
        let message = "Standard input is not a terminal; `vmctl exec VM -- CMD` runs a command without one";
        return Err(CommandError::failed(message));
    }
    let terminal = terminal::describe();
    let size = terminal.size;
    exec.terminal = Some(terminal);
    let stream = session::open(context, vm, Session::Exec(exec)).await?;
    // The terminal is as before once this is over.
    match talk(vm, stream, size).await? {
        End::Command(status) => Ok(status),
        End::Operator(left) => {
            interactive::farewell(&format!("left VM {vm}; what ran in the session is ended"));
            Ok(left.status(FAILED))
        }
    }
}

/// Who ended a session.
enum End {
    Command(ExitCode),
    Operator(Left),
}

/// Carries a session on the terminal.
async fn talk(vm: &str, stream: UnixStream, size: TerminalSize) -> Result<End, CommandError> {
    let (from, to) = stream.into_split();
    let mut frames = Frames { from, payload: Vec::new() };
    loop {
        match frames.next().await? {
            Said::Event(ExecEvent::Started { terminal: true, .. }) => break,
            Said::Event(ExecEvent::Started { terminal: false, .. }) => {
                let message = format!("VM {vm}: its guest or its shim is of a release without terminals");
                return Err(CommandError::failed(message));
            }
            Said::Event(event) => {
                if let Some(status) = ended(vm, event)? {
                    return Ok(End::Command(status));
                }
            }
            Said::Stdout(_) | Said::Stderr(_) => {}
        }
    }
    let mut interactive = Interactive::begin(size)?;
    tokio::select! {
        status = show(vm, &mut frames) => Ok(End::Command(status?)),
        left = interactive.send_input(to) => Ok(End::Operator(left.map_err(lost)?)),
    }
}

async fn show(vm: &str, frames: &mut Frames) -> Result<ExitCode, CommandError> {
    loop {
        match frames.next().await? {
            Said::Stdout(bytes) | Said::Stderr(bytes) => interactive::print(bytes).await?,
            Said::Event(event) => {
                if let Some(status) = ended(vm, event)? {
                    return Ok(status);
                }
            }
        }
    }
}

/// What comes from a command.
struct Frames {
    from: OwnedReadHalf,
    payload: Vec<u8>,
}

enum Said<'a> {
    Stdout(&'a [u8]),
    Stderr(&'a [u8]),
    Event(ExecEvent),
}

impl Frames {
    async fn next(&mut self) -> Result<Said<'_>, CommandError> {
        loop {
            match frame::read(&mut self.from, &mut self.payload).await.map_err(lost)? {
                Some(Kind::Stdout) => return Ok(Said::Stdout(&self.payload)),
                Some(Kind::Stderr) => return Ok(Said::Stderr(&self.payload)),
                Some(Kind::Message) => {
                    return Ok(Said::Event(frame::parse_message(&self.payload).map_err(lost)?));
                }
                Some(Kind::Data | Kind::Eof) => {}
                None => return Err(CommandError::failed("The session ended before the command did")),
            }
        }
    }
}

fn lost(error: FrameError) -> CommandError {
    CommandError::failed(format!("The session was lost: {}", chain(&error)))
}

/// The exit status that an event stands for, if it is the command's end.
fn ended(vm: &str, event: ExecEvent) -> Result<Option<ExitCode>, CommandError> {
    match event {
        ExecEvent::Started { .. } => Ok(None),
        ExecEvent::Exited { status } => Ok(Some(ExitCode::from(u8::try_from(status).unwrap_or(1)))),
        ExecEvent::Killed { signal } => Ok(Some(killed(signal))),
        ExecEvent::Failed { reason } => Err(CommandError::failed(format!("VM {vm}: {reason}"))),
    }
}

/// The exit status for a signal, as a shell says it.
pub(crate) fn killed(signal: i32) -> ExitCode {
    ExitCode::from(u8::try_from(signal.saturating_add(128)).unwrap_or(255))
}
