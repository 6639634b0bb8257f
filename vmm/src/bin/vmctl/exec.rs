//! `vmctl exec`.

use crate::{Context, error::CommandError, session};
use lair_guest::wire::{
    frame::{self, Kind},
    message::{Exec, ExecEvent},
};
use lair_vmm::{error::chain, shim::protocol::Session};
use std::{collections::BTreeMap, io::Write, process::ExitCode};

/// The exit status where Lair failed, not the command.
const FAILED: u8 = 125;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Set a variable for the command; may be given several times
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    environment: Vec<(String, String)>,
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
    match exec(arguments, context).await {
        Ok(status) => status,
        Err(error) => error.report_as(FAILED, context.json),
    }
}

async fn exec(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let environment: BTreeMap<_, _> = arguments.environment.into_iter().collect();
    let request = Session::Exec(Exec { command: arguments.command, environment });
    let stream = session::open(context, &arguments.vm, request).await?;
    let (mut from, to) = stream.into_split();
    tokio::spawn(session::send_input(to));
    let lost =
        |error: frame::FrameError| CommandError::failed(format!("The session was lost: {}", chain(&error)));
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    let mut payload = Vec::new();
    loop {
        match frame::read(&mut from, &mut payload).await.map_err(lost)? {
            Some(Kind::Stdout) => {
                out.write_all(&payload)?;
                out.flush()?;
            }
            Some(Kind::Stderr) => err.write_all(&payload)?,
            Some(Kind::Message) => match frame::parse_message(&payload).map_err(lost)? {
                ExecEvent::Started { .. } => {}
                ExecEvent::Exited { status } => return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1))),
                // As a shell says it.
                ExecEvent::Killed { signal } => {
                    return Ok(ExitCode::from(u8::try_from(signal.saturating_add(128)).unwrap_or(255)));
                }
                ExecEvent::Failed { reason } => {
                    return Err(CommandError::failed(format!("VM {}: {reason}", arguments.vm)));
                }
            },
            Some(Kind::Data | Kind::Eof) => {}
            None => return Err(CommandError::failed("The session ended before the command did")),
        }
    }
}
