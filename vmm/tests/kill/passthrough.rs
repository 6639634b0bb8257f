//! A host with devices that VMs have: `laird` is killed at every point, and what it had begun with a device is done or undone.

use crate::{
    every_step::Operation,
    faults::signal,
    host::{Host, LIMIT, until},
    kernel::Kernel,
    stand_in::SAID_OF_DEVICES,
};
use lair_guest::wire::message::{AerSeverity, DeviceFault, DeviceReport, Fault, GuestDevice};
use lair_vmm::{
    api::{
        client::ClientError,
        gpus::GpuStatus,
        types::{AuditQuery, EventKind, EventsQuery, VmStatus},
    },
    passthrough::{certificate::Verdict, record::Holding},
    shim::protocol::GuestDevices,
    vm::{failure::Failure, machine::Part},
};
use nix::sys::signal::Signal;
use std::{
    fs,
    time::{Duration, Instant},
};

const DISK: &str = "0000:01:00.0";
const CARD: &str = "0000:02:00.0";
const SOUND: &str = "0000:02:00.1";

const WITH_DISK: &str = "autostart = false\ngpus = [{ address = \"0000:01:00.0\" }]";
const WITH_GPU: &str = "autostart = false\ngpus = [{ vendor = \"nvidia\", arch = \"ada\" }]";

impl Host {
    /// Each device, and what is recorded of it but for times.
    pub(crate) fn devices(&self) -> Vec<String> {
        let Some(kernel) = &self.kernel else { return vec![] };
        let told = |address: &&str| {
            let record = fs::read(self.dirs().state.join(format!("devices/{address}.json"))).ok();
            let life = record.map(|text| serde_json::from_slice::<Holding>(&text).unwrap().life);
            format!("{address} {} {}", kernel.device(address), serde_json::to_string(&life).unwrap())
        };
        [DISK, CARD, SOUND].iter().map(told).collect()
    }

    /// A host with devices, and a VM that is stopped.
    fn with_devices(&mut self, keys: &str) {
        self.kernel = Some(Kernel::new());
        self.fleet(&[("a", keys)]);
        self.laird(None);
        self.settled(&[("a", "stopped")]).unwrap();
    }

    fn device(&self, address: &str) -> String {
        self.kernel.as_ref().unwrap().device(address)
    }

    /// The functions that the hypervisor of a VM has, with their ports.
    fn plugged(&self, vm: &str) -> Vec<String> {
        let path = self.dirs().run.join("vms").join(vm).join("hypervisor/devices");
        let names = fs::read_to_string(path).unwrap_or_default();
        names.lines().filter(|name| name.contains('-')).map(Into::into).collect()
    }

