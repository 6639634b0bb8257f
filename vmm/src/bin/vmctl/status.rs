//! `vmctl status`.

use crate::{
    Context,
    error::CommandError,
    guest,
    output::{
        bytes, count, duration, harmless, harmless_json, keep_whole, print_table, print_text, state_cell,
        table, width,
    },
};
use comfy_table::Cell;
use lair_vmm::{
    api::types::{HostStatus, VmStatus},
    fleet::schema::{Limits, Users},
    vm::{
        adopt::Verdict,
        machine::{Ender, Wanted},
    },
};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only this VM, in full
    vm: Option<String>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let now = jiff::Timestamp::now();
    if let Some(vm) = arguments.vm {
        let vm = context.client.vm(&vm).await?;
        if context.json { print_json(&vm)? } else { print_vm(&vm, now)? }
    } else {
        let host = context.client.status().await?;
        if context.json { print_json(&host)? } else { print_host(&host, now)? }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints one JSON document.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), CommandError> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| CommandError::failed(error.to_string()))?;
    println!("{}", harmless_json(&text));
    Ok(())
}

/// Prints one JSON object on a line.
pub(crate) fn print_json_line(value: &impl serde::Serialize) -> Result<(), CommandError> {
    let text = serde_json::to_string(value).map_err(|error| CommandError::failed(error.to_string()))?;
    println!("{}", harmless_json(&text));
    Ok(())
}

fn age(vm: &VmStatus, now: jiff::Timestamp) -> String {
    duration(now.as_second().saturating_sub(vm.since.as_second()))
}

fn print_host(host: &HostStatus, now: jiff::Timestamp) -> Result<(), CommandError> {
    // A narrow terminal has no room for views; `vmctl status VM` shows them as well.
    let views = width().is_none_or(|width| width >= 100);
    let mut headings = vec!["NAME", "ROLE", "STATE", "SINCE", "VCPUS", "MEMORY", "VIEW", "LINKS"];
    headings.retain(|heading| views || *heading != "VIEW");
    let mut vms = table(&headings);
    for vm in &host.vms {
        let view = vm.view.as_ref();
        let view = view.map_or("-".into(), |view| format!("{}, {}", paths(view.paths), bytes(view.bytes)));
        let state = if vm.pending_restart { format!("{}*", vm.state) } else { vm.state.clone() };
        let mut cells = vec![
            Cell::new(&vm.name),
            Cell::new(role(vm)),
            state_cell(&vm.state, &state),
            Cell::new(age(vm, now)),
            Cell::new(vm.vcpus),
            Cell::new(vm.memory),
        ];
        cells.extend(views.then(|| Cell::new(view)));
        cells.push(Cell::new(vm.links.join(" ")));
        vms.add_row(cells);
    }
    // Links are broken between words.
    keep_whole(&mut vms, 0..headings.len().saturating_sub(1));
    print_table(&vms)?;
    for vm in host.vms.iter().filter(|vm| matches!(vm.state.as_str(), "failed" | "quarantined" | "waiting")) {
        let reason = harmless(vm.detail.as_deref().unwrap_or("no reason recorded"));
        println!();
        print_text(&format!("{} {}: {reason}", vm.name, vm.state))?;
    }
    for (vm, fault) in host.vms.iter().flat_map(|vm| vm.degraded.iter().map(move |fault| (vm, fault))) {
        println!();
        print_text(&format!("{} degraded: {}", vm.name, harmless(fault)))?;
    }
    let notes = notes(host);
    if !notes.is_empty() {
        println!();
    }
    for note in notes {
        print_text(&note)?;
    }
    Ok(())
}

fn notes(host: &HostStatus) -> Vec<String> {
    let mut notes = Vec::new();
    if host.vms.iter().any(|vm| vm.pending_restart) {
        notes.push("* runs with an earlier fleet file; `vmctl restart` makes it follow".into());
    }
    if let Some(applied) = &host.applied {
        let file = host.fleet_file.display();
        let applied = harmless(applied);
        notes.push(format!("The fleet is {applied}, applied until laird starts again with {file}"));
    }
    if host.engine == lair_vmm::host::facts::Engine::Tcg {
        notes.push("No KVM: guests run under emulation (see vmctl doctor)".into());
    }
    if !host.root {
        notes.push("Not root: all processes share one uid".into());
    } else if host.users == Users::Shared {
        notes.push("Processes of VMs run as root (host.users)".into());
    }
    if host.limits == Limits::None {
        notes.push("No limits: VMs can take all that the host has (host.limits; see vmctl doctor)".into());
    }
    notes
}

fn paths(number: u64) -> String {
    count(usize::try_from(number).unwrap_or(usize::MAX), "path")
}

