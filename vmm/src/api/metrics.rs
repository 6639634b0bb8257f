//! Counters in Prometheus' text format (OpenMetrics). The number of series is bounded by that of VMs, links and devices; no text of a guest is in a
//! label.

use super::{
    limits::{COUNTERS, STORE_STATS},
    types::{HostStatus, VmStatus},
    usage::Usage,
};
use crate::{
    host::pci::Address,
    passthrough::{
        certificate::Certificate,
        reports::{self, Lent},
    },
    shim::protocol::LinkCounters,
    state::dirs::Dirs,
    vm::machine::State,
};
use lair_guest::wire::message::GpuFigures;
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::atomic::{AtomicI64, AtomicU64},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinSet,
    time::timeout,
};

/// The media type of [`text`].
pub(super) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All states of a VM; one gauge each.
const STATES: [&str; 9] =
    ["stopped", "starting", "booting", "ready", "stopping", "cleaning", "waiting", "failed", "quarantined"];

type Labels = Vec<(&'static str, String)>;
type Counts = Family<Labels, Counter<u64, AtomicU64>>;
type Seconds = Family<Labels, Counter<f64, AtomicU64>>;
type Gauges = Family<Labels, Gauge<i64, AtomicI64>>;
type Fractions = Family<Labels, Gauge<f64, AtomicU64>>;

fn of(vm: &str) -> Labels {
    vec![("vm", vm.to_owned())]
}

/// What is counted while `laird` runs.
#[derive(Debug)]
pub struct Stats {
    starts: Counts,
    failures: Counts,
    ready: Histogram,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            starts: Counts::default(),
            failures: Counts::default(),
            // 0.1 s to 7 minutes: a guest under emulation takes long.
            ready: Histogram::new(exponential_buckets(0.1, 2.0, 13)),
        }
    }
}

impl Stats {
    /// A VM is known from now on.
    pub fn known(&self, vm: &str) {
        drop(self.starts.get_or_create(&of(vm)));
        drop(self.failures.get_or_create(&of(vm)));
    }

    /// A VM begins to start.
    pub fn started(&self, vm: &str) {
        self.starts.get_or_create(&of(vm)).inc();
    }

    /// A VM failed.
    pub fn failed(&self, vm: &str) {
        self.failures.get_or_create(&of(vm)).inc();
    }

    /// A VM became ready, so many seconds after it began to start.
    pub fn ready(&self, seconds: f64) {
        self.ready.observe(seconds);
    }

    /// A VM is no longer known.
    pub fn forget(&self, vm: &str) {
        self.starts.remove(&of(vm));
        self.failures.remove(&of(vm));
    }
}

/// What `laird` counts of itself.
#[derive(Debug, Default)]
pub(super) struct Own {
    pub(super) allowed: u64,
    pub(super) refused: u64,
    pub(super) unwritten: u64,
    pub(super) log_dropped: u64,
    pub(super) connections: usize,
    pub(super) connections_dropped: u64,
    pub(super) connections_refused: u64,
    pub(super) surplus_descriptors: u64,
}

/// What else is known at the moment.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Memory and CPU of processes: the VM's name, or none for `laird`; the part; what it uses.
    pub(super) usage: Vec<(Option<String>, String, Usage)>,
    /// Requests that each VM's store backend had.
    pub(super) store: Vec<(String, u64)>,
    /// GPUs that VMs have.
    pub(super) gpus: Vec<Gpu>,
    /// Leases of devices that VMs have.
    pub(super) leases: Vec<(Address, Certificate)>,
}

/// A GPU of a VM's, in its guest's words.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) vm: String,
    /// The host's device; several where the guest's could be any of them.
    pub(super) devices: Vec<Address>,
    /// Which of the guest's it is, among those that could be the same of the host's, from 1.
    pub(super) number: usize,
    pub(super) figures: GpuFigures,
}

/// The GPUs that a VM has, of those that its guest tells of: of those that could be the same devices of the host's no more than there are of
/// these. None of a guest that is not up: how a GPU was when its agent was heard last is not how it is.
pub(super) fn gpus_of(vm: &VmStatus, functions: &[Lent]) -> Vec<Gpu> {
    let Some(said) = vm.devices.as_ref().filter(|_| vm.state == State::Ready.word()) else { return vec![] };
    let mut numbers: BTreeMap<Vec<Address>, usize> = BTreeMap::new();
    let mut places = reports::places(&said.report.devices, functions);
    let mut numbered = BTreeMap::new();
    while let Some((place, devices)) = places.pop_first() {
        let number = numbers.entry(devices.clone()).or_default();
        if *number < devices.len() {
            *number += 1;
            numbered.insert(place, (*number, devices));
        }
    }
    let gpu = |figures: &GpuFigures| {
        // What is named twice would be two samples of one series.
        let (number, devices) = numbered.remove(figures.address.as_str())?;
        Some(Gpu { vm: vm.name.clone(), devices, number, figures: figures.clone() })
    };
    said.report.gpus.iter().filter_map(gpu).collect()
}

