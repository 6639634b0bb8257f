//! `vmctl check`.

use crate::{
    Context,
    error::{CommandError, INVALID},
    output::{count, print_warnings},
    status,
};
use lair_vmm::fleet::{self, Loaded, Problem, Problems, limits::HostFacts};
use serde::Serialize;
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The fleet file, JSON or TOML
    file: PathBuf,
}

/// What is wrong and what is better not so.
#[derive(Debug, Default, Serialize)]
struct Report {
    problems: Vec<Problem>,
    /// How many more problems there are.
    omitted: usize,
    warnings: Vec<Problem>,
    /// How many more warnings there are.
    omitted_warnings: usize,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let host = HostFacts::read().map_err(|error| {
        CommandError::failed(format!("Cannot read how much memory the host has: {error}"))
    })?;
    match fleet::check_file(&arguments.file, &host) {
        Ok(Loaded { fleet, warnings }) => {
            if context.json {
                let (warnings, omitted_warnings) = (warnings.problems, warnings.omitted);
                status::print_json(&Report { warnings, omitted_warnings, ..Report::default() })?;
            } else {
                print_warnings(&warnings);
                let (vms, links) = (count(fleet.vms.len(), "VM"), count(fleet.links.len(), "link"));
                println!("{}: {vms}, {links}, no problems", arguments.file.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(Problems { problems, omitted }) if context.json => {
            status::print_json(&Report { problems, omitted, ..Report::default() })?;
            Ok(ExitCode::from(INVALID))
        }
        Err(problems) => Err(problems.into()),
    }
}
