//! One reading of all counters.

use super::series::series;
use crate::{error::CommandError, output::harmless};
use lair_vmm::{
    api::{client::Client, types::HostStatus},
    fleet::limits::HostFacts,
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// How long `laird` may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What was counted up to a moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// By a clock that nobody sets, seconds since any moment.
    pub(super) at: f64,
    pub(super) time: jiff::Timestamp,
    /// The version of `laird`.
    pub(super) version: String,
    pub(super) host: Option<HostFacts>,
    pub(super) vms: Vec<Vm>,
    /// CPU seconds of a VM's processes, by VM and part.
    pub(super) cpu: BTreeMap<(String, String), f64>,
    /// Resident memory of a VM's hypervisor, its guest's included, in bytes.
    pub(super) resident: BTreeMap<String, f64>,
    /// Requests that a VM's store backend had.
    pub(super) store: BTreeMap<String, f64>,
    /// Bytes from the side that opens a link and to it, by the link, that side and what it reaches.
    pub(super) links: BTreeMap<(String, String, String), (f64, f64)>,
}

/// What is not counted of a VM. No text in it can steer a terminal.
#[derive(Debug, Clone)]
pub(super) struct Vm {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) detail: Option<String>,
    pub(super) since: jiff::Timestamp,
    /// In bytes.
    pub(super) memory: u64,
}

/// Reads all counters.
pub(super) async fn read(client: &Client, begin: Instant) -> Result<Sample, CommandError> {
    let asked = async {
        let status = client.status().await?;
        let text = client.metrics().await?;
        Ok::<_, CommandError>(sample(&status, &text))
    };
    let answered = timeout(ANSWER, asked).await;
    let sample = answered
        .map_err(|_| CommandError::timed_out(format!("laird does not answer in {} s", ANSWER.as_secs())))??;
    Ok(Sample {
        at: begin.elapsed().as_secs_f64(),
        time: jiff::Timestamp::now(),
        host: HostFacts::read().ok(),
        ..sample
    })
}

#[expect(clippy::cast_precision_loss, reason = "rates are shown with three digits")]
fn sample(status: &HostStatus, metrics: &str) -> Sample {
    let mut sample = Sample { version: harmless(&status.version).into_owned(), ..Sample::default() };
    for vm in &status.vms {
        sample.vms.push(Vm {
            name: harmless(&vm.name).into_owned(),
            state: harmless(&vm.state).into_owned(),
            detail: vm.detail.as_deref().map(|detail| harmless(detail).replace(['\n', '\t'], " ")),
            since: vm.since,
            memory: vm.memory.0,
        });
        for link in &vm.counters {
            let key = (link.link.clone(), link.from.clone(), link.to.clone());
            sample.links.insert(key, (link.bytes_out as f64, link.bytes_in as f64));
        }
    }
    for series in series(metrics) {
        // That of laird itself has an empty name.
        let vm = series.label("vm").unwrap_or_default().to_owned();
        let part = series.label("part").unwrap_or_default();
        let _before = match series.name {
            "lair_process_cpu_seconds_total" => sample.cpu.insert((vm, part.into()), series.value),
            "lair_process_resident_bytes" if part == "hypervisor" => sample.resident.insert(vm, series.value),
            "lair_store_requests_total" => sample.store.insert(vm, series.value),
            _ => None,
        };
    }
    sample
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_vmm::shim::protocol::LinkCounters;

    #[test]
    fn cl14_figures_are_found_and_no_text_steers_the_terminal() {
        let link = LinkCounters {
            link: "web".into(),
            from: "a".into(),
            to: "b".into(),
            connections: 1,
            open: 1,
            refused: 0,
            bytes_out: 40,
            bytes_in: 50,
        };
        let mut vm = super::super::tests::vm_status("a", "failed");
        vm.detail = Some("it said:\n\x1b]0;title\x07\u{9b}31m".into());
        vm.counters = vec![link];
        let status = super::super::tests::host_status(vec![vm]);
        let metrics = "lair_process_cpu_seconds_total{vm=\"a\",part=\"hypervisor\"} 2.5\n\
                       lair_process_cpu_seconds_total{vm=\"\",part=\"laird\"} 0.5\n\
                       lair_process_resident_bytes{vm=\"a\",part=\"hypervisor\"} 4096\n\
                       lair_process_resident_bytes{vm=\"a\",part=\"shim\"} 1\n\
                       lair_store_requests_total{vm=\"a\"} 9\nlair_vm_restarts{vm=\"a\"} 1\n";
        let sample = sample(&status, metrics);
        assert_eq!(sample.vms[0].detail.as_deref(), Some("it said: \\x1b]0;title\\x07\\x9b31m"));
        assert_eq!(sample.cpu[&("a".into(), "hypervisor".into())], 2.5);
        assert_eq!(sample.cpu[&(String::new(), "laird".into())], 0.5);
        assert_eq!((sample.resident["a"], sample.store["a"]), (4096.0, 9.0));
        assert_eq!(sample.links[&("web".into(), "a".into(), "b".into())], (40.0, 50.0));
    }
}
