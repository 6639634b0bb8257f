//! `vmctl schema`.

use crate::error::CommandError;
use std::process::ExitCode;

pub(crate) fn run() -> Result<ExitCode, CommandError> {
    println!("{}", lair_vmm::fleet::json_schema());
    Ok(ExitCode::SUCCESS)
}
