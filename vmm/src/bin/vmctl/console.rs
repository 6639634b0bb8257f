//! `vmctl console`.

use crate::{
    Context,
    error::CommandError,
    interactive::{self, Interactive},
    output::{bytes, harmless},
    session, terminal,
};
use lair_guest::wire::frame::{self, FrameError, Kind};
use lair_vmm::{
    error::chain,
    shim::protocol::{Console, ConsoleEvent, Session},
};
use std::process::ExitCode;
use tokio::net::unix::OwnedReadHalf;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only show it, and leave the typing to others
    #[arg(long)]
    read_only: bool,
    /// The VM
    vm: String,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let Arguments { read_only, vm } = arguments;
    if !terminal::present() {
        let message = "Standard input is not a terminal; `vmctl logs -f VM` follows the console without one";
        return Err(CommandError::failed(message));
    }
    let terminal = terminal::describe();
    let size = terminal.size;
    let console = Console { read_only, terminal: Some(terminal) };
    let (mut from, to) = session::open(context, &vm, Session::Console(console)).await?.into_split();
    let mut interactive = Interactive::begin(size)?;
    let left = tokio::select! {
        error = show(&vm, &mut from) => return Err(error),
        left = interactive.send_input(to) => left.map_err(lost)?,
    };
    drop(interactive);
    interactive::farewell(&format!("left the console of VM {vm}"));
    Ok(left.status(0))
}

/// Shows the console until the session ends, and why it did.
async fn show(vm: &str, from: &mut OwnedReadHalf) -> CommandError {
    let mut payload = Vec::new();
    loop {
        let result = match frame::read(from, &mut payload).await {
            Ok(Some(Kind::Stdout)) => interactive::print(&payload).await,
            Ok(Some(Kind::Message)) => match frame::parse_message(&payload) {
                Ok(ConsoleEvent::Ended { reason }) => {
                    return CommandError::failed(format!("VM {vm}: {}", harmless(&reason)));
                }
                Ok(event) => {
                    interactive::notice(&told(vm, &event));
                    Ok(())
                }
                Err(error) => return lost(error),
            },
            Ok(Some(_)) => Ok(()),
            Ok(None) => return CommandError::failed(format!("VM {vm}: the console session ended")),
            Err(error) => return lost(error),
        };
        if let Err(error) = result {
            return error.into();
        }
    }
}

/// A line of vmctl's own among the console's.
fn told(vm: &str, event: &ConsoleEvent) -> String {
    match event {
        ConsoleEvent::Attached { writable, writer, connected } => {
            let rights = match (writable, writer) {
                (true, _) => "",
                (false, Some(uid)) => &format!(", read only: a session of uid {uid} types"),
                (false, None) => ", read only",
            };
            let absent = if *connected { "" } else { "; it is not there yet" };
            format!("[console of VM {vm}{rights}{absent}; ~. at the beginning of a line leaves]")
        }
        ConsoleEvent::Lost { bytes: lost } => {
            format!("\r\n[{} are missing here: this terminal was too slow]", bytes(*lost))
        }
        ConsoleEvent::Ended { reason } => harmless(reason).into_owned(),
    }
}

fn lost(error: FrameError) -> CommandError {
    CommandError::failed(format!("The session was lost: {}", chain(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_about_a_console() {
        let attached = |writable, writer, connected| {
            told("builder", &ConsoleEvent::Attached { writable, writer, connected })
        };
        insta::assert_snapshot!(
            [
                attached(true, None, true),
                attached(false, None, false),
                attached(false, Some(1000), true),
                told("builder", &ConsoleEvent::Lost { bytes: 262_144 }),
            ]
            .join("\n")
        );
    }
}
