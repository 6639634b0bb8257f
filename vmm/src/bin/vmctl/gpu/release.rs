//! `vmctl gpu release`.

use crate::{Context, error::CommandError, output::print_text, status::print_json};
use lair_vmm::host::pci::Address;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where it is, such as 0000:01:00.0
    address: Address,
}

pub(super) async fn run(arguments: &Arguments, context: &Context) -> Result<(), CommandError> {
    let reply = context.client.release_gpu(arguments.address).await?;
    if context.json {
        return print_json(&reply);
    }
    print_text(&format!("{} is the host's again", reply.address))?;
    Ok(())
}
