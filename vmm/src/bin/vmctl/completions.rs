//! `vmctl completions`.

use crate::error::CommandError;
use clap::CommandFactory;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, CommandError> {
    let mut command = crate::Arguments::command();
    clap_complete::generate(arguments.shell, &mut command, "vmctl", &mut std::io::stdout());
    Ok(ExitCode::SUCCESS)
}
