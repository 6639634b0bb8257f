//! `vmctl gpu show`.

use super::Named;
use crate::{
    Context,
    error::CommandError,
    output::{bytes, harmless, keep_whole, print_table, print_text, table_within, width},
    status::print_json,
};
use comfy_table::Table;
use lair_vmm::{
    api::gpus::GpuStatus,
    host::pci::{Address, Bar, Device, Link, Space, names},
    passthrough::certificate::{Certificate, FAULTS_MAX, FunctionHealth, Measure},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where it is, such as 0000:01:00.0
    address: Address,
}

pub(super) async fn run(arguments: &Arguments, context: &Context) -> Result<(), CommandError> {
    let status = context.client.gpu(arguments.address).await?;
    if context.json {
        return print_json(&Named::new(&status));
    }
    print_table(&facts(&status, width()))?;
    if let Some(members) = members(&status, width()) {
        println!();
        print_table(&members)?;
    }
    for reason in reasons(&status) {
        println!();
        print_text(&reason)?;
    }
    Ok(())
}

pub(super) fn facts(status: &GpuStatus, width: Option<u16>) -> Table {
    let device = &status.device;
    let mut facts =
        vec![("address", device.address.to_string()), ("name", name(device)), ("numbers", numbers(status))];
    if let Some(gpu) = &device.gpu {
        let architecture = gpu.architecture;
        facts.push((
            "gpu",
            format!("{architecture}, chip {}, compute capability {}", gpu.chip, gpu.compute_capability),
        ));
    }
    facts.push(("driver", driver(device)));
    facts.extend(device.numa_node.map(|node| ("numa node", node.to_string())));
    facts.extend(link(device.link).map(|link| ("link", link)));
    facts.extend(device.bars.iter().map(|bar| ("window", window(bar))));
    facts.push(("reset", resets(device)));
    if device.d3cold_allowed == Some(true) {
        facts.push(("power", "may be cut while it is idle (D3cold)".into()));
    }
    facts.extend(device.virtual_functions.map(|functions| {
        ("functions", format!("{} of {} virtual functions are active", functions.active, functions.total))
    }));
    facts.extend(
        device.physical_function.map(|physical| ("function", format!("a virtual function of {physical}"))),
    );
    if device.boot_vga == Some(true) {
        facts.push(("display", "the firmware's first".into()));
    }
    if !status.screens.is_empty() {
        facts.push(("screens", harmless(&status.screens.join(", ")).into_owned()));
    }
    if let Some(group) = device.group {
        facts.push(("group", group.to_string()));
    }
    if let [_, others @ ..] = status.together.as_slice()
        && !others.is_empty()
    {
        let others: Vec<_> = others.iter().map(ToString::to_string).collect();
        facts.push(("goes with", others.join(", ")));
    }
    facts.extend(held(status));
    facts.push(("for vms", if status.available { "yes".into() } else { "no".into() }));
    let mut rows = table_within(&[], width);
    for (key, value) in facts {
        rows.add_row([key.to_owned(), value]);
    }
    rows
}

/// Where it is in its life, of one that is not the host's.
fn held(status: &GpuStatus) -> Vec<(&'static str, String)> {
    let Some(held) = &status.held else { return vec![] };
    let since = held.since.strftime("%F %T");
    let mut facts = vec![("state", format!("{}, since {since}", harmless(&status.state)))];
    facts.extend(held.vm.as_ref().map(|vm| ("vm", harmless(vm).into_owned())));
    facts.extend(held.last_vm.as_ref().map(|vm| ("last vm", harmless(vm).into_owned())));
    facts.extend(held.reset_ms.map(|ms| ("last reset", format!("took {ms} ms"))));
    facts.extend(held.first_driver.as_ref().map(|driver| ("goes back to", harmless(driver).into_owned())));
    facts.extend(held.reason.as_ref().map(|reason| ("quarantined", harmless(reason).into_owned())));
    facts.extend(held.lease.iter().flat_map(|lease| certificate(lease, status.device.address)));
    facts
}

/// What is known of its health in the lease that a VM has, or had last.
fn certificate(lease: &Certificate, address: Address) -> Vec<(&'static str, String)> {
    let vm = harmless(&lease.vm);
    let taken = lease.taken.strftime("%F %T");
    let mut facts = vec![match lease.returned {
        None => ("lease", format!("of VM {vm}, since {taken}")),
        Some(returned) => ("last lease", format!("of VM {vm}, {taken} to {}", returned.strftime("%F %T"))),
    }];
    facts.extend(lease.verdict.map(|verdict| ("verdict", verdict.to_string())));
    let reset = |ms: Option<u64>| ms.map_or("-".into(), |ms| format!("{ms} ms"));
    let resets = match lease.returned {
        None => format!("{} before", reset(lease.reset_before_ms)),
        Some(_) => format!("{} before, {} after", reset(lease.reset_before_ms), reset(lease.reset_after_ms)),
    };
    facts.push(("its resets", resets));
    if let Some(function) = lease.functions.iter().find(|function| function.address == address) {
        let FunctionHealth { before, after, .. } = function;
        facts.extend(links(before, after.as_ref()).map(|link| ("its link", link)));
        facts.extend(windows(before, after.as_ref()).map(|windows| ("its windows", windows)));
    }
    facts.push(("its errors", lease.errors()));
    for fault in &lease.faults {
        let times = if fault.count > 1 { format!(", {} times", fault.count) } else { String::new() };
        facts.push(("", format!("{}: {}{times}", fault.address, fault.fault)));
        facts.push(("", format!("\"{}\"", harmless(&fault.text))));
    }
    if lease.more_faults {
        facts.push(("", format!("more kinds of messages than the {FAULTS_MAX} that are kept")));
    }
    facts
}

