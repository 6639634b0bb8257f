//! A host with devices that VMs have: `laird` is killed at every point, and what it had begun with a device is done or undone.

use crate::{
    every_step::Operation,
    host::{Host, until},
    kernel::Kernel,
};
use lair_vmm::{
    api::types::{AuditQuery, EventKind, EventsQuery},
    passthrough::record::Holding,
    vm::failure::Failure,
};
use std::fs;

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

    pub(crate) fn release_gpu(&mut self, address: &str) -> Result<(), lair_vmm::api::client::ClientError> {
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
