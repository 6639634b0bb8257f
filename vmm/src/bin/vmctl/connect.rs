//! `vmctl connect`.

use crate::{Context, error::CommandError, session};
use lair_guest::wire::frame::{self, Kind};
use lair_vmm::{error::chain, shim::protocol::Session};
use std::{io::Write, process::ExitCode, str::FromStr};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The VM and its vsock port, such as builder:22; where a link has `connect` behind the port, that is what is reached
    #[arg(value_name = "VM:PORT")]
    to: Destination,
}

#[derive(Debug, Clone)]
struct Destination {
    vm: String,
    port: u32,
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vm, port) = text.rsplit_once(':').ok_or("write VM:PORT, such as builder:22")?;
        let port = port.parse().map_err(|_| format!("the port {port:?} is not a number below 2^32"))?;
        Ok(Self { vm: vm.into(), port })
    }
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let Destination { vm, port } = arguments.to;
    let stream = session::open(context, &vm, Session::Connect { port }).await?;
    let (mut from, to) = stream.into_split();
    tokio::spawn(session::send_input(to));
    let mut out = std::io::stdout().lock();
    let mut payload = Vec::new();
    loop {
        match frame::read(&mut from, &mut payload).await {
            Ok(Some(Kind::Data)) => {
                out.write_all(&payload)?;
                out.flush()?;
            }
            Ok(Some(Kind::Eof) | None) => return Ok(ExitCode::SUCCESS),
            Ok(Some(_)) => {}
            Err(error) => {
                return Err(CommandError::failed(format!("The session was lost: {}", chain(&error))));
            }
        }
    }
}
