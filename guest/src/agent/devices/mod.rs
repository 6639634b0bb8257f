//! The devices that were passed through to the guest: what there is, what the kernel says against them, what NVIDIA's tool tells of GPUs.
//!
//! It has no clock of its own: it looks when the agent starts and with each sign of life that the host asks for. Where the guest has no such
//! device, that is a look at a few small files, and all there is; the kernel's log is read from its beginning once there is one.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod kernel_log;
mod kmsg;
mod nvidia;
mod pci;

use super::{environment::Environment, log::Log};
use lair_guest::wire::message::{DeviceReport, NvidiaDriver};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How often NVIDIA's tool is asked at most. Where nothing keeps the GPU awake, it wakes it.
const FIGURES_EVERY: Duration = Duration::from_secs(60);

/// The shortest time between two reports on a channel.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// What is known of devices.
pub(super) struct Devices {
    root: PathBuf,
    environment: Environment,
    log: Log,
    report: watch::Sender<DeviceReport>,
    /// Whether the kernel's log is followed.
    follows: AtomicBool,
    /// When NVIDIA's tool was started last, and whether it runs still.
    asked: Mutex<(Option<Instant>, bool)>,
    /// Why it had nothing to tell the last time.
    silent: Mutex<Option<String>>,
}

impl Devices {
    /// Of the guest whose files are below `root`.
    pub(super) fn new(root: impl Into<PathBuf>, environment: Environment, log: Log) -> Arc<Self> {
        Arc::new(Self {
            root: root.into(),
            environment,
            log,
            report: watch::Sender::new(DeviceReport::default()),
            follows: AtomicBool::new(false),
            asked: Mutex::default(),
            silent: Mutex::default(),
        })
    }

    /// Looks what there is now.
    pub(super) fn look(self: &Arc<Self>) {
        let devices = pci::list(&self.root.join("sys"));
        // A device that is gone may have said why.
        if devices.is_empty() && !self.follows.load(Ordering::Relaxed) {
            return;
        }
        let has_gpu = devices.iter().any(pci::is_nvidia_gpu);
        let nvidia = if has_gpu { nvidia::driver(&self.root) } else { NvidiaDriver::Absent };
        let is_loaded = matches!(nvidia, NvidiaDriver::Loaded { .. });
        self.report.send_if_modified(|report| {
            let changed = report.devices != devices || report.nvidia != nvidia;
            // Figures of a GPU that is gone, or of a driver that is, are those of nothing.
            if changed {
                let there: BTreeSet<_> = devices.iter().map(|device| &device.address).collect();
                report.gpus.retain(|gpu| is_loaded && there.contains(&gpu.address));
            }
            (report.devices, report.nvidia) = (devices, nvidia);
            changed
        });
        if !self.follows.swap(true, Ordering::Relaxed) {
            let devices = Arc::clone(self);
            tokio::spawn(async move {
                let path = devices.root.join("dev/kmsg");
                // A kernel without it, or a container: then there are no messages.
                if let Err(error) = kmsg::follow(&path, |line| devices.said(line)).await {
                    devices.log.say(&format!(
                        "the kernel's log cannot be read, so nothing is told of devices' errors: {error}"
                    ));
                }
            });
        }
        if is_loaded {
            self.ask_tool();
        }
    }

    /// A line of the kernel's log.
    fn said(&self, line: &[u8]) {
        let Some(said) = kernel_log::parse(line) else { return };
        self.report.send_if_modified(|report| {
            kernel_log::add(&mut report.faults, &mut report.faults_left_out, said)
        });
    }

