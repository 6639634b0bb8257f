//! What the guest says of the devices that were passed through to it: the newest report of this boot, cut and escaped. `laird` decides what
//! follows from it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{limits, note::foreign, protocol::GuestDevices, rate::Rate};
use lair_guest::wire::message::{DeviceReport, NvidiaDriver};
use std::time::Instant;

/// What is known of the guest's devices.
pub(super) struct Known {
    pub(super) newest: Option<Box<GuestDevices>>,
    rate: Rate,
    /// There is news that nobody was woken for.
    untold: bool,
}

impl Known {
    pub(super) fn new() -> Self {
        Self { newest: None, rate: Rate::new(limits::DEVICE_NEWS), untold: false }
    }

    /// Another boot has begun.
    pub(super) fn forget(&mut self) {
        self.newest = None;
    }

    /// Takes a report; whether watchers are to be told now. Figures that move are no news; and of news that comes too often, the rest waits
    /// for the next sign of life.
    pub(super) fn take(&mut self, boot_id: &str, report: DeviceReport, now: Instant) -> bool {
        let report = cleaned(report);
        let same = |known: &GuestDevices| {
            let known = &known.report;
            (&known.devices, &known.nvidia, &known.faults, known.faults_left_out, uncorrected(known))
                == (
                    &report.devices,
                    &report.nvidia,
                    &report.faults,
                    report.faults_left_out,
                    uncorrected(&report),
                )
        };
        self.untold |= !self.newest.as_deref().is_some_and(same);
        self.newest = Some(Box::new(GuestDevices { boot_id: boot_id.into(), report }));
        self.news(now)
    }

    /// Whether watchers are to be told now of what they were not told before.
    pub(super) fn news(&mut self, now: Instant) -> bool {
        let tell = self.untold && self.rate.admit(now);
        self.untold &= !tell;
        tell
    }
}

/// Memory errors of GPUs, the only figures that are news.
fn uncorrected(report: &DeviceReport) -> Vec<u64> {
    report.gpus.iter().filter_map(|gpu| gpu.ecc_volatile.uncorrected.filter(|count| *count > 0)).collect()
}

/// An address, a driver or a version as it can be passed on. None that is one is longer.
fn name(text: &str) -> String {
    let cut: String = text.chars().take(limits::DEVICE_NAME).collect();
    foreign(&cut).chars().take(limits::DEVICE_NAME).collect()
}

/// A report as it can be passed on.
fn cleaned(mut report: DeviceReport) -> DeviceReport {
    report.devices.truncate(limits::DEVICES);
    for device in &mut report.devices {
        device.address = name(&device.address);
        device.driver = device.driver.as_deref().map(name);
        device.port = device.port.as_deref().map(name);
    }
    if let NvidiaDriver::Loaded { version: Some(version) } = &mut report.nvidia {
        *version = name(version);
    }
    let more = report.faults.len().saturating_sub(limits::DEVICE_FAULTS);
    report.faults.truncate(limits::DEVICE_FAULTS);
    report.faults_left_out = report.faults_left_out.saturating_add(u64::try_from(more).unwrap_or(u64::MAX));
    for fault in &mut report.faults {
        fault.address = name(&fault.address);
        fault.text = foreign(&fault.text);
    }
    report.gpus.truncate(limits::GPUS);
    for gpu in &mut report.gpus {
        gpu.address = name(&gpu.address);
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::{DeviceFault, EccCounts, Fault, GpuFigures, GuestDevice};
    use std::time::Duration;

    fn xid(number: u32, count: u64) -> DeviceFault {
        let text = format!("Xid {number}");
        DeviceFault { address: "0000:01:00.0".into(), fault: Fault::Xid { number }, count, text }
    }

    fn with(faults: Vec<DeviceFault>) -> DeviceReport {
        DeviceReport { faults, ..DeviceReport::default() }
    }

    #[test]
    fn figures_wake_nobody_and_a_new_boot_begins_anew() {
        let (mut known, mut now) = (Known::new(), Instant::now());
        let mut take = |known: &mut Known, report: DeviceReport| {
            now += Duration::from_secs(2);
            known.take("one", report, now)
        };
        assert!(take(&mut known, DeviceReport::default()));
        assert!(take(&mut known, with(vec![xid(31, 1)])));
        let gpus = vec![GpuFigures { temperature: Some(70), ..GpuFigures::default() }];
        let warmer = DeviceReport { gpus, ..with(vec![xid(31, 1)]) };
        assert!(!take(&mut known, warmer.clone()));
        assert_eq!(known.newest.as_ref().unwrap().report, warmer);
        let ecc_volatile = EccCounts { uncorrected: Some(1), ..EccCounts::default() };
        let gpus = vec![GpuFigures { ecc_volatile, ..GpuFigures::default() }];
        let broken = DeviceReport { gpus, ..with(vec![xid(31, 1)]) };
        assert!(take(&mut known, broken));
        assert!(take(&mut known, with(vec![xid(31, 2)])));
        known.forget();
        assert!(known.newest.is_none());
        assert!(take(&mut known, with(vec![xid(31, 2)])));
    }

    #[test]
    fn vs5_a_guest_that_has_news_all_the_time_wakes_few_and_its_last_word_is_not_lost() {
        let (mut known, began) = (Known::new(), Instant::now());
        let told: Vec<_> = (0..1000).filter(|n| known.take("one", with(vec![xid(31, *n)]), began)).collect();
        assert_eq!(told.len(), usize::try_from(limits::DEVICE_NEWS).unwrap());
        assert_eq!(known.newest.as_ref().unwrap().report.faults[0].count, 999);
        assert!(!known.news(began));
        // With the next sign of life.
        let later = began + Duration::from_secs(5);
        assert!(known.news(later) && !known.news(later));
    }

    #[test]
    fn vs5_a_report_is_cut_and_escaped() {
        let wild = "\u{1b}[2J".repeat(1000);
        let device = GuestDevice {
            address: wild.clone(),
            vendor: 1,
            device: 2,
            class: 3,
            driver: Some(wild.clone()),
            port: Some(wild.clone()),
        };
        let fault = DeviceFault { address: wild.clone(), text: wild.clone(), ..xid(1, u64::MAX) };
        let report = DeviceReport {
            devices: vec![device; 1000],
            nvidia: NvidiaDriver::Loaded { version: Some(wild.clone()) },
            faults: vec![fault; 1000],
            faults_left_out: u64::MAX,
            gpus: vec![GpuFigures { address: wild, ..GpuFigures::default() }; 1000],
        };
        let report = cleaned(report);
        let device = &report.devices[0];
        let others = [&device.driver, &device.port].map(|name| name.as_ref().unwrap());
        for name in [&device.address, &report.faults[0].address].into_iter().chain(others) {
            assert_eq!(name.chars().count(), limits::DEVICE_NAME);
        }
        let text = serde_json::to_string(&report).unwrap();
        assert!(
            text.len() < 64 << 10 && !text.contains('\u{1b}') && !text.contains("u001b"),
            "{}",
            text.len()
        );
    }
}