    /// Waits until a VM runs with these functions, and devices are so; an error if `laird` ends before.
    fn comes_to(&mut self, plugged: &[&str], devices: [(&str, &str); 2]) -> Result<(), ClientError> {
        let began = Instant::now();
        loop {
            let follows = !self.status()?["a"].pending_restart;
            let as_told = devices.iter().all(|(device, address)| self.device(address) == *device);
            if follows && as_told && self.plugged("a") == plugged {
                return Ok(());
            }
            assert!(began.elapsed() < LIMIT, "{:?} {:?}\n{}", self.plugged("a"), self.devices(), self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn release_gpu(&mut self, address: &str) -> Result<(), ClientError> {
        let address = address.parse().unwrap();
        self.ask(async |client| client.release_gpu(address).await.map(drop))
    }
}

#[test]
fn vf7_start_with_a_card() {
    let operation = Operation {
        before: |host| host.with_devices(WITH_GPU),
        ask: |host| host.start("a"),
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step_and(|host| {
        for function in [CARD, SOUND] {
            assert_eq!(host.device(function), "vfio-pci vfio-pci 0");
        }
        let lease = host.gpu(CARD).held.unwrap().lease.unwrap();
        assert_eq!((lease.vm.as_str(), lease.functions.len(), lease.verdict), ("a", 2, None));
        let places = [CARD, SOUND].map(|function| host.place(CARD, function));
        assert_eq!(places, ["0000:00:1a.0 0", "0000:00:1a.0 1"].map(|place| Some(place.into())));
    });
}

#[test]
fn vf7_stop_with_a_device() {
    let operation = Operation {
        before: |host| {
            host.with_devices(WITH_DISK);
            host.start("a").unwrap();
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| host.stop("a"),
        after: &[("a", "stopped")],
    };
    // Reset, and free for the next one.
    operation.killed_at_every_step_and(|host| {
        assert!(host.devices()[0].contains("\"state\":\"free\",\"clean\":true"), "{:?}", host.devices());
        let lease = host.gpu(DISK).held.unwrap().lease.unwrap();
        assert_eq!((lease.vm.as_str(), lease.verdict), ("a", Some(Verdict::Healthy)));
        assert!(lease.functions[0].after.is_some() && lease.reset_after_ms.is_some());
    });
}

#[test]
fn vf7_remove_a_vm_with_a_device() {
    let operation = Operation {
        before: |host| {
            host.with_devices(WITH_DISK);
            host.start("a").unwrap();
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| {
            host.fleet(&[]);
            host.apply()
        },
        after: &[],
    };
    operation.killed_at_every_step_and(|host| {
        until(|| (host.devices()[0] == format!("{DISK} nvme (null) 1 null")).then_some(()));
    });
}

#[test]
fn vf7_release_a_device() {
    let operation = Operation {
        before: |host| {
            host.with_devices(WITH_DISK);
            host.start("a").unwrap();
            host.settled(&[("a", "ready")]).unwrap();
            host.stop("a").unwrap();
            host.settled(&[("a", "stopped")]).unwrap();
        },
        ask: |host| host.release_gpu(DISK),
        after: &[("a", "stopped")],
    };
    operation.killed_at_every_step_and(|host| {
        until(|| (host.devices()[0] == format!("{DISK} nvme (null) 1 null")).then_some(()));
    });
}

#[test]
fn vf7_a_device_comes_to_a_vm_that_runs() {
    let operation = Operation {
        before: |host| {
            host.with_devices("autostart = false");
            host.start("a").unwrap();
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| {
            host.fleet(&[("a", WITH_DISK)]);
            host.apply()?;
            host.comes_to(&["port1-0000.01.00.0"], [("vfio-pci vfio-pci 0", DISK), ("- (null) 0", CARD)])
        },
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step_and(|host| {
        assert_eq!(host.place(DISK, DISK).as_deref(), Some("0000:00:1b.0 0"));
    });
}

#[test]
fn vf7_a_device_leaves_a_vm_that_runs_and_another_comes() {
    let operation = Operation {
        before: |host| {
            host.with_devices(WITH_DISK);
            host.start("a").unwrap();
            host.settled(&[("a", "ready")]).unwrap();
        },
        ask: |host| {
            host.fleet(&[("a", WITH_GPU)]);
            host.apply()?;
            let card = ["port2-0000.02.00.0", "port2-0000.02.00.1"];
            host.comes_to(&card, [("nvme (null) 1", DISK), ("vfio-pci vfio-pci 0", CARD)])
        },
        after: &[("a", "ready")],
    };
    operation.killed_at_every_step_and(|host| {
        assert_eq!(host.place(CARD, SOUND).as_deref(), Some("0000:00:1b.0 1"));
    });
}

#[test]
fn vf11_no_place_is_noted_in_a_machine_that_an_earlier_laird_has_started() {
    let mut host = Host::new();
    host.with_devices("autostart = false");
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    host.kill();
    let path = host.dirs().vm("a").unwrap().record();
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let machine = record["plan"]["machine"].as_object_mut().unwrap();
    assert_eq!(machine.remove("known_slots"), Some(true.into()));
    fs::write(&path, record.to_string()).unwrap();
    host.laird(None);
    host.settled(&[("a", "ready")]).unwrap();
    host.fleet(&[("a", WITH_DISK)]);
    host.apply().unwrap();
    let devices = [("vfio-pci vfio-pci 0", DISK), ("- (null) 0", CARD)];
    host.comes_to(&["port1-0000.01.00.0"], devices).unwrap();
    assert_eq!(host.place(DISK, DISK), None);
    // Its next start knows.
    host.restart("a").unwrap();
    until(|| host.place(DISK, DISK).filter(|place| place == "0000:00:1a.0 0"));
}

#[test]
fn vf11_a_card_that_comes_into_the_port_of_another_is_noted_there_once_that_is_out() {
    let mut host = Host::new();
    host.with_devices(WITH_DISK);
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    let hypervisor = host.dirs().run.join("vms/a/hypervisor");
    let file = |name: &str| hypervisor.join(name);
    for order in ["one-port", "keeps", "busy"] {
        fs::write(file(order), "").unwrap();
    }
    host.fleet(&[("a", WITH_GPU)]);
    host.apply().unwrap();
    until(|| file("asked").exists().then_some(()));
    let of_disk = host.place(DISK, DISK);
    assert_eq!((of_disk.as_deref(), host.place(CARD, CARD)), (Some("0000:00:1a.0 0"), None));
    fs::remove_file(file("keeps")).unwrap();
    until(|| file("at-work").exists().then_some(()));
    // Before the guest sees it.
    let places = [(DISK, DISK), (CARD, CARD), (CARD, SOUND)].map(|(key, address)| host.place(key, address));
    assert_eq!(places, [None, Some("0000:00:1e.0 0".into()), Some("0000:00:1e.0 1".into())]);
    assert!(host.devices()[0].contains("\"leased\""), "{:?}", host.devices());
    fs::remove_file(file("busy")).unwrap();
    host.comes_to(
        &["port1-0000.02.00.0", "port1-0000.02.00.1"],
        [("nvme (null) 1", DISK), ("vfio-pci vfio-pci 0", CARD)],
    )
    .unwrap();
}

/// A hypervisor that pins a guest's memory answers nothing, and its guest stands still.
#[test]
fn hv4_a_vm_is_not_ended_for_the_silence_while_a_device_comes() {
    let mut host = Host::new();
    host.with_devices("autostart = false");
    host.start("a").unwrap();
    let before = host.settled(&[("a", "ready")]).unwrap();
    let file = |name: &str| host.dirs().run.join("vms/a/hypervisor").join(name);
    let (busy, at_work) = (file("busy"), file("at-work"));
    fs::write(&busy, "").unwrap();
    host.fleet(&[("a", WITH_DISK)]);
    host.apply().unwrap();
    until(|| at_work.exists().then_some(()));
    signal(&before["a"], Part::Shim, Signal::SIGUSR1);
    host.settled(&[("a", "booting")]).unwrap();
    // Longer than any other answer of a hypervisor is waited for.
    std::thread::sleep(Duration::from_secs(12));
    let during = host.settled(&[("a", "booting")]).unwrap();
    assert_eq!((&during["a"].processes, &during["a"].failure), (&before["a"].processes, &None));
    fs::remove_file(&busy).unwrap();
    until(|| (host.plugged("a") == ["port1-0000.01.00.0"]).then_some(()));
    until(|| (!host.status().unwrap()["a"].pending_restart).then_some(()));
    assert_eq!(host.status().unwrap()["a"].processes, before["a"].processes);
}

#[test]
fn vf10_two_vms_that_run_exchange_a_device_and_one_that_cannot_have_it_says_so() {
    let mut host = Host::new();
    host.kernel = Some(Kernel::new());
    host.fleet(&[("a", WITH_DISK), ("b", "autostart = false")]);
    host.laird(None);
    for vm in ["a", "b"] {
        host.start(vm).unwrap();
    }
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    // Two want it: who has it keeps it.
    host.fleet(&[("a", WITH_DISK), ("b", WITH_DISK)]);
    host.apply().unwrap();
    let fault = until(|| host.status().unwrap()["b"].degraded.first().cloned());
    assert!(
        fault.starts_with("its devices are not what the fleet file says: Cannot have the device"),
        "{fault}"
    );
    assert!(fault.contains("VM a has it"), "{fault}");
    assert!(host.status().unwrap()["b"].pending_restart);
    // It comes as soon as the other has let go of it.
    host.fleet(&[("a", "autostart = false"), ("b", WITH_DISK)]);
    host.apply().unwrap();
    until(|| (host.plugged("b") == ["port1-0000.01.00.0"]).then_some(()));
    until(|| (!host.status().unwrap()["b"].pending_restart).then_some(()));
    let vms = host.status().unwrap();
    assert!(host.plugged("a").is_empty() && vms["b"].degraded.is_empty(), "{vms:?}");
    host.kill_vm("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    assert!(host.devices()[0].contains("\"state\":\"free\",\"clean\":true"), "{:?}", host.devices());
}

#[test]
fn vf10_two_vms_that_run_swap_their_devices() {
    let mut host = Host::new();
    host.kernel = Some(Kernel::new());
    host.fleet(&[("a", WITH_DISK), ("b", WITH_GPU)]);
    host.laird(None);
    for vm in ["a", "b"] {
        host.start(vm).unwrap();
    }
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    // Each has what the other is to have.
    host.fleet(&[("a", WITH_GPU), ("b", WITH_DISK)]);
    host.apply().unwrap();
    until(|| host.plugged("a").iter().all(|name| name.contains("0000.02.00")).then_some(()));
    until(|| (host.plugged("a").len() == 2 && host.plugged("b").len() == 1).then_some(()));
    assert!(host.plugged("b")[0].ends_with("0000.01.00.0"), "{:?}", host.plugged("b"));
    until(|| {
        host.status().unwrap().values().all(|vm| vm.degraded.is_empty() && !vm.pending_restart).then_some(())
    });
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
}

#[test]
fn hv11_what_did_not_come_about_is_told_and_comes_about_later_by_itself() {
    let mut host = Host::new();
    host.with_devices("autostart = false");
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    let refuses = host.dirs().run.join("vms/a/hypervisor/refuses");
    fs::write(&refuses, "").unwrap();
    host.fleet(&[("a", WITH_DISK)]);
    host.apply().unwrap();
    let fault = until(|| host.status().unwrap()["a"].degraded.first().cloned());
    assert!(fault.ends_with("QEMU refused device_add: not now"), "{fault}");
    // Nobody has it meanwhile.
    until(|| host.devices()[0].contains("\"free\"").then_some(()));
    fs::remove_file(&refuses).unwrap();
    until(|| (host.plugged("a") == ["port1-0000.01.00.0"]).then_some(()));
    until(|| host.status().unwrap()["a"].degraded.is_empty().then_some(()));
}

#[test]
fn vf10_vf14_a_device_goes_from_one_vm_to_another_and_both_are_recorded() {
    let mut host = Host::new();
    host.kernel = Some(Kernel::new());
    host.fleet(&[("a", WITH_DISK), ("b", WITH_DISK)]);
    host.laird(None);
    host.start("a").unwrap();
    host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    // What the hypervisor was told.
    let refusal = host.start("b").unwrap_err().to_string();
    assert!(refusal.contains("VM a has it; stop the VM first"), "{refusal}");
    assert!(host.release_gpu(DISK).unwrap_err().to_string().contains("VM a has it"));
    // Nothing that laird is killed for is taken from it.
    host.kill();
    host.laird(None);
    host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    assert!(host.start("b").is_err());
    // Its hypervisor is killed: the device is reset before anybody gets it.
    host.kill_vm("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    host.kernel.as_ref().unwrap().writes();
    host.start("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert_eq!(host.kernel.as_ref().unwrap().writes(), Vec::<String>::new());
    let events = host
        .ask(async |client| {
            let mut lines = client.events(&EventsQuery { follow: false, after: None }).await?;
            let mut told = Vec::new();
            while let Some(event) = lines.next().await? {
                if let EventKind::Device { vm, state, .. } = event.kind {
                    told.push(format!("{} {state}", vm.unwrap_or_default()).trim().to_owned());
                }
            }
            Ok(told)
        })
        .unwrap();
    assert_eq!(events, ["resetting", "free", "b bound", "b leased"]);
    let audit = until(|| {
        let audit = host
            .ask(async |client| {
                let mut lines = client.audit(&AuditQuery::default()).await?;
                let mut told = Vec::new();
                while let Some(record) = lines.next().await? {
                    if record.fields.get("kind").is_some_and(|kind| kind == "device") {
                        told.push(record.fields["detail"].as_str().unwrap().to_owned());
                    }
                }
                Ok(told)
            })
            .unwrap();
        (audit.len() >= 6).then_some(audit)
    });
    assert!(audit.last().unwrap().starts_with("0000:01:00.0 leased: reset in "), "{audit:?}");
    assert!(audit.last().unwrap().ends_with("after VM a had it"), "{audit:?}");
    let gpu = host.ask(async |client| client.gpu(DISK.parse().unwrap()).await).unwrap();
    let held = gpu.held.unwrap();
    assert_eq!((gpu.state.as_str(), held.vm.as_deref(), gpu.available), ("leased", Some("b"), false));
}

/// What a guest says that sees one device, with messages of its kernel about it.
fn said(vendor: u16, device: u16, faults: &[Fault]) -> GuestDevices {
    let address = || "0000:05:00.0".to_owned();
    let seen =
        GuestDevice { address: address(), vendor, device, class: 0x03_00_00, driver: None, port: None };
    let fault = |fault: &Fault| DeviceFault {
        address: address(),
        fault: *fault,
        count: 1,
        text: "\u{1b}[2J in the guest's words".into(),
    };
    let faults = faults.iter().map(fault).collect();
    let report = DeviceReport { devices: vec![seen], faults, ..DeviceReport::default() };
    GuestDevices { boot_id: "guest".into(), report }
}

impl Host {
    /// Has a VM's guest say something of its devices.
    fn say(&mut self, vm: &str, said: &GuestDevices) {
        let status = self.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
        self.say_with(vm, &status[vm], said);
    }

    fn say_with(&self, vm: &str, status: &VmStatus, said: &GuestDevices) {
        let beside = self.dirs().vm(vm).unwrap().run.join(SAID_OF_DEVICES);
        fs::write(beside, serde_json::to_vec(said).unwrap()).unwrap();
        signal(status, Part::Shim, Signal::SIGUSR2);
    }

    /// All that this `laird` has told of what guests say, and of leases.
    fn told(&mut self) -> Vec<String> {
        self.ask(async |client| {
            let mut lines = client.events(&EventsQuery { follow: false, after: None }).await?;
            let mut told = Vec::new();
            while let Some(event) = lines.next().await? {
                match event.kind {
                    EventKind::DeviceFault { device, vm, fault } => {
                        told.push(format!("{vm} {device} {fault}"));
                    }
                    EventKind::LeaseEnded { device, vm, summary } => {
                        let verdict = summary.split(' ').next().unwrap();
                        told.push(format!("{vm} {device} {verdict}"));
                    }
                    _ => {}
                }
            }
            Ok(told)
        })
        .unwrap()
    }

    /// In which port its guest sees a function, and as which of its functions.
    fn place(&self, key: &str, function: &str) -> Option<String> {
        let record = fs::read(self.dirs().state.join(format!("devices/{key}.json"))).ok()?;
        let record: Holding = serde_json::from_slice(&record).unwrap();
        let place = record.places.get(&function.parse().unwrap())?;
        Some(format!("{} {}", place.port, place.function))
    }

    fn gpu(&mut self, address: &str) -> GpuStatus {
        self.ask(async |client| client.gpu(address.parse().unwrap()).await).unwrap()
    }
}

#[test]
fn vf11_an_xid_that_a_guest_reports_quarantines_its_device_once_its_vm_has_ended_and_no_other() {
    let xid = |number| Fault::Xid { number };
    let mut host = Host::new();
    host.kernel = Some(Kernel::new());
    host.fleet(&[("a", WITH_GPU), ("b", WITH_DISK)]);
    host.laird(None);
    host.start("a").unwrap();
    host.start("b").unwrap();
    // A guest that lies: of a card that another VM has, and of one that it does not have itself.
    host.say("b", &said(0x10de, 0x2684, &[xid(79)]));
    host.say("b", &said(0x1b36, 0x0010, &[Fault::Aer { severity: AerSeverity::Corrected }]));
    let of_disk = format!("b {DISK} corrected PCIe error (AER)");
    until(|| host.told().contains(&of_disk).then_some(()));
    assert_eq!(host.told(), [of_disk]);
    host.say("a", &said(0x10de, 0x2684, &[xid(31)]));
    until(|| (host.told().len() == 2).then_some(()));
    let lease = host.gpu(CARD).held.unwrap().lease.unwrap();
    assert_eq!((lease.xids(), lease.verdict), (1, None));
    assert_eq!(lease.faults[0].text, "\u{1b}[2J in the guest's words", "shims escape it, and vmctl");

    // What is said while no laird runs is heard by the next one, and what the one before has heard is no news.
    let status = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    // It is told before it is on disk.
    let record = host.dirs().state.join(format!("devices/{CARD}.json"));
    until(|| fs::read_to_string(&record).is_ok_and(|text| text.contains("guest's words")).then_some(()));
    host.kill();
    host.say_with("a", &status["a"], &said(0x10de, 0x2684, &[xid(31), xid(79)]));
    host.laird(None);
    until(|| (!host.told().is_empty()).then_some(()));
    assert_eq!(host.told(), [format!("a {CARD} Xid 79 (the GPU has fallen off the bus)")]);
    // The VM goes on with it.
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!(host.gpu(CARD).state, "leased");
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();

    let card = host.gpu(CARD);
    let held = card.held.unwrap();
    let reason =
        format!("{CARD} failed while a VM had it: Xid 79 (the GPU has fallen off the bus), as VM a says");
    assert_eq!((card.state.as_str(), held.reason.as_deref()), ("quarantined", Some(reason.as_str())));
    let lease = held.lease.unwrap();
    assert_eq!((lease.vm.as_str(), lease.verdict, lease.xids()), ("a", Some(Verdict::Quarantined), 2));
    assert!(lease.returned.is_some() && lease.reset_before_ms.is_some() && lease.reset_after_ms.is_some());
    assert_eq!(host.told().last().unwrap(), &format!("a {CARD} quarantined"));
    let refusal = host.start("a").unwrap_err().to_string();
    assert!(refusal.contains("Xid 79"), "{refusal}");
    let line = until(|| {
        host.ask(async |client| {
            let query = AuditQuery { vm: Some("a".into()), ..AuditQuery::default() };
            let mut lines = client.audit(&query).await?;
            while let Some(record) = lines.next().await? {
                if record.fields.get("kind").is_some_and(|kind| kind == "lease") {
                    return Ok(record.fields["detail"].as_str().map(str::to_owned));
                }
            }
            Ok(None)
        })
        .unwrap()
    });
    assert!(line.starts_with(&format!("{CARD} quarantined after ")) && line.contains("Xid 79"), "{line}");
    // The other VM's disk is its own, and free afterwards.
    host.stop("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    let disk = host.gpu(DISK);
    let verdict = disk.held.unwrap().lease.unwrap().verdict;
    assert_eq!((disk.state.as_str(), verdict), ("free", Some(Verdict::Noted)));
    // An operator who has looked at the card gives it back.
    host.release_gpu(CARD).unwrap();
    assert_eq!(host.gpu(CARD).state, "host");
}

#[test]
fn vf8_a_vm_does_not_start_with_a_device_that_is_quarantined_until_that_is_released() {
    let mut host = Host::new();
    host.with_devices(WITH_DISK);
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    host.kernel.as_ref().unwrap().order("dies-0000:01:00.0", Some(""));
    // The VM ends as it should, whatever becomes of its device.
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped")]).unwrap();
    host.kill();
    host.laird(None);
    let refusal = host.start("a").unwrap_err().to_string();
    assert!(refusal.contains("it is quarantined: 0000:01:00.0 does not answer"), "{refusal}");
    let kernel = host.kernel.as_ref().unwrap();
    kernel.order("dies-0000:01:00.0", None);
    kernel.answers(DISK);
    host.release_gpu(DISK).unwrap();
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
}

#[test]
fn vf13_a_device_whose_window_has_no_room_is_refused_before_anything_is_done_and_a_large_one_is_made_room_for()
 {
    let mut host = Host::new();
    host.with_devices(WITH_DISK);
    let window = |host: &Host, gib: u64| {
        let file = host.kernel.as_ref().unwrap().file(DISK, "resource");
        fs::write(file, format!("0x0 {:#x} 0x14220c\n", (gib << 30) - 1)).unwrap();
    };
    window(&host, 1024);
    let refusal = host.start("a").unwrap_err().to_string();
    assert!(refusal.contains("no room for window 0 (BAR) of 0000:01:00.0, which has 1TiB"), "{refusal}");
    assert!(refusal.contains("use KVM"), "{refusal}");
    assert_eq!((host.device(DISK), host.kernel.as_ref().unwrap().writes()), ("nvme (null) 1".into(), vec![]));
    host.settled(&[("a", "stopped")]).unwrap();
    window(&host, 128);
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    let record = fs::read_to_string(host.dirs().vm("a").unwrap().record()).unwrap();
    assert!(record.contains("\"hole\": \"252GiB\""), "{record}");
}

#[test]
fn vf13_a_vm_that_runs_gets_no_device_for_whose_window_it_was_started_without_room() {
    let mut host = Host::new();
    host.with_devices("autostart = false");
    let file = host.kernel.as_ref().unwrap().file(DISK, "resource");
    fs::write(file, format!("0x0 {:#x} 0x14220c\n", (128_u64 << 30) - 1)).unwrap();
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    host.fleet(&[("a", WITH_DISK)]);
    host.apply().unwrap();
    let fault = until(|| host.status().unwrap()["a"].degraded.first().cloned());
    assert!(fault.contains("was started with room for 32GiB; it gets them with `vmctl restart`"), "{fault}");
    assert!(host.plugged("a").is_empty());
    // Nobody has it meanwhile.
    until(|| {
        (host.device(DISK) == "vfio-pci vfio-pci 0" && host.devices()[0].contains("\"free\"")).then_some(())
    });
    host.restart("a").unwrap();
    until(|| (host.plugged("a") == ["port1-0000.01.00.0"]).then_some(()));
    host.settled(&[("a", "ready")]).unwrap();
    let vms = host.status().unwrap();
    assert!(vms["a"].degraded.is_empty() && !vms["a"].pending_restart, "{vms:?}");
}

#[test]
fn vf6_a_start_whose_device_is_refused_fails_in_that_step_and_leaves_the_device_with_its_driver() {
    let mut host = Host::new();
    host.with_devices(WITH_DISK);
    host.kernel.as_ref().unwrap().order("refuse-drivers_probe", Some("Invalid argument (os error 22)"));
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "failed")]).unwrap();
    let Some(Failure::StepFailed { message, .. }) = &vms["a"].failure else { panic!("{vms:?}") };
    assert!(message.contains("drivers_probe: Invalid argument"), "{message}");
    assert_eq!(host.device(DISK), "nvme (null) 1");
    assert!(host.traces().processes.is_empty());
}