    /// Asks NVIDIA's tool, unless nobody would hear it, or it was asked lately or has not answered yet.
    fn ask_tool(self: &Arc<Self>) {
        if self.report.receiver_count() == 0 {
            return;
        }
        {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let lately = asked.0.is_some_and(|last| last.elapsed() < FIGURES_EVERY);
            if lately || asked.1 {
                return;
            }
            *asked = (Some(Instant::now()), true);
        }
        let devices = Arc::clone(self);
        tokio::spawn(async move {
            let (figures, process) = nvidia::figures(nvidia::PROGRAM.as_ref(), &devices.environment).await;
            let why = figures
                .as_ref()
                .err()
                .map(|error| format!("{} tells nothing of GPUs: {error}", nvidia::PROGRAM));
            if let Some(news) = devices.news_of_silence(why) {
                devices.log.say(&news);
            }
            // Old figures would be taken for new ones.
            let gpus = figures.unwrap_or_default();
            devices.report.send_if_modified(|report| {
                let changed = report.gpus != gpus;
                report.gpus = gpus;
                changed
            });
            // It may be one that does not end when it is killed: the next one would hang as well.
            if let Some(mut process) = process {
                let _ = process.wait().await;
            }
            devices.asked.lock().unwrap_or_else(PoisonError::into_inner).1 = false;
        });
    }

    /// Why the tool tells nothing, if that is not why it told nothing the last time.
    fn news_of_silence(&self, why: Option<String>) -> Option<String> {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = *silent != why;
        silent.clone_from(&why);
        why.filter(|_| is_news)
    }

    #[cfg(test)]
    pub(super) fn found(&self, device: lair_guest::wire::message::GuestDevice) {
        self.report.send_modify(|report| report.devices.push(device));
    }

    /// Reports, for one channel.
    pub(super) fn reports(&self) -> Reports {
        let mut report = self.report.subscribe();
        // Also that there are none any more.
        if self.follows.load(Ordering::Relaxed) || *report.borrow() != DeviceReport::default() {
            report.mark_changed();
        }
        Reports { report, not_before: None }
    }
}

/// Reports as they change, not too often.
pub(super) struct Reports {
    report: watch::Receiver<DeviceReport>,
    not_before: Option<tokio::time::Instant>,
}

impl Reports {
    /// The next one. Nothing is lost where this is given up.
    pub(super) async fn next(&mut self) -> DeviceReport {
        if let Some(time) = self.not_before {
            tokio::time::sleep_until(time).await;
        }
        if self.report.changed().await.is_err() {
            // Not while the agent lives, which has the sender.
            return std::future::pending().await;
        }
        self.not_before = tokio::time::Instant::now().checked_add(REPORT_EVERY);
        self.report.borrow_and_update().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::{Fault, GpuFigures};
    use nix::{sys::stat::Mode, unistd::mkfifo};
    use std::{
        fs::{self, File, OpenOptions},
        io::Write,
        os::unix::fs::{PermissionsExt, symlink},
        path::Path,
    };
    use tokio::time::timeout;

    /// Writes a program by a process of its own: what this one has open for writing, a child of another test may have for a moment as well, and
    /// then it cannot be executed.
    pub(super) fn write_program(path: &Path, text: &str) {
        let draft = path.with_extension("draft");
        fs::write(&draft, text).unwrap();
        assert!(std::process::Command::new("cp").args([&draft, path]).status().unwrap().success());
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A guest's `/sys`.
    pub(super) struct Sys(tempfile::TempDir);

    impl Sys {
        pub(super) fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
            Self(root)
        }

        pub(super) fn path(&self) -> &Path {
            self.0.path()
        }

        pub(super) fn device(
            &self,
            address: &str,
            vendor: u16,
            device: u16,
            class: u32,
            driver: Option<&str>,
        ) {
            add_device(self.path(), address, (vendor, device, class), driver);
        }

        /// A GPU in this place below `/sys/devices`.
        pub(super) fn device_in(&self, place: &str, address: &str) {
            add_device(self.path(), address, GPU, None);
            let (known, there) =
                (Path::new("bus/pci/devices").join(address), Path::new("devices").join(place));
            fs::create_dir_all(self.path().join(&there)).unwrap();
            fs::rename(self.path().join(&known), self.path().join(&there).join(address)).unwrap();
            symlink(Path::new("../../..").join(there).join(address), self.path().join(known)).unwrap();
        }
    }

    fn add_device(sys: &Path, address: &str, (vendor, device, class): (u16, u16, u32), driver: Option<&str>) {
        let directory = sys.join("bus/pci/devices").join(address);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("vendor"), format!("0x{vendor:04x}\n")).unwrap();
        fs::write(directory.join("device"), format!("0x{device:04x}\n")).unwrap();
        fs::write(directory.join("class"), format!("0x{class:06x}\n")).unwrap();
        if let Some(driver) = driver {
            symlink(format!("../../../bus/pci/drivers/{driver}"), directory.join("driver")).unwrap();
        }
    }