/// The link before, and after where that is known.
fn links(before: &Measure, after: Option<&Measure>) -> Option<String> {
    let told = |measure: &Measure| {
        let width = measure.width.map(|width| format!("x{width}"));
        let told: Vec<_> = measure.speed.map(String::from).into_iter().chain(width).collect();
        (!told.is_empty()).then(|| told.join(" "))
    };
    let before = told(before)?;
    Some(match after.map(|after| told(after).unwrap_or_else(|| "none".into())) {
        None => before,
        Some(after) if after == before => format!("{before}, as before"),
        Some(after) => format!("{after}, {before} before"),
    })
}

/// The windows before, and those that are not the same after.
fn windows(before: &Measure, after: Option<&Measure>) -> Option<String> {
    let told = before.windows.iter().map(|window| {
        let known = format!("{}: {}", window.index, bytes(window.size));
        let now = after.map(|after| after.windows.iter().find(|now| now.index == window.index));
        match now {
            None => known,
            Some(Some(now)) if now.size == window.size => known,
            Some(Some(now)) => {
                format!("{}: {} ({} before)", window.index, bytes(now.size), bytes(window.size))
            }
            Some(None) => format!("{}: gone ({} before)", window.index, bytes(window.size)),
        }
    });
    let told: Vec<_> = told.collect();
    (!told.is_empty()).then(|| told.join(", "))
}

fn name(device: &Device) -> String {
    let vendor = names::vendor(device.vendor).unwrap_or("unknown vendor");
    format!("{vendor} {}", names::device(device.vendor, device.device).unwrap_or("unknown device"))
}

fn numbers(status: &GpuStatus) -> String {
    let device = &status.device;
    let subsystem = device.subsystem.map(|card| format!(", card {}:{}", card.vendor, card.device));
    format!(
        "{}:{}{}, class {} ({})",
        device.vendor,
        device.device,
        subsystem.unwrap_or_default(),
        device.class,
        harmless(&status.class_name)
    )
}

fn driver(device: &Device) -> String {
    let driver = device.driver.as_deref().map_or("none".into(), harmless);
    let only =
        device.driver_override.as_deref().map(|only| format!(" (only {} may take it)", harmless(only)));
    format!("{driver}{}", only.unwrap_or_default())
}

/// What it is now, and what it can be where that is more. Nothing of a device without a link.
fn link(link: Link) -> Option<String> {
    let told = |speed: Option<String>, width: Option<u8>| {
        let width = width.map(|width| format!("x{width}"));
        let told: Vec<_> = speed.into_iter().chain(width).collect();
        (!told.is_empty()).then(|| told.join(" "))
    };
    let now = told(link.speed.map(Into::into), link.width)?;
    let most = told(link.max_speed.map(Into::into), link.max_width).filter(|most| *most != now);
    Some(format!("{now}{}", most.map(|most| format!(", of {most}")).unwrap_or_default()))
}

fn window(bar: &Bar) -> String {
    let kind = match (bar.space, bar.is_64bit) {
        (Space::Io, _) => "ports",
        (Space::Memory, true) => "64-bit",
        (Space::Memory, false) => "32-bit",
    };
    let prefetchable = if bar.prefetchable { ", prefetchable" } else { "" };
    let others = match bar.sizes.as_slice() {
        [first, .., last] => format!(" (can be {} to {})", bytes(*first), bytes(*last)),
        _ => String::new(),
    };
    format!("{}: {}, {kind}{prefetchable}{others}", bar.index, bytes(bar.size))
}

fn resets(device: &Device) -> String {
    match &device.reset_methods {
        None => "possible; this kernel does not tell how".into(),
        Some(methods) if methods.is_empty() => "none that the kernel offers".into(),
        Some(methods) => harmless(&methods.join(", ")).into_owned(),
    }
}

/// All that is in the group; nothing where the device is alone in it.
pub(super) fn members(status: &GpuStatus, width: Option<u16>) -> Option<Table> {
    if status.group_members.len() < 2 {
        return None;
    }
    let mut rows = table_within(&["IN ITS GROUP", "WHAT", "DRIVER", "GOES WITH IT"], width);
    for member in &status.group_members {
        rows.add_row([
            harmless(&member.name),
            member.class_name.as_deref().map_or("-".into(), harmless),
            member.driver.as_deref().map_or("-".into(), harmless),
            match member.bound {
                _ if member.name == status.device.address.to_string() => "itself".into(),
                true => "yes".into(),
                false => "no".into(),
            },
        ]);
    }
    keep_whole(&mut rows, [0, 2, 3]);
    Some(rows)
}

/// Each reason why no VM can have it, and what to do about it.
pub(super) fn reasons(status: &GpuStatus) -> Vec<String> {
    let told = |message: &str, hint: &str| {
        format!("No VM can have it: {}\nTo mend it: {}", harmless(message), harmless(hint))
    };
    status.obstacles.iter().map(|obstacle| told(&obstacle.message, &obstacle.hint)).collect()
}
