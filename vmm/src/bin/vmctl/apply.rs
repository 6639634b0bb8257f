//! `vmctl apply`.

use crate::{Context, error::CommandError, output::print_warnings, status};
use lair_vmm::{
    api::types::{ApplyRequest, FleetText},
    fleet::{self, Problems},
};
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A fleet file, which then holds until laird starts again; without it, laird reads its own again
    file: Option<PathBuf>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let file = match &arguments.file {
        Some(path) => {
            let text = fleet::read(path)?;
            let name = std::path::absolute(path)?.display().to_string();
            Some(FleetText { name, text })
        }
        None => None,
    };
    let reply = context.client.apply(&ApplyRequest { file }).await?;
    if context.json {
        status::print_json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    print_warnings(&Problems { problems: reply.warnings, omitted: reply.omitted_warnings });
    let mut changes = Vec::new();
    for (words, names) in [
        ("added", &reply.added),
        ("removed", &reply.removed),
        ("to follow with the next start", &reply.pending_restart),
    ] {
        if !names.is_empty() {
            changes.push(format!("{words}: {}", names.join(", ")));
        }
    }
    if reply.links_changed {
        changes.push("links changed".into());
    }
    println!("{}", if changes.is_empty() { "no changes".into() } else { changes.join("\n") });
    Ok(ExitCode::SUCCESS)
}