    const GPU: (u16, u16, u32) = (0x10de, 0x2684, 0x03_00_00);

    /// A guest's files, its kernel's log, and a stand-in for NVIDIA's tool.
    struct Guest {
        root: tempfile::TempDir,
        log: File,
    }

    impl Guest {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("dev")).unwrap();
            fs::create_dir_all(root.path().join("bin")).unwrap();
            let kmsg = root.path().join("dev/kmsg");
            mkfifo(&kmsg, Mode::S_IRWXU).unwrap();
            let log = OpenOptions::new().read(true).write(true).open(kmsg).unwrap();
            Self { root, log }
        }

        fn devices(&self) -> Arc<Devices> {
            let path =
                format!("{}:{}", self.root.path().join("bin").display(), std::env::var("PATH").unwrap());
            Devices::new(self.root.path(), vec![("PATH".into(), path)], Log::start().unwrap())
        }

        fn add_gpu(&self) {
            add_device(&self.root.path().join("sys"), "0000:01:00.0", GPU, Some("nvidia"));
        }

        fn load_driver(&self) {
            fs::create_dir_all(self.root.path().join("sys/module/nvidia")).unwrap();
            fs::write(self.root.path().join("sys/module/nvidia/version"), "550.54.14\n").unwrap();
        }

        fn tool(&self, script: &str) {
            let tool = self.root.path().join("bin/nvidia-smi");
            write_program(&tool, &format!("#!/bin/sh\necho run >>\"$0.runs\"\n{script}\n"));
        }

        fn runs(&self) -> usize {
            fs::read_to_string(self.root.path().join("bin/nvidia-smi.runs"))
                .unwrap_or_default()
                .lines()
                .count()
        }
    }

    async fn next(reports: &mut Reports) -> DeviceReport {
        timeout(Duration::from_secs(30), reports.next()).await.expect("no report")
    }

    #[tokio::test]
    async fn a_guest_without_devices_reads_no_log_and_asks_no_tool() {
        let guest = Guest::new();
        guest.tool("echo '00000000:01:00.0, 41'");
        let devices = guest.devices();
        let mut reports = devices.reports();
        devices.look();
        assert!(!devices.follows.load(Ordering::Relaxed));
        assert!(timeout(Duration::from_millis(200), reports.next()).await.is_err());
        assert_eq!(guest.runs(), 0);
    }

    #[tokio::test]
    async fn devices_their_driver_their_messages_and_figures_are_told_as_they_come() {
        let mut guest = Guest::new();
        guest.tool("echo '00000000:01:00.0, 41, 70.25, 98, 10240, 20475, 0, 0, 0, 0'");
        guest.add_gpu();
        // Said before the agent began.
        guest
            .log
            .write_all(b"4,1,1,-;NVRM: Xid (PCI:0000:01:00): 31, pid=7, MMU Fault\n SUBSYSTEM=pci\n")
            .unwrap();
        let devices = guest.devices();
        let mut reports = devices.reports();
        devices.look();
        let mut report = next(&mut reports).await;
        assert_eq!((report.devices.len(), &report.nvidia), (1, &NvidiaDriver::Absent));
        while report.faults.is_empty() {
            report = next(&mut reports).await;
        }
        assert_eq!((report.faults[0].fault, report.faults[0].count), (Fault::Xid { number: 31 }, 1));
        assert_eq!(report.faults[0].text, "NVRM: Xid (PCI:0000:01:00): 31, pid=7, MMU Fault");
        assert_eq!(guest.runs(), 0, "there is no driver that it could ask");

        guest.load_driver();
        devices.look();
        while report.gpus.is_empty() {
            report = next(&mut reports).await;
        }
        assert_eq!(report.nvidia, NvidiaDriver::Loaded { version: Some("550.54.14".into()) });
        assert_eq!((report.gpus[0].temperature, report.gpus[0].power), (Some(41), Some(70_250)));
        guest
            .log
            .write_all(b"4,2,2,-;NVRM: Xid (PCI:0000:01:00): 79, pid=7, GPU has fallen off the bus.\n")
            .unwrap();
        while report.faults.len() < 2 {
            report = next(&mut reports).await;
        }
        assert_eq!(report.faults[1].fault, Fault::Xid { number: 79 });
        // It was asked a moment ago.
        devices.look();
        assert_eq!(guest.runs(), 1);
        // A channel that is new is told all, and once.
        let mut another = devices.reports();
        assert_eq!(next(&mut another).await, report);
        assert!(timeout(2 * REPORT_EVERY, another.next()).await.is_err());
    }

    #[tokio::test]
    async fn a_tool_that_hangs_or_fails_holds_up_nothing_and_leaves_no_old_figures() {
        let guest = Guest::new();
        guest.tool("exec sleep 600");
        guest.add_gpu();
        guest.load_driver();
        let devices = guest.devices();
        devices.report.send_modify(|report| report.gpus = vec![GpuFigures::default()]);
        // No host takes reports.
        devices.look();
        assert!(devices.asked.lock().unwrap().0.is_none());
        let mut reports = devices.reports();
        devices.look();
        let began = Instant::now();
        while guest.runs() == 0 {
            assert!(began.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Even if it was long ago, as long as it runs there is no second one.
        devices.asked.lock().unwrap().0 = None;
        devices.look();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(guest.runs(), 1);
        assert!(devices.asked.lock().unwrap().1);
        // Nobody takes old figures for new ones, also while it has not ended.
        tokio::time::pause();
        while !reports.next().await.gpus.is_empty() {}
    }

    /// The largest report is a message that the host takes (64 KiB), and reports come one a second.
    #[tokio::test(start_paused = true)]
    async fn vs5_reports_are_bounded_and_not_too_often() {
        let guest = Guest::new();
        for n in 0..100 {
            let class = if n % 2 == 0 { 0x03_00_00 } else { 0x02_00_00 };
            let address = format!("0000:{n:02x}:00.0");
            add_device(
                &guest.root.path().join("sys"),
                &address,
                (0x10de, 1, class),
                Some(&"\u{1}".repeat(100)),
            );
        }
        let devices = guest.devices();
        devices.follows.store(true, Ordering::Relaxed);
        devices.look();
        for number in 0..100 {
            let text = "\u{1}".repeat(1000);
            devices.said(format!("3,1,2,-;NVRM: Xid (PCI:0000:01:00): {number}, {text}").as_bytes());
        }
        let gpu =
            GpuFigures { address: "0000:01:00.0".into(), power: Some(u64::MAX), ..GpuFigures::default() };
        devices.report.send_modify(|report| {
            report.gpus = vec![gpu; nvidia::GPUS_MAX];
            for device in &mut report.devices {
                device.port = Some("ffffffff:ff:1f.7".into());
            }
        });
        let mut reports = devices.reports();
        let began = tokio::time::Instant::now();
        let report = reports.next().await;
        assert_eq!((report.devices.len(), report.faults.len()), (pci::MAX, kernel_log::FAULTS_MAX));
        assert!(report.faults_left_out > 0);
        assert!(serde_json::to_vec(&report).unwrap().len() < 60 << 10);
        for _ in 0..3 {
            devices.said(b"3,1,2,-;NVRM: Xid (PCI:0000:01:00): 1, again");
            reports.next().await;
        }
        assert!(began.elapsed() >= 3 * REPORT_EVERY);
    }
}
