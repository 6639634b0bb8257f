//! `vmctl gpu list`.

use super::Named;
use crate::{
    Context,
    error::CommandError,
    output::{harmless, keep_whole, print_table, print_text, state_cell, table_within, width},
    status::print_json,
};
use comfy_table::{Cell, Table};
use lair_vmm::{
    api::gpus::{GpuStatus, GpusQuery, GpusReply},
    host::pci::names,
};
use serde::Serialize;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// All devices, whatever they are
    #[arg(long)]
    all: bool,
}

/// The list as JSON.
#[derive(Debug, Serialize)]
pub(super) struct Listed<'a> {
    devices: Vec<Named<'a>>,
    unreadable: &'a [String],
}

impl<'a> Listed<'a> {
    pub(super) fn new(reply: &'a GpusReply) -> Self {
        Self { devices: reply.devices.iter().map(Named::new).collect(), unreadable: &reply.unreadable }
    }
}

pub(super) async fn run(arguments: &Arguments, context: &Context) -> Result<(), CommandError> {
    let reply = context.client.gpus(&GpusQuery { all: arguments.all }).await?;
    if context.json {
        return print_json(&Listed::new(&reply));
    }
    if reply.devices.is_empty() && !arguments.all {
        print_text("This host has no GPU of NVIDIA's or AMD's; --all shows all devices")?;
    } else {
        print_table(&shown(&reply, width()))?;
    }
    // Most devices that are no GPUs serve the host; that is no news.
    for reason in reasons(&reply).filter(|_| !arguments.all) {
        println!();
        print_text(&reason)?;
    }
    for error in &reply.unreadable {
        eprintln!("warning: {}", harmless(error));
    }
    Ok(())
}

pub(super) fn shown(reply: &GpusReply, width: Option<u16>) -> Table {
    let headings = ["ADDRESS", "NAME", "KIND", "DRIVER", "GROUP", "VM"];
    let mut rows = table_within(&headings, width);
    for status in &reply.devices {
        let device = &status.device;
        let (word, colour) = use_of(status);
        rows.add_row(vec![
            Cell::new(device.address),
            Cell::new(names::short(device.vendor, device.device)),
            Cell::new(kind(status)),
            // A module may be called anything.
            Cell::new(device.driver.as_deref().map_or("-".into(), harmless)),
            Cell::new(device.group.map_or("-".into(), |group| group.to_string())),
            state_cell(colour, &harmless(word)),
        ]);
    }
    keep_whole(&mut rows, [0, 3, 4, 5]);
    rows
}

/// Which VM has it, or whether one could, and a state of a VM that has its colour.
fn use_of(status: &GpuStatus) -> (&str, &'static str) {
    let vm = status.held.as_ref().and_then(|held| held.vm.as_deref());
    match (status.state.as_str(), vm) {
        (_, Some(vm)) => (vm, "booting"),
        ("host" | "free", None) if status.available => ("yes", "ready"),
        ("host" | "free", None) => ("no", "failed"),
        (state, None) => (state, if state == "quarantined" { "failed" } else { "booting" }),
    }
}

fn kind(status: &GpuStatus) -> String {
    match &status.device.gpu {
        Some(gpu) => format!("{} {}", gpu.architecture, gpu.compute_capability),
        None => harmless(&status.class_name).into_owned(),
    }
}

/// A paragraph for each device that no VM can have.
pub(super) fn reasons(reply: &GpusReply) -> impl Iterator<Item = String> {
    reply.devices.iter().filter_map(|status| {
        if let Some(reason) = status.held.as_ref().and_then(|held| held.reason.as_ref()) {
            return Some(format!("{}: quarantined: {}", status.device.address, harmless(reason)));
        }
        let first = status.obstacles.first()?;
        let more = match status.obstacles.len().saturating_sub(1) {
            0 => String::new(),
            more => format!(" (and {more} more: vmctl gpu show {})", status.device.address),
        };
        Some(format!("{}: {}{more}", status.device.address, harmless(&first.message)))
    })
}
