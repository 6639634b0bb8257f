//! What `vmctl status VM` says of the guest itself: its figures and how it booted.

use crate::output::{bytes, duration, harmless, table};
use comfy_table::{CellAlignment, Table};
use lair_guest::wire::message::{GpuFigures, GuestDevice, NvidiaDriver};
use lair_vmm::{
    host::pci::{Id, NVIDIA, names},
    shim::protocol::{Figures, GuestDevices},
    vm::trace::{Point, Source, worked_us},
};

/// The guest's figures, as rows of a table of facts. All text in them is the guest's.
pub(crate) fn figures(figures: &Figures, now: jiff::Timestamp) -> Vec<(&'static str, String)> {
    let guest = &figures.statistics;
    let mut facts = vec![("guest memory", used(guest.memory_total, guest.memory_available))];
    if guest.swap_total > 0 {
        facts.push(("guest swap", used(guest.swap_total, guest.swap_free)));
    }
    for disk in &guest.disks {
        facts.push(("guest disk", format!("{} {}", harmless(&disk.mount), used(disk.total, disk.available))));
    }
    let load = guest.load_thousandths.map(|load| decimal(load / 10)).join(" ");
    facts.push(("guest load", format!("{load}, {} tasks", guest.tasks)));
    if let Some(pressure) = guest.pressure {
        let [cpu, memory, io] =
            [pressure.cpu, pressure.memory, pressure.io].map(|hundredths| decimal(hundredths.into()));
        facts.push(("guest pressure", format!("cpu {cpu}%, memory {memory}%, io {io}%")));
    }
    facts.push(("guest clock", skew(figures.clock_skew_ms, figures.round_trip_ms / 2)));
    let at = i64::try_from(figures.at_unix_ms / 1000).unwrap_or(i64::MAX);
    facts.push(("guest figures", format!("{} old", duration(now.as_second().saturating_sub(at)))));
    facts
}

/// The devices that were passed through, as the guest sees them. All text is the guest's.
pub(crate) fn devices(said: &GuestDevices) -> Vec<(&'static str, String)> {
    let report = &said.report;
    let mut facts: Vec<_> = report.devices.iter().map(|device| ("guest device", seen(device))).collect();
    let has_nvidia = report.devices.iter().any(|device| Id(device.vendor) == NVIDIA);
    match &report.nvidia {
        NvidiaDriver::Absent if has_nvidia => facts.push(("nvidia driver", "not loaded".into())),
        NvidiaDriver::Loaded { version } => {
            let version = version.as_deref().map_or("loaded".into(), harmless);
            facts.push(("nvidia driver", version.into_owned()));
        }
        NvidiaDriver::Absent | NvidiaDriver::Unknown => {}
    }
    facts.extend(report.gpus.iter().map(|gpu| ("guest gpu", figures_of(gpu))));
    for fault in &report.faults {
        let times = match fault.count {
            0 | 1 => String::new(),
            count => format!(" ({count} times)"),
        };
        facts.push(("guest kernel", format!("{}{times}", harmless(&fault.text))));
    }
    if report.faults_left_out > 0 {
        facts.push((
            "guest kernel",
            format!("{} more messages, of which no text is kept", report.faults_left_out),
        ));
    }
    facts
}

fn seen(device: &GuestDevice) -> String {
    let (vendor, number) = (Id(device.vendor), Id(device.device));
    let driver = device.driver.as_deref().map_or("no driver".into(), |driver| format!("driver {driver}"));
    format!(
        "{} {vendor}:{number} {}, {}",
        harmless(&device.address),
        names::short(vendor, number),
        harmless(&driver)
    )
}

fn figures_of(gpu: &GpuFigures) -> String {
    let mut words = Vec::new();
    words.extend(gpu.temperature.map(|celsius| format!("{celsius} °C")));
    words.extend(gpu.power.map(|milliwatts| format!("{}.{} W", milliwatts / 1000, milliwatts % 1000 / 100)));
    words.extend(gpu.utilization.map(|percent| format!("{percent} % busy")));
    if let (Some(used), Some(total)) = (gpu.memory_used, gpu.memory_total) {
        words.push(format!("{} of {} used", bytes(used), bytes(total)));
    }
    if let Some(errors) = gpu.ecc_aggregate.uncorrected {
        words.push(format!("{errors} uncorrected memory errors ever"));
    }
    if words.is_empty() {
        words.push("tells nothing".into());
    }
    format!("{} {}", harmless(&gpu.address), words.join(", "))
}

fn used(total: u64, available: u64) -> String {
    format!("{} of {} used", bytes(total.saturating_sub(available)), bytes(total))
}

