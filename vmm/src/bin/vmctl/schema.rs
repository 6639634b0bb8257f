//! `vmctl schema`.

use crate::error::CommandError;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print the OpenAPI document of laird's API instead
    #[arg(long)]
    api: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, CommandError> {
    if arguments.api {
        println!("{:#}", lair_vmm::api::openapi::document());
    } else {
        println!("{}", lair_vmm::fleet::json_schema());
    }
    Ok(ExitCode::SUCCESS)
}
