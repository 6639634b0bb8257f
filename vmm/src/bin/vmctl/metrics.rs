//! `vmctl metrics`.

use crate::{Context, error::CommandError, status};
use std::process::ExitCode;

pub(crate) async fn run(context: &Context) -> Result<ExitCode, CommandError> {
    let text = context.client.metrics().await?;
    if context.json {
        status::print_json(&serde_json::json!({ "openmetrics": text }))?;
    } else {
        print!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}
