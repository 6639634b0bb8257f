//! `vmctl stop`.

use crate::{Context, error::CommandError, wait};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The VMs
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    #[command(flatten)]
    wait: wait::WaitArguments,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    for vm in &arguments.vms {
        context.client.stop(vm).await?;
    }
    if let Some(deadline) = arguments.wait.deadline() {
        for vm in &arguments.vms {
            wait::until(context, vm, "stopped", deadline, |status| status.state == "stopped").await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
