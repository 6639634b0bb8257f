//! `vmctl gpu`: the host's devices, as `laird` sees them. Their names are looked up here.

mod list;
mod release;
mod show;
#[cfg(test)]
mod tests;

use crate::{Context, error::CommandError};
use clap::Subcommand;
use lair_vmm::{api::gpus::GpuStatus, host::pci::names};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show the GPUs of NVIDIA's and AMD's
    ///
    /// VM says which VM has it; otherwise whether one could have it; the first reason why not is below the table, and `vmctl gpu show` tells all. GROUP is the
    /// IOMMU group: all that is in one goes to the same VM.
    List(list::Arguments),
    /// Show one device in full: its group, windows, link, resets, who has it, and why no VM can
    Show(show::Arguments),
    /// Give a device back to the host's drivers, also one that is quarantined
    ///
    /// Between two uses a device stays with VFIO, reset and free, as long as the fleet file asks for it. The VM that has it must be stopped
    /// first. What goes with it is given back as well.
    Release(release::Arguments),
}

pub(crate) async fn run(verb: Verb, context: &Context) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::List(arguments) => list::run(&arguments, context).await?,
        Verb::Show(arguments) => show::run(&arguments, context).await?,
        Verb::Release(arguments) => release::run(&arguments, context).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A device with its names, as JSON.
#[derive(Debug, Serialize)]
struct Named<'a> {
    /// Who made it; `null` where the number has no name.
    vendor_name: Option<&'static str>,
    /// What it is called.
    device_name: Option<&'static str>,
    #[serde(flatten)]
    status: &'a GpuStatus,
}

impl<'a> Named<'a> {
    fn new(status: &'a GpuStatus) -> Self {
        let device = &status.device;
        Self {
            vendor_name: names::vendor(device.vendor),
            device_name: names::device(device.vendor, device.device),
            status,
        }
    }
}
