//! `vmctl shell`.

use crate::{Context, exec};
use lair_guest::wire::message::Exec;
use std::{collections::BTreeMap, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The VM
    vm: String,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> ExitCode {
    let shell = Exec { command: vec![], environment: BTreeMap::new(), terminal: None };
    let outcome = exec::on_terminal(context, &arguments.vm, shell).await;
    outcome.unwrap_or_else(|error| error.report_as(exec::FAILED, context.json))
}