/// All metrics as text.
pub(super) fn text(host: &HostStatus, stats: &Stats, own: &Own, seen: &Seen) -> String {
    let mut registry = Registry::with_prefix("lair");
    of_vms(host, stats, &mut registry);
    of_links(host, &mut registry);
    of_processes(seen, &mut registry);
    of_gpus(&seen.gpus, &mut registry);
    of_leases(&seen.leases, &mut registry);
    of_laird(host, own, &mut registry);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

fn of_vms(host: &HostStatus, stats: &Stats, registry: &mut Registry) {
    let (states, pending, degraded) = (Gauges::default(), Gauges::default(), Gauges::default());
    let (restarts, reboots) = (Gauges::default(), Counts::default());
    let (memory, cpus) = (Gauges::default(), Gauges::default());
    for vm in &host.vms {
        for state in STATES {
            let labels = vec![("vm", vm.name.clone()), ("state", state.into())];
            states.get_or_create(&labels).set(i64::from(vm.state == state));
        }
        states.get_or_create(&vec![("vm", vm.name.clone()), ("state", vm.state.clone())]).set(1);
        pending.get_or_create(&of(&vm.name)).set(i64::from(vm.pending_restart));
        let faults = i64::try_from(vm.degraded.len()).unwrap_or(i64::MAX);
        degraded.get_or_create(&of(&vm.name)).set(faults);
        restarts.get_or_create(&of(&vm.name)).set(i64::from(vm.restarts));
        reboots.get_or_create(&of(&vm.name)).inc_by(vm.reboots);
        memory.get_or_create(&of(&vm.name)).set(i64::try_from(vm.memory.0).unwrap_or(i64::MAX));
        cpus.get_or_create(&of(&vm.name)).set(i64::from(vm.vcpus));
    }
    registry.register("vm_state", "1 for the state that the VM is in, 0 for all others", states);
    registry.register(
        "vm_pending_restart",
        "Whether the fleet file differs from what the VM runs with",
        pending,
    );
    registry.register("vm_degraded", "Things that the VM runs without and should not", degraded);
    registry.register_with_unit("vm_memory", "What the VM is given", Unit::Bytes, memory);
    registry.register("vm_vcpus", "Virtual CPUs", cpus);
    let help = "Starts by itself since an operator started it, or since it was last ready for long";
    registry.register("vm_restarts", help, restarts);
    registry.register("vm_reboots", "Reboots of the guest since laird watches it", reboots);
    registry.register("vm_starts", "Starts since laird started", stats.starts.clone());
    registry.register("vm_failures", "Failures since laird started", stats.failures.clone());
    let help = "From the beginning of a start to ready, of all VMs since laird started";
    registry.register_with_unit("vm_start_to_ready", help, Unit::Seconds, stats.ready.clone());
}

fn of_links(host: &HostStatus, registry: &mut Registry) {
    let labels = |link: &LinkCounters| -> Labels {
        vec![("link", link.link.clone()), ("from", link.from.clone()), ("to", link.to.clone())]
    };
    let counts = |value: fn(&LinkCounters) -> u64| {
        let family = Counts::default();
        for link in host.vms.iter().flat_map(|vm| &vm.counters) {
            family.get_or_create(&labels(link)).inc_by(value(link));
        }
        family
    };
    registry.register("link_connections", "Connections opened over a link", counts(|l| l.connections));
    registry.register("link_refused", "Connections refused", counts(|l| l.refused));
    let help = "Bytes from the side that opened the connection";
    registry.register_with_unit("link_sent", help, Unit::Bytes, counts(|l| l.bytes_out));
    let help = "Bytes to the side that opened the connection";
    registry.register_with_unit("link_received", help, Unit::Bytes, counts(|l| l.bytes_in));
    let open = Gauges::default();
    for link in host.vms.iter().flat_map(|vm| &vm.counters) {
        let number = i64::try_from(link.open).unwrap_or(i64::MAX);
        open.get_or_create(&labels(link)).set(number);
    }
    registry.register("link_open", "Connections that are open", open);
}

fn of_processes(seen: &Seen, registry: &mut Registry) {
    let (memory, cpu) = (Gauges::default(), Seconds::default());
    for (vm, part, usage) in &seen.usage {
        let labels = vec![("vm", vm.clone().unwrap_or_default()), ("part", part.clone())];
        memory.get_or_create(&labels).set(i64::try_from(usage.resident).unwrap_or(i64::MAX));
        cpu.get_or_create(&labels).inc_by(usage.cpu_seconds);
    }
    let help = "Resident memory of a process; of a hypervisor also what its guest has touched";
    registry.register_with_unit("process_resident", help, Unit::Bytes, memory);
    registry.register_with_unit("process_cpu", "CPU time of a process", Unit::Seconds, cpu);
    let store = Counts::default();
    for (vm, requests) in &seen.store {
        store.get_or_create(&of(vm)).inc_by(*requests);
    }
    registry.register("store_requests", "Requests that the VM's store backend had", store);
}

fn of_gpus(gpus: &[Gpu], registry: &mut Registry) {
    let (temperature, power, utilization) = (Gauges::default(), Fractions::default(), Fractions::default());
    let (used, total, errors) = (Gauges::default(), Gauges::default(), Gauges::default());
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    for Gpu { vm, devices, number, figures } in gpus {
        let devices: Vec<_> = devices.iter().map(ToString::to_string).collect();
        let labels =
            vec![("vm", vm.clone()), ("device", devices.join(" or ")), ("number", number.to_string())];
        let set = |family: &Gauges, number: Option<u64>| {
            if let Some(number) = number {
                family.get_or_create(&labels).set(whole(number));
            }
        };
        set(&temperature, figures.temperature.map(Into::into));
        set(&used, figures.memory_used);
        set(&total, figures.memory_total);
        if let Some(milliwatts) = figures.power.and_then(|power| u32::try_from(power).ok()) {
            power.get_or_create(&labels).set(f64::from(milliwatts) / 1000.0);
        }
        if let Some(percent) = figures.utilization {
            utilization.get_or_create(&labels).set(f64::from(percent) / 100.0);
        }
        for (scope, counts) in [("volatile", figures.ecc_volatile), ("aggregate", figures.ecc_aggregate)] {
            for (error, number) in [("corrected", counts.corrected), ("uncorrected", counts.uncorrected)] {
                if let Some(number) = number {
                    let mut labels = labels.clone();
                    labels.extend([("scope", scope.to_owned()), ("error", error.to_owned())]);
                    errors.get_or_create(&labels).set(whole(number));
                }
            }
        }
    }
    registry.register_with_unit("gpu_temperature", "Temperature", Unit::Celsius, temperature);
    let watts = Unit::Other("watts".into());
    registry.register_with_unit("gpu_power", "Power that the GPU draws", watts, power);
    let help = "Share of the last moments in which the GPU worked";
    registry.register_with_unit("gpu_utilization", help, Unit::Other("ratio".into()), utilization);
    registry.register_with_unit("gpu_memory_used", "GPU memory in use", Unit::Bytes, used);
    registry.register_with_unit("gpu_memory", "GPU memory", Unit::Bytes, total);
    let help = "Memory errors (ECC) since the driver was loaded (volatile) or ever (aggregate)";
    registry.register("gpu_memory_errors", help, errors);
}

fn of_leases(leases: &[(Address, Certificate)], registry: &mut Registry) {
    let (xids, errors) = (Gauges::default(), Gauges::default());
    for (device, lease) in leases {
        let labels = vec![("vm", lease.vm.clone()), ("device", device.to_string())];
        let set = |family: &Gauges, number: u64| {
            family.get_or_create(&labels).set(i64::try_from(number).unwrap_or(i64::MAX));
        };
        set(&xids, lease.xids());
        set(&errors, lease.aer_errors());
    }
    let help = "Messages of NVIDIA's driver against the device in this lease";
    registry.register("device_xids", help, xids);
    let help = "PCIe errors (AER) of the device in this lease";
    registry.register("device_pcie_errors", help, errors);
}

fn of_laird(host: &HostStatus, own: &Own, registry: &mut Registry) {
    let info = Gauges::default();
    info.get_or_create(&vec![("version", host.version.clone())]).set(1);
    registry.register("build", "The version of laird", info);
    let attempts = Counts::default();
    for (verdict, number) in [("allowed", own.allowed), ("refused", own.refused)] {
        attempts.get_or_create(&vec![("verdict", verdict.into())]).inc_by(number);
    }
    registry.register(
        "audit_attempts",
        "Attempts that the audit log is for, those counted included",
        attempts,
    );
    for (name, help, number) in [
        ("audit_unwritten", "Records of the audit log that no disk has", own.unwritten),
        ("api_connections_dropped", "Idle connections that gave way", own.connections_dropped),
        ("api_connections_refused", "Connections for which there was no slot", own.connections_refused),
        ("api_surplus_descriptors", "Messages with descriptors, which were closed", own.surplus_descriptors),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(number);
        registry.register(name, help, counter);
    }
    let dropped = Counter::<u64>::default();
    dropped.inc_by(own.log_dropped);
    let help = "Bytes of console logs that readers were too slow for";
    registry.register_with_unit("log_dropped", help, Unit::Bytes, dropped);
    let connections = Gauge::<i64>::default();
    connections.set(i64::try_from(own.connections).unwrap_or(i64::MAX));
    registry.register("api_connections", "Connections to the API that are open", connections);
}

/// The number of requests that the store backends of these VMs had. One that does not answer in time is left out.
pub(super) async fn store_requests(dirs: &Dirs, vms: impl Iterator<Item = &str>) -> Vec<(String, u64)> {
    let mut asked = JoinSet::new();
    for vm in vms.map(str::to_owned).collect::<BTreeSet<_>>() {
        let Ok(dirs) = dirs.vm(&vm) else { continue };
        let socket = dirs.socket("store-control.sock");
        asked.spawn(async move { Some((vm, timeout(COUNTERS, requests(&socket)).await.ok()??)) });
    }
    asked.join_all().await.into_iter().flatten().collect()
}

async fn requests(socket: &Path) -> Option<u64> {
    let mut stream = UnixStream::connect(socket).await.ok()?;
    stream.write_all(b"stats\n").await.ok()?;
    let mut text = String::new();
    stream.take(STORE_STATS).read_to_string(&mut text).await.ok()?;
    Some(sum(&text))
}

fn sum(text: &str) -> u64 {
    let samples = text.lines().filter_map(|line| line.strip_prefix("lair_virtiofs_requests_total{"));
    samples.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok()).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fleet::{
            schema::{Limits, Role, Users},
            units::Size,
        },
        host::{facts::Engine, pci::Id},
        passthrough::{certificate::Said, fault::Fault},
        shim::protocol::GuestDevices,
        vm::machine::Wanted,
    };
    use lair_guest::wire::message::{DeviceReport, EccCounts, GuestDevice};

    fn vm(counters: Vec<LinkCounters>) -> VmStatus {
        VmStatus {
            name: "a".into(),
            role: Role::Plain,
            state: "ready".into(),
            detail: None,
            since: jiff::Timestamp::UNIX_EPOCH,
            wanted: Wanted::Running,
            failure: None,
            restarts: 0,
            reboots: 0,
            last_stop: None,
            adoption: None,
            vcpus: 2,
            memory: Size(1 << 30),
            view: None,
            boot_ms: None,
            pending_restart: true,
            processes: BTreeMap::new(),
            links: vec![],
            counters,
            trace: vec![],
            guest: None,
            agent_silent_since: None,
            devices: None,
            degraded: vec![],
        }
    }

    fn host(vms: Vec<VmStatus>) -> HostStatus {
        HostStatus {
            version: "0.0.0".into(),
            fleet_file: "/f".into(),
            applied: None,
            engine: Engine::Tcg,
            root: false,
            users: Users::Shared,
            limits: Limits::None,
            vms,
        }
    }

    #[test]
    fn every_metric_has_its_type_its_help_and_bounded_labels() {
        let link = LinkCounters {
            link: "web".into(),
            from: "host".into(),
            to: "/run/a\"b\\c\nd.sock".into(),
            connections: 3,
            open: 1,
            refused: 2,
            bytes_out: 40,
            bytes_in: 50,
        };
        let stats = Stats::default();
        for vm in ["a", "gone"] {
            stats.known(vm);
            stats.started(vm);
        }
        stats.forget("gone");
        stats.ready(3.5);
        let mut lease = Certificate::begin("a", &[], None, None, jiff::Timestamp::UNIX_EPOCH);
        let fault = Fault::Xid { number: 31 };
        lease.note(Said {
            boot: "b",
            place: "p",
            address: "0000:41:00.0".parse().unwrap(),
            fault,
            count: 7,
            text: "",
        });
        let own = Own { allowed: 5, refused: 6, unwritten: 1, connections: 2, ..Own::default() };
        let seen = Seen {
            usage: vec![
                (None, "laird".into(), Usage { resident: 1024, cpu_seconds: 0.5 }),
                (Some("a".into()), "hypervisor".into(), Usage { resident: 2048, cpu_seconds: 2.5 }),
            ],
            store: vec![("a".into(), 9)],
            gpus: vec![Gpu {
                vm: "a".into(),
                devices: vec!["0000:41:00.0".parse().unwrap()],
                number: 1,
                figures: GpuFigures {
                    address: "0000:01:00.0".into(),
                    temperature: Some(41),
                    power: Some(70_250),
                    utilization: Some(98),
                    memory_used: Some(1 << 30),
                    memory_total: None,
                    ecc_volatile: EccCounts { corrected: Some(3), uncorrected: None },
                    ecc_aggregate: EccCounts::default(),
                },
            }],
            leases: vec![("0000:41:00.0".parse().unwrap(), lease)],
        };
        // A family's samples come in no order.
        let text = text(&host(vec![vm(vec![link])]), &stats, &own, &seen);
        let mut families: Vec<Vec<&str>> = vec![];
        for line in text.lines() {
            if line.starts_with("# HELP") || line == "# EOF" {
                families.push(vec![]);
            }
            families.last_mut().unwrap().push(line);
        }
        for family in &mut families {
            if !family.iter().any(|line| line.contains("_bucket")) {
                family.sort_unstable();
            }
        }
        insta::assert_snapshot!(families.concat().join("\n"));
    }

    fn function(address: &str, device: u16) -> Lent {
        Lent { address: address.parse().unwrap(), vendor: Id(0x10de), device: Id(device), place: None }
    }

    /// A VM whose guest tells of these devices, and figures of GPUs at these addresses.
    fn telling(devices: &[(&str, u16)], gpus: &[&str]) -> VmStatus {
        let device = |(address, device): &(&str, u16)| GuestDevice {
            address: (*address).into(),
            vendor: 0x10de,
            device: *device,
            class: 0x03_00_00,
            driver: None,
            port: None,
        };
        let gpu = |address: &&str| GpuFigures {
            address: (*address).into(),
            temperature: Some(41),
            ..GpuFigures::default()
        };
        let report = DeviceReport {
            devices: devices.iter().map(device).collect(),
            gpus: gpus.iter().map(gpu).collect(),
            ..DeviceReport::default()
        };
        let said = GuestDevices { boot_id: "b".into(), report };
        VmStatus { devices: Some(Box::new(said)), ..vm(vec![]) }
    }

    #[test]
    fn vs3_a_guest_has_figures_of_its_own_gpus_only_and_each_once() {
        let vm = telling(
            &[("0000:01:00.0", 0x2684), ("0000:02:00.0", 0x1b80)],
            &["0000:01:00.0", "0000:02:00.0", "0000:01:00.0", "\u{1b}"],
        );
        let functions = [function("0000:41:00.0", 0x2684)];
        let gpus = gpus_of(&vm, &functions);
        let told: Vec<_> = gpus.iter().map(|gpu| (gpu.figures.address.as_str(), gpu.number)).collect();
        assert_eq!(told, [("0000:01:00.0", 1)]);
        assert!(gpus_of(&vm, &[]).is_empty());
        // Its agent was lost, or its services are not up.
        let lost = VmStatus { state: "booting".into(), ..vm };
        assert!(gpus_of(&lost, &functions).is_empty());
    }

    #[test]
    fn vs5_a_guest_that_tells_of_ever_more_gpus_has_no_more_series_than_cards() {
        let functions = [function("0000:41:00.0", 0x2684), function("0000:42:00.0", 0x2684)];
        let series = |places: &[&str]| {
            let devices: Vec<_> = places.iter().map(|place| (*place, 0x2684)).collect();
            let gpus = gpus_of(&telling(&devices, places), &functions);
            let seen = Seen { gpus, ..Seen::default() };
            let text = text(&host(vec![]), &Stats::default(), &Own::default(), &seen);
            let lines = text.lines().filter(|line| line.starts_with("lair_gpu_"));
            lines.map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let first = series(&["a", "b", "c", "d", "e"]);
        assert_eq!(first.len(), 2, "{first:?}");
        // What the guest calls them is in no label, so other names are no other series.
        assert_eq!(series(&["v", "w", "x", "y", "z"]), first);
    }

    #[test]
    fn requests_of_all_operations_are_one_number() {
        let text = "# TYPE lair_virtiofs_requests_total counter\n\
            lair_virtiofs_requests_total{opcode=\"lookup\"} 7\nlair_virtiofs_errors_total{opcode=\"lookup\"} 100\n\
            lair_virtiofs_requests_total{opcode=\"read\"} 5\nlair_virtiofs_requests_total{opcode=\"x\"} many\n";
        assert_eq!(sum(text), 12);
    }
}
