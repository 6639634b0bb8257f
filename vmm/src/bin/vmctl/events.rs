//! `vmctl events`.

use crate::{Context, error::CommandError, output::harmless, status};
use lair_vmm::api::types::{Event, EventKind, EventsQuery};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Go on with what happens, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Only events with larger ids than this one; --json tells ids
    #[arg(long, value_name = "ID")]
    after: Option<u64>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    let query = EventsQuery { follow: arguments.follow, after: arguments.after };
    if context.json {
        // As they came: a program may know what this release does not.
        let mut events = context.client.events_as::<serde_json::Value>(&query).await?;
        while let Some(event) = events.next().await? {
            status::print_json_line(&event)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut events = context.client.events(&query).await?;
    while let Some(event) = events.next().await? {
        println!("{}", harmless(&line(&event)));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(event: &Event) -> String {
    let with = |detail: &Option<String>| {
        detail.as_ref().map(|detail| format!(": {}", detail.replace('\n', "; "))).unwrap_or_default()
    };
    let (vm, what) = match &event.kind {
        EventKind::Known { vm, state, detail, adopted } => {
            let how = if *adopted { "adopted, " } else { "" };
            (vm.as_str(), format!("{how}{state}{}", with(detail)))
        }
        EventKind::State { vm, from, state, detail } if from == state => {
            (vm.as_str(), format!("{state}{}", with(detail)))
        }
        EventKind::State { vm, from, state, detail } => {
            (vm.as_str(), format!("{from} -> {state}{}", with(detail)))
        }
        EventKind::Forgotten { vm } => (vm.as_str(), "gone".into()),
        EventKind::Applied { file, added, removed, pending_restart, links_changed } => {
            let mut what = vec![match file {
                Some(file) => format!("{file} applied"),
                None => "fleet file applied".into(),
            }];
            for (word, vms) in [("new", added), ("gone", removed), ("pending", pending_restart)] {
                if !vms.is_empty() {
                    what.push(format!("{word}: {}", vms.join(" ")));
                }
            }
            if *links_changed {
                what.push("links changed".into());
            }
            ("-", what.join("; "))
        }
        EventKind::Oom { vm, killed } => (vm.as_str(), format!("out of memory; processes killed: {killed}")),
        EventKind::Pressure { vm, percent } => {
            (vm.as_str(), format!("waits for memory: {percent} % of the last 10 s"))
        }
        EventKind::Unlimited { vm, reason } => (vm.as_str(), format!("not limited: {reason}")),
        EventKind::Device { device, vm, state, detail } => {
            (vm.as_deref().unwrap_or("-"), format!("device {device}: {state}{}", with(detail)))
        }
        EventKind::DeviceFault { device, vm, fault } => {
            (vm.as_str(), format!("device {device}: {fault}, as the guest says"))
        }
        EventKind::LeaseEnded { device, vm, summary } => {
            (vm.as_str(), format!("device {device}: lease ended: {summary}"))
        }
        EventKind::Dropped { count } => ("-", format!("{count} events are missing here")),
        EventKind::Unknown => {
            ("-", "an event that this vmctl does not know; laird is of a later release".into())
        }
    };
    format!("{}  {vm:12}  {what}", event.time.strftime("%F %T"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each() {
        let text = |text: &str| Some(text.to_owned());
        let kinds = [
            EventKind::Known { vm: "builder".into(), state: "ready".into(), detail: None, adopted: true },
            EventKind::State {
                vm: "builder".into(),
                from: "booting".into(),
                state: "failed".into(),
                detail: text("the hypervisor killed by SIGKILL\n  last words"),
            },
            EventKind::State {
                vm: "hydra".into(),
                from: "starting".into(),
                state: "starting".into(),
                detail: text("index"),
            },
            EventKind::Forgotten { vm: "old".into() },
            EventKind::Applied {
                file: text("/etc/lair/other.toml"),
                added: vec!["a".into(), "b".into()],
                removed: vec![],
                pending_restart: vec!["c".into()],
                links_changed: true,
            },
            EventKind::Oom { vm: "builder".into(), killed: 4 },
            EventKind::Pressure { vm: "builder".into(), percent: 31 },
            EventKind::Unlimited {
                vm: "builder".into(),
                reason: "its cgroup was removed by somebody else".into(),
            },
            EventKind::Device {
                device: "0000:01:00.0".parse().unwrap(),
                vm: Some("builder".into()),
                state: "leased".into(),
                detail: text("reset in 120 ms, after VM old had it"),
            },
            EventKind::DeviceFault {
                device: "0000:01:00.0".parse().unwrap(),
                vm: "builder".into(),
                fault: "Xid 79 (the GPU has fallen off the bus)".into(),
            },
            EventKind::LeaseEnded {
                device: "0000:01:00.0".parse().unwrap(),
                vm: "builder".into(),
                summary: "quarantined after 600 s; resets 120 ms before, none after".into(),
            },
            EventKind::Dropped { count: 7 },
            serde_json::from_str(r#"{ "event": "migrated", "vm": "builder", "to": ["elsewhere"] }"#).unwrap(),
        ];
        let lines = kinds.map(|kind| line(&Event { id: 1, time: jiff::Timestamp::UNIX_EPOCH, kind }));
        insta::assert_snapshot!(lines.join("\n"));
    }
}