/// A number of hundredths with its point.
fn decimal(hundredths: u64) -> String {
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// The host's clock minus the guest's, in words.
fn skew(ms: i64, uncertain_ms: u64) -> String {
    let off = ms.unsigned_abs();
    match ms {
        _ if off <= uncertain_ms => format!("right (within {} ms)", uncertain_ms.max(1)),
        1.. => format!("{off} ms behind the host's"),
        _ => format!("{off} ms ahead of the host's"),
    }
}

/// A boot trace as a table; `None` if there is none.
pub(crate) fn trace(points: &[Point]) -> Option<Table> {
    if points.is_empty() {
        return None;
    }
    let mut rows = table(&["BOOT MS", "STEP MS", "OWN MS", "BY", "POINT"]);
    for column in [0, 1, 2] {
        if let Some(column) = rows.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut before = 0;
    for point in points {
        let by = match point.source {
            Source::Laird => "laird",
            Source::Host => "host",
            Source::Guest => "guest",
        };
        let step = point.at_ms.saturating_sub(before);
        rows.add_row([
            point.at_ms.to_string(),
            step.to_string(),
            point.span.map(|span| ms(span.worked_us)).unwrap_or_default(),
            by.into(),
            harmless(&point.name).into_owned(),
        ]);
        before = point.at_ms;
    }
    Some(rows)
}

/// What `laird` itself did for a start, in words; `None` where that is not known.
pub(crate) fn work(points: &[Point]) -> Option<String> {
    let began = points.iter().any(|point| point.span.is_some());
    began.then(|| format!("{} ms of laird's own work", ms(worked_us(points))))
}

/// Microseconds as milliseconds with one decimal.
fn ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::{DeviceFault, DeviceReport, DiskUse, Fault, Pressure, Statistics};
    use lair_vmm::vm::trace::Span;

    const NOW: i64 = 1_700_000_003;

    fn told(statistics: Statistics, clock_skew_ms: i64) -> String {
        let figures = Figures { at_unix_ms: 1_700_000_000_000, clock_skew_ms, round_trip_ms: 4, statistics };
        let facts = super::figures(&figures, jiff::Timestamp::from_second(NOW).unwrap());
        facts.iter().map(|(key, value)| format!("{key:<15}{value}\n")).collect()
    }

    #[test]
    fn figures_are_good_to_read() {
        let disk = |mount: &str, total, available| DiskUse { mount: mount.into(), total, available };
        let statistics = Statistics {
            memory_total: 8 << 30,
            memory_available: 5 << 30,
            swap_total: 1 << 30,
            swap_free: 1 << 30,
            disks: vec![disk("/", 4 << 30, 3 << 30), disk("/var", 40 << 30, 10 << 30)],
            load_thousandths: [1_230, 450, 60],
            tasks: 123,
            pressure: Some(Pressure { cpu: 1234, memory: 0, io: 5 }),
            uptime_ms: 1,
            unix_ms: 1,
        };
        insta::assert_snapshot!(told(statistics, -1500));
    }

    /// Nothing but zeros where an agent of an earlier release does not know it.
    #[test]
    fn vs7_an_old_agent_tells_less() {
        let statistics =
            Statistics { memory_total: 1 << 30, memory_available: 1 << 29, ..Statistics::default() };
        insta::assert_snapshot!(told(statistics, 2));
    }

    #[test]
    fn cl14_what_the_guest_says_steers_no_terminal() {
        let disks = vec![DiskUse { mount: "\x1b[2J".into(), total: u64::MAX, available: 0 }];
        let text = told(Statistics { disks, ..Statistics::default() }, i64::MIN);
        assert!(!text.contains('\x1b') && text.contains("\\x1b[2J"), "{text}");
        let point = Point { name: "\x1b[2J".into(), source: Source::Guest, at_ms: u64::MAX, span: None };
        assert!(!trace(&[point]).unwrap().to_string().contains('\x1b'));
    }

    #[test]
    fn devices_are_told_as_the_guest_sees_them() {
        let device = |address: &str, device, driver: Option<&str>| GuestDevice {
            address: address.into(),
            vendor: 0x10de,
            device,
            class: 0x03_00_00,
            driver: driver.map(Into::into),
            port: None,
        };
        let fault = |number, count, text: &str| DeviceFault {
            address: "0000:01:00.0".into(),
            fault: Fault::Xid { number },
            count,
            text: text.into(),
        };
        let report = DeviceReport {
            devices: vec![
                device("0000:01:00.0", 0x1b80, Some("nvidia")),
                device("0000:01:00.1", 0x10f0, None),
            ],
            nvidia: NvidiaDriver::Loaded { version: Some("550.54.14".into()) },
            faults: vec![
                fault(31, 3, "NVRM: Xid (PCI:0000:01:00): 31, MMU Fault"),
                fault(79, 1, "\x1b[2J NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."),
            ],
            faults_left_out: 17,
            gpus: vec![
                GpuFigures {
                    address: "0000:01:00.0".into(),
                    temperature: Some(41),
                    power: Some(70_250),
                    utilization: Some(98),
                    memory_used: Some(1 << 30),
                    memory_total: Some(8 << 30),
                    ..GpuFigures::default()
                },
                GpuFigures { address: "0000:02:00.0".into(), ..GpuFigures::default() },
            ],
        };
        let told = |report| {
            let facts = devices(&GuestDevices { boot_id: "b".into(), report });
            facts.iter().map(|(key, value)| format!("{key:<15}{value}\n")).collect::<String>()
        };
        let bare = DeviceReport { devices: report.devices[..1].to_vec(), ..DeviceReport::default() };
        insta::assert_snapshot!(format!("{}\n{}", told(report), told(bare)));
    }

    #[test]
    fn a_trace_is_a_table() {
        let point = |name: &str, source, at_ms| Point { name: name.into(), source, at_ms, span: None };
        let step = |name: &str, at_ms, worked_us, waited_us| Point {
            span: Some(Span { worked_us, waited_us }),
            ..point(name, Source::Laird, at_ms)
        };
        let points = [
            point("start", Source::Laird, 0),
            step("initramfs", 12, 12_340, 0),
            point("started-hypervisor", Source::Laird, 14),
            step("hypervisor", 80, 2_050, 65_990),
            point("shim", Source::Host, 90),
            point("kernel", Source::Guest, 180),
            point("init", Source::Guest, 620),
            point("service-nix-daemon", Source::Guest, 1_450),
            point("ready", Source::Guest, 1_451),
            step("ready", 1_452, 860, 1_370_000),
            point("ready", Source::Host, 1_453),
        ];
        assert_eq!(work(&points).unwrap(), "15.2 ms of laird's own work");
        assert_eq!(work(&points[..1]), None);
        insta::assert_snapshot!(trace(&points).unwrap().to_string());
        assert!(trace(&[]).is_none());
    }
}
