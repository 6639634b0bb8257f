//! `vmctl check`.

use crate::{Context, error::CommandError, status};
use lair_vmm::fleet;
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The fleet file, JSON or TOML
    file: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    match fleet::check_file(&arguments.file) {
        Ok(fleet) => {
            if context.json {
                status::print_json(&serde_json::json!({ "problems": [] }))?;
            } else {
                let (file, vms, links) = (arguments.file.display(), fleet.vms.len(), fleet.links.len());
                println!("{file}: {vms} VMs, {links} links, no problems");
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(problems) if context.json => {
            status::print_json(&problems)?;
            Ok(ExitCode::from(2))
        }
        Err(problems) => Err(CommandError::invalid(problems.to_string())),
    }
}
