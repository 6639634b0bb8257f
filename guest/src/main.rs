//! `lair-guest`: PID 1 of a guest's initramfs, then its agent.

mod agent;
mod clock;
mod connect;
mod credentials;
mod handshake;
mod init;
mod paths;
mod report;
mod sys;
mod trace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Lair inside a guest: boots it, answers the host, carries the links.
///
/// As PID 1 of Lair's initramfs it needs no command: it sets up the guest's root and store, takes credentials from the
/// host, and then becomes the system's own init or keeps the agent and the services running.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boots the guest. Only PID 1 of the initramfs can
    Init,
    /// Answers the host on vsock port 1, carries the links, runs the services
    ///
    /// Started by init, or as the unit `lair-agent.service` that init writes for a system with systemd. It accepts
    /// the host only (CID 2), makes a unix socket in /run/lair/links for each link of this VM, and logs to standard
    /// output.
    Agent,
    /// Connects standard input and output to a link
    ///
    /// For programs that start their connection as a command, such as ssh:
    /// `ssh -o ProxyCommand='lair-guest connect LINK' HOST`. Exits with status 0 when the other end closes, 1 when
    /// there is no such link.
    Connect {
        /// The link's name in the fleet file: a file in /run/lair/links
        link: String,
    },
    /// Tells the host that this guest is up
    ///
    /// For a system with its own init; the unit `lair-ready.service` calls it after the default target. Without an
    /// init of its own the guest is up when its services are.
    Ready,
    /// Notes in the boot trace that the system has come this far
    ///
    /// For a system with its own init; the units `lair-reached@TARGET.service` call it when systemd has reached a target.
    Reached {
        /// What was reached, such as `basic`: letters, digits, hyphens, dots
        target: String,
    },
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        // The kernel passes on what it did not understand of its command line.
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        init::run(&arguments);
    }
    let result = match Arguments::parse().command {
        Command::Init => Err(anyhow::anyhow!("Init has to be PID 1, this is {}", std::process::id())),
        Command::Agent => agent::run().map_err(Into::into),
        Command::Connect { link } => connect::run(&link).map_err(Into::into),
        Command::Ready => agent::tell_ready().map_err(|error| {
            anyhow::Error::new(error).context(format!("Could not tell the agent at `{}`", paths::AGENT))
        }),
        Command::Reached { target } => reached(&target),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lair-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn reached(target: &str) -> anyhow::Result<()> {
    let name = format!("target-{target}");
    anyhow::ensure!(trace::is_name(&name), "`{target}` is not the name of a target");
    trace::Trace::new(paths::TRACE).mark(&name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn help(command: &str) -> String {
        let mut arguments = Arguments::command().term_width(100);
        arguments.build();
        let found =
            if command.is_empty() { Some(&mut arguments) } else { arguments.find_subcommand_mut(command) };
        found.unwrap().render_long_help().to_string()
    }

    #[test]
    fn help_is_worth_reading() {
        let all = ["", "init", "agent", "connect", "ready", "reached"].map(help);
        insta::assert_snapshot!(all.join("\n--------\n"));
    }
}
