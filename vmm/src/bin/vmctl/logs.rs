//! `vmctl logs`.

use crate::{Context, error::CommandError, output::harmless};
use http_body_util::BodyExt;
use std::{io::Write, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Go on with what comes, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Print what the guest wrote as it is, escape sequences included
    #[arg(long)]
    raw: bool,
    /// The VM
    vm: String,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let mut body = context.client.log(&arguments.vm, arguments.follow).await?;
    let mut out = std::io::stdout().lock();
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| CommandError::failed(format!("The connection to laird failed: {error}")))?;
        let Ok(chunk) = frame.into_data() else { continue };
        if arguments.raw {
            out.write_all(&chunk)?;
        } else {
            out.write_all(harmless(&String::from_utf8_lossy(&chunk)).as_bytes())?;
        }
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}