fn role(vm: &VmStatus) -> String {
    serde_json::to_value(vm.role).ok().and_then(|v| Some(v.as_str()?.to_owned())).unwrap_or_default()
}

fn print_vm(vm: &VmStatus, now: jiff::Timestamp) -> Result<(), CommandError> {
    let mut facts = vec![
        ("name", vm.name.clone()),
        ("role", role(vm)),
        ("state", format!("{} for {}, since {}", vm.state, age(vm, now), vm.since.strftime("%F %T UTC"))),
    ];
    if let Some(detail) = &vm.detail {
        facts.push(("detail", harmless(detail).into_owned()));
    }
    facts.extend(past(vm).into_iter().map(|(key, value)| (key, harmless(&value).into_owned())));
    facts.push(("vcpus", vm.vcpus.to_string()));
    facts.push(("memory", vm.memory.to_string()));
    if let Some(view) = &vm.view {
        facts.push(("view", format!("{} ({}, {})", view.id, paths(view.paths), bytes(view.bytes))));
    }
    if let Some(work) = guest::work(&vm.trace) {
        facts.push(("start", work));
    }
    if let Some(boot) = vm.boot_ms {
        facts.push(("boot", format!("{boot} ms from kernel to ready")));
    }
    if let Some(since) = vm.agent_silent_since {
        let age = duration(now.as_second().saturating_sub(since.as_second()));
        facts.push(("agent", format!("silent for {age}, since {}", since.strftime("%F %T UTC"))));
    }
    for fault in &vm.degraded {
        facts.push(("degraded", harmless(fault).into_owned()));
    }
    if let Some(figures) = &vm.guest {
        facts.extend(guest::figures(figures, now));
    }
    if let Some(devices) = &vm.devices {
        facts.extend(guest::devices(devices));
    }
    if vm.pending_restart {
        facts.push(("pending", "the fleet file has changed; `vmctl restart` makes it follow".into()));
    }
    for (part, pid) in &vm.processes {
        facts.push(("process", format!("{pid} {part}")));
    }
    let mut rows = table(&[]);
    for (key, value) in facts {
        rows.add_row(vec![key.to_owned(), value]);
    }
    print_table(&rows)?;
    if let Some(trace) = guest::trace(&vm.trace) {
        println!();
        print_table(&trace)?;
    }
    if !vm.counters.is_empty() {
        println!();
        print_links(std::slice::from_ref(vm))?;
    }
    Ok(())
}

/// What the VM has been through.
fn past(vm: &VmStatus) -> Vec<(&'static str, String)> {
    let mut facts = vec![(
        "wanted",
        match vm.wanted {
            Wanted::Running => "running".into(),
            Wanted::Stopped => "stopped".into(),
        },
    )];
    if vm.restarts > 0 {
        facts.push(("restarts", format!("{} by itself", vm.restarts)));
    }
    if vm.reboots > 0 {
        facts.push(("reboots", format!("{} by the guest", vm.reboots)));
    }
    if let Some(stop) = vm.last_stop {
        let by = match stop.by {
            Ender::Guest => "the guest, by itself",
            Ender::Agent => "the agent",
            Ender::PowerButton => "the power button",
            Ender::Terminate => "SIGTERM to the hypervisor",
            Ender::Kill => "SIGKILL to the hypervisor",
        };
        facts.push((
            "last stop",
            format!("by {by}, in {}.{} s", stop.took_ms / 1000, stop.took_ms % 1000 / 100),
        ));
    }
    if let Some(verdict) = vm.adoption {
        facts.push((
            "adoption",
            match verdict {
                Verdict::Adopt => "adopted: all of it ran when laird started".into(),
                Verdict::Missing => "missing: some or all of it had ended when laird started".into(),
                Verdict::Quarantine => "quarantined when laird started".into(),
                Verdict::Unparseable => "unparseable: its recorded state was not understood".into(),
            },
        ));
    }
    facts
}

/// Prints what went over the links of some VMs.
pub(crate) fn print_links(vms: &[VmStatus]) -> Result<(), CommandError> {
    let mut links = table(&["LINK", "FROM", "TO", "CONNECTIONS", "OPEN", "REFUSED", "SENT", "RECEIVED"]);
    for counters in vms.iter().flat_map(|vm| &vm.counters) {
        links.add_row(vec![
            counters.link.clone(),
            counters.from.clone(),
            counters.to.clone(),
            counters.connections.to_string(),
            counters.open.to_string(),
            counters.refused.to_string(),
            bytes(counters.bytes_out),
            bytes(counters.bytes_in),
        ]);
    }
    keep_whole(&mut links, [0, 3, 4, 5, 6, 7]);
    Ok(print_table(&links)?)
}
