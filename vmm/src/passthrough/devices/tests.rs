//! Devices of a kernel that is a tree of files and a program. That `laird` may be killed anywhere is tested in `tests/kill`.

use super::*;
use crate::{
    hypervisor::ports::Place,
    passthrough::{certificate::Verdict, kernel::Kernel},
    shim::protocol::GuestDevices,
};
use lair_guest::wire::message::{self, DeviceFault, DeviceReport, EccCounts, GpuFigures, GuestDevice};

const BOOT: &str = "boot";

struct Host {
    kernel: Kernel,
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Self { kernel: Kernel::new(), directory: tempfile::tempdir().unwrap() }
    }

    /// What a new `laird` knows.
    fn devices(&self) -> Arc<Devices> {
        self.hasty(Duration::from_secs(30))
    }

    fn hasty(&self, patience: Duration) -> Arc<Devices> {
        let dirs =
            Dirs { state: self.directory.path().join("state"), run: self.directory.path().join("run") };
        dirs.create().unwrap();
        let writer = Writer { program: self.kernel.program(), patience };
        let devices = Devices::open(Sysfs::at(self.kernel.root()), &dirs, BOOT, writer);
        *lock(&devices.wanted) = vec![at(DISK), at(CARD), at(ONCE)];
        devices
    }

    fn records(&self) -> usize {
        std::fs::read_dir(self.directory.path().join("state/devices")).map_or(0, Iterator::count)
    }
}

const DISK: &str = "0000:01:00.0";
const CARD: &str = "0000:02:00.0";
const SOUND: &str = "0000:02:00.1";
const ONCE: &str = "0000:00:07.0";

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn at(text: &str) -> Gpu {
    serde_json::from_value(serde_json::json!({ "address": text })).unwrap()
}

fn state(devices: &Devices, text: &str) -> State {
    let held = devices.held();
    held.get(&address(text)).map_or(State::Host, |holding| holding.life.state.clone())
}

fn leased(vm: &str) -> State {
    State::Leased { vm: vm.into() }
}

#[tokio::test]
async fn a_device_is_bound_reset_leased_reset_free_and_given_back() {
    let host = Host::new();
    let devices = host.devices();
    let before = host.kernel.device(DISK);
    assert_eq!(before, "nvme (null) 1");
    devices.check("a", &[at(DISK)]).await.unwrap();
    assert_eq!(host.kernel.writes(), Vec::<String>::new());

    let given = devices.acquire("a", &[at(DISK)]).await.unwrap();
    let node = host.kernel.root().canonicalize().unwrap().join("dev/vfio/1");
    assert_eq!(given, [Given { functions: vec![address(DISK)], nodes: vec![node], windows: vec![] }]);
    assert_eq!(state(&devices, DISK), leased("a"));
    insta::assert_snapshot!(host.kernel.writes().join("\n"), @r"
    vfio-pci > devices/0000:01:00.0/driver_override
    0 > devices/0000:01:00.0/d3cold_allowed
    0000:01:00.0 > drivers/nvme/unbind
    0000:01:00.0 > drivers_probe
    1 > devices/0000:01:00.0/reset
    ");
    assert_eq!(host.kernel.device(DISK), "vfio-pci vfio-pci 0");
    // Its hypervisor's, as a start makes it.
    let is_root = nix::unistd::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(&given[0].nodes[0], Some(70_001), Some(70_000)).unwrap();
    }

    devices.release("a").await;
    assert_eq!(state(&devices, DISK), State::Free);
    // A hypervisor that lives on can open it no more.
    let node = std::fs::metadata(&given[0].nodes[0]).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&node), nix::unistd::geteuid().as_raw());
    assert_eq!(host.kernel.writes(), ["1 > devices/0000:01:00.0/reset"]);
    // It stays with VFIO, and is clean: nothing has to be done for the next one.
    devices.acquire("b", &[at(DISK)]).await.unwrap();
    assert_eq!(host.kernel.writes(), Vec::<String>::new());
    devices.release("b").await;
    host.kernel.writes();

    devices.give_back(address(DISK)).await.unwrap();
    assert_eq!((state(&devices, DISK), host.kernel.device(DISK)), (State::Host, before));
    assert_eq!(host.records(), 0);
    insta::assert_snapshot!(host.kernel.writes().join("\n"), @r"
     > devices/0000:01:00.0/driver_override
    0000:01:00.0 > drivers/vfio-pci/unbind
    0000:01:00.0 > drivers/nvme/bind
    1 > devices/0000:01:00.0/d3cold_allowed
    ");
    let error = devices.give_back(address(DISK)).await.unwrap_err();
    assert!(matches!(error, DevicesError::Refused { refusal: Refusal::NotTaken, .. }), "{error}");
}

#[tokio::test]
async fn vf4_all_functions_of_a_card_go_together_and_are_reset_by_their_bridge() {
    let host = Host::new();
    let devices = host.devices();
    let given = devices.acquire("a", &[at(SOUND)]).await.unwrap();
    assert_eq!(given[0].functions, [address(CARD), address(SOUND)]);
    for function in [CARD, SOUND] {
        assert_eq!(host.kernel.device(function), "vfio-pci vfio-pci 0");
    }
    assert_eq!(host.kernel.writes().last().unwrap(), "1 > devices/0000:00:02.0/reset_subordinate");
    devices.release("a").await;
    // Whichever is named.
    devices.give_back(address(SOUND)).await.unwrap();
    assert_eq!(host.kernel.device(CARD), "- (null) 0");
    assert_eq!(host.kernel.device(SOUND), "snd_hda_intel (null) 1");
}

#[tokio::test]
async fn vf10_of_two_vms_that_ask_at_once_one_gets_it() {
    let host = Host::new();
    let devices = host.devices();
    let (disk, card) = ([at(DISK)], [at(CARD), at(DISK)]);
    let (a, b) = tokio::join!(devices.acquire("a", &disk), devices.acquire("b", &card));
    let (winner, error) = match (a, b) {
        (Ok(_), Err(error)) => ("a", error),
        (Err(error), Ok(_)) => ("b", error),
        other => panic!("{other:?}"),
    };
    assert!(error.to_string().contains(DISK), "{error}");
    assert_eq!(state(&devices, DISK), leased(winner));
    // The end of one who has nothing is nothing.
    devices.release("c").await;
    assert_eq!(state(&devices, DISK), leased(winner));
    let error = devices.give_back(address(DISK)).await.unwrap_err().to_string();
    assert_eq!(error, format!("Device {DISK}: VM {winner} has it; stop the VM first"));
    // Who has nothing has nothing that is half taken either.
    if winner == "a" {
        assert_eq!(state(&devices, CARD), State::Host);
    }
}

#[tokio::test]
async fn vf5_a_driver_that_does_not_let_go_leaves_the_device_in_quarantine_and_holds_up_nobody() {
    let host = Host::new();
    let devices = host.hasty(Duration::from_millis(700));
    host.kernel.order("hang-unbind", Some(""));
    let (disk, card) = ([at(DISK)], [at(ONCE)]);
    let (a, other) = tokio::join!(devices.acquire("a", &disk), devices.check("b", &card));
    let error = a.unwrap_err().to_string();
    assert!(
        error.starts_with("Device 0000:01:00.0: writing \"0000:01:00.0\" to ") && error.contains("unbind"),
        "{error}"
    );
    other.unwrap();
    let State::Quarantined { reason: Reason::Stuck { .. } } = state(&devices, DISK) else {
        panic!("{:?}", state(&devices, DISK))
    };
    // Nothing is tried again, not by its VM's end, not by the next start, not by the next laird.
    host.kernel.writes();
    devices.release("a").await;
    assert!(devices.acquire("a", &[at(DISK)]).await.unwrap_err().to_string().contains("it is quarantined"));
    let next = host.hasty(Duration::from_millis(700));
    next.resume(BTreeSet::new());
    assert!(matches!(state(&next, DISK), State::Quarantined { .. }));
    // An operator who asks is told that it hangs still: the write has not returned, so no other is begun.
    assert!(next.give_back(address(DISK)).await.is_err());
    assert_eq!(host.kernel.writes(), Vec::<String>::new());
    host.kernel.order("hang-unbind", None);
    let patient = host.devices();
    patient.give_back(address(DISK)).await.unwrap();
    assert_eq!((state(&patient, DISK), host.kernel.device(DISK)), (State::Host, "nvme (null) 1".into()));
}

#[tokio::test]
async fn vf8_a_device_that_cannot_be_reset_or_does_not_answer_is_given_to_nobody_until_it_is_released() {
    let host = Host::new();
    let devices = host.devices();
    // No way to reset it.
    let error = devices.acquire("a", &[at(ONCE)]).await.unwrap_err().to_string();
    assert_eq!(error, "Device 0000:00:07.0: 0000:00:07.0 cannot be reset: the kernel offers no way");
    // A reset that fails.
    host.kernel.order("refuse-reset_subordinate", Some("Inappropriate ioctl for device (os error 25)"));
    let error = devices.acquire("a", &[at(CARD)]).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reset") && error.contains("os error 25"), "{error}");
    // One that its VM has broken.
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    host.kernel.order("dies-0000:01:00.0", Some(""));
    devices.release("a").await;
    let dead = State::Quarantined { reason: Reason::Dead { address: DISK.into() } };
    assert_eq!(state(&devices, DISK), dead);
    // A quarantine survives, and the device is on VFIO still: its driver does not get what hangs.
    let next = host.devices();
    for device in [ONCE, CARD, DISK] {
        assert!(matches!(state(&next, device), State::Quarantined { .. }), "{device}");
        assert!(
            next.check("b", &[at(device)]).await.is_err() && next.acquire("b", &[at(device)]).await.is_err()
        );
    }
    assert_eq!(host.kernel.device(DISK), "vfio-pci vfio-pci 0");
    host.kernel.order("dies-0000:01:00.0", None);
    host.kernel.answers(DISK);
    for device in [ONCE, CARD, DISK] {
        next.give_back(address(device)).await.unwrap();
        assert_eq!(state(&next, device), State::Host);
    }
    assert_eq!(host.kernel.device(DISK), "nvme (null) 1");
    next.acquire("b", &[at(DISK)]).await.unwrap();
}

#[tokio::test]
async fn vf8_a_link_that_lost_lanes_is_a_quarantine() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    std::fs::write(host.kernel.file(DISK, "current_link_width"), "1\n").unwrap();
    devices.release("a").await;
    let lost = Reason::Width { address: DISK.into(), found: 1, wanted: 4 };
    assert_eq!(state(&devices, DISK), State::Quarantined { reason: lost });
}

#[tokio::test]
async fn vf6_a_device_that_vfio_refuses_goes_back_to_its_driver_with_the_reason() {
    let host = Host::new();
    let devices = host.devices();
    host.kernel.order("refuse-drivers_probe", Some("Invalid argument (os error 22)"));
    let error = devices.acquire("a", &[at(DISK)]).await.unwrap_err().to_string();
    assert!(error.contains("drivers_probe: Invalid argument (os error 22)"), "{error}");
    assert_eq!((state(&devices, DISK), host.kernel.device(DISK)), (State::Host, "nvme (null) 1".into()));
    assert_eq!(host.records(), 0);
}

#[tokio::test]
async fn vf11_a_device_that_vanishes_is_a_quarantine_and_can_be_forgotten() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    std::fs::remove_file(host.kernel.root().join("sys/bus/pci/devices").join(DISK)).unwrap();
    devices.release("a").await;
    let gone = Reason::Gone { address: DISK.into() };
    assert_eq!(state(&devices, DISK), State::Quarantined { reason: gone });
    devices.give_back(address(DISK)).await.unwrap();
    assert_eq!(host.records(), 0);
}

#[tokio::test]
async fn vf11_a_device_that_failed_in_a_vm_is_nobodys_afterwards_also_in_a_later_boot() {
    let host = Host::new();
    let devices = host.devices();
    let mut told = devices.subscribe();
    devices.acquire("a", &[at(CARD)]).await.unwrap();
    // The word of a VM about a device that it does not have is nothing.
    assert!(!devices.blame("b", address(CARD), "it is on fire".into()).await.unwrap());
    assert!(!devices.blame("a", address(DISK), "it is on fire".into()).await.unwrap());
    assert!(devices.blame("a", address(SOUND), "it is silent".into()).await.unwrap());
    assert!(!devices.blame("a", address(CARD), "it is on fire".into()).await.unwrap());
    assert_eq!(state(&devices, CARD), leased("a"));
    let last = std::iter::from_fn(|| told.try_recv().ok()).last().unwrap();
    let reason = format!("{SOUND} failed while a VM had it: it is silent");
    let detail = Some(format!("{reason}; quarantined once the VM has ended"));
    assert_eq!((last.vm.as_deref(), last.what), (Some("a"), What::State { state: "leased", detail }));

    // A later laird knows; after the end of the host under it as well.
    let later = record::read(&host.directory.path().join("state/devices"), "another boot");
    let quarantined =
        |state: &State| matches!(state, State::Quarantined { reason: r } if r.to_string() == reason);
    assert!(quarantined(&later[&address(CARD)].life.state));
    let lease = later[&address(CARD)].lease.as_ref().unwrap();
    assert_eq!((lease.verdict, lease.reason.as_ref()), (Some(Verdict::Quarantined), Some(&reason)));
    let devices = host.devices();
    host.kernel.writes();
    devices.release("a").await;
    assert!(quarantined(&state(&devices, CARD)));
    assert_ne!(host.kernel.writes(), Vec::<String>::new(), "it was not reset");
    let error = devices.acquire("b", &[at(CARD)]).await.unwrap_err();
    assert!(error.to_string().contains("it is silent"), "{error}");
}

/// What a guest says that sees a card like [`CARD`].
fn said(boot: &str, faults: &[(u32, u64)]) -> GuestDevices {
    let seen = |address: &str, vendor, device| GuestDevice {
        address: address.into(),
        vendor,
        device,
        class: 0x03_00_00,
        driver: None,
        port: None,
    };
    let fault = |(number, count): &(u32, u64)| DeviceFault {
        address: "0000:05:00.0".into(),
        fault: message::Fault::Xid { number: *number },
        count: *count,
        text: format!("NVRM: Xid {number}"),
    };
    let report = DeviceReport {
        devices: vec![seen("0000:05:00.0", 0x10de, 0x2684), seen("0000:06:00.0", 0x1b36, 0x0010)],
        faults: faults.iter().map(fault).collect(),
        ..DeviceReport::default()
    };
    GuestDevices { boot_id: boot.into(), report }
}

fn lease(devices: &Devices, text: &str) -> Certificate {
    devices.held()[&address(text)].lease.clone().unwrap()
}

/// The guest's kernel has said it, and nobody takes that back.
#[tokio::test]
async fn vf11_what_was_said_of_a_device_is_not_said_of_the_one_that_comes_in_its_place() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(CARD)]).await.unwrap();
    assert_eq!(lease(&devices, CARD).errors(), "no word from the guest, 0 PCIe errors");
    assert!(
        devices.reported("a", &said("one", &[])).await && !devices.reported("a", &said("one", &[])).await
    );
    assert_eq!(lease(&devices, CARD).errors(), "0 Xids, 0 PCIe errors");
    assert!(devices.reported("a", &said("one", &[(31, 2), (79, 1)])).await);
    // It is taken out; an operator has looked at it and gives it to the guest again, which runs on.
    devices.release_all_but("a", &BTreeSet::new()).await;
    assert!(matches!(state(&devices, CARD), State::Quarantined { .. }));
    devices.give_back(address(CARD)).await.unwrap();
    devices.adjust("a", &[at(CARD)]).await.unwrap();
    devices.reported("a", &said("one", &[(31, 2), (79, 1)])).await;
    assert_eq!((lease(&devices, CARD).xids(), devices.faults("a")), (0, vec![]));
    // A later laird knows it as well.
    let devices = host.devices();
    devices.reported("a", &said("one", &[(31, 2), (79, 1)])).await;
    assert_eq!((lease(&devices, CARD).xids(), devices.faults("a")), (0, vec![]));
    // What is said more is said of this one.
    assert!(devices.reported("a", &said("one", &[(31, 5), (79, 1)])).await);
    assert_eq!((lease(&devices, CARD).xids(), devices.faults("a")), (3, vec![]));
    assert!(devices.reported("a", &said("one", &[(31, 5), (79, 2)])).await);
    assert_eq!(devices.faults("a").len(), 1);
}

#[tokio::test]
async fn vf11_what_a_guest_says_against_its_device_is_in_the_certificate_and_quarantines_it_if_it_is_fatal() {
    let host = Host::new();
    let devices = host.devices();
    let mut told = devices.subscribe();
    devices.acquire("a", &[at(CARD)]).await.unwrap();
    devices.acquire("b", &[at(DISK)]).await.unwrap();
    let mut what = || {
        std::iter::from_fn(|| told.try_recv().ok())
            .filter_map(|told| match told.what {
                What::State { state: "leased", detail } => detail.filter(|detail| detail.contains("failed")),
                What::State { .. } => None,
                What::Fault(of, fault) => Some(format!("{of} {fault}")),
                What::LeaseEnded(lease) => Some(lease.verdict.unwrap().to_string()),
            })
            .collect::<Vec<_>>()
    };
    assert!(devices.reported("a", &said("one", &[(31, 2)])).await);
    assert_eq!(what(), ["0000:02:00.0 Xid 31 (memory page fault)"]);
    // Said again it is counted, and nothing else: nobody is told, and no disk has to work.
    let file = host.directory.path().join("state/devices/0000:02:00.0.json");
    let record = std::fs::read(&file).unwrap();
    assert!(!devices.reported("a", &said("one", &[(31, 9)])).await);
    assert_eq!((what(), std::fs::read(&file).unwrap() == record), (vec![], true));
    assert_eq!(lease(&devices, CARD).xids(), 9);
    assert!(devices.held()[&address(CARD)].life.blame.is_none());
    // Nor is it new to the next laird, to which the shim tells all of it.
    let devices = host.devices();
    let mut told = devices.subscribe();
    assert!(!devices.reported("a", &said("one", &[(31, 9)])).await);

    // What others say of the same device is nothing, also if theirs looks the same to them.
    devices.reported("b", &said("one", &[])).await;
    let before = devices.held();
    assert!(!devices.reported("b", &said("one", &[(79, 1)])).await);
    assert!(!devices.reported("nobody", &said("one", &[(79, 1)])).await);
    let mut lie = said("one", &[(79, 1)]);
    lie.report.faults[0].address = "0000:06:00.0".into();
    assert!(!devices.reported("a", &lie).await, "it does not have such a disk");
    assert_eq!(devices.held(), before);

    // What a GPU counts itself is noted, each time that its driver is loaded.
    let mut counted = said("two", &[]);
    let ecc_volatile = EccCounts { uncorrected: Some(2), ..EccCounts::default() };
    counted.report.gpus =
        vec![GpuFigures { address: "0000:05:00.0".into(), ecc_volatile, ..GpuFigures::default() }];
    assert!(devices.reported("a", &counted).await && !devices.reported("a", &counted).await);
    assert_eq!(
        lease(&devices, CARD).findings()[1],
        format!("{CARD}: uncorrected memory error (ECC), 2 times")
    );

    while told.try_recv().is_ok() {}
    assert!(devices.reported("a", &said("two", &[(79, 1)])).await);
    let mut what = || {
        std::iter::from_fn(|| told.try_recv().ok())
            .filter_map(|told| match told.what {
                What::State { detail, .. } => detail,
                What::Fault(of, fault) => Some(format!("{of} {fault}")),
                What::LeaseEnded(lease) => Some(lease.summary()),
            })
            .collect::<Vec<_>>()
    };
    let reason =
        "0000:02:00.0 failed while a VM had it: Xid 79 (the GPU has fallen off the bus), as VM a says";
    assert_eq!(
        what(),
        [
            "0000:02:00.0 Xid 79 (the GPU has fallen off the bus)".to_owned(),
            format!("{reason}; quarantined once the VM has ended"),
        ]
    );
    assert_eq!(state(&devices, CARD), leased("a"));
    devices.release("a").await;
    let State::Quarantined { reason: why } = state(&devices, CARD) else { panic!() };
    assert_eq!(why.to_string(), reason);
    let ended = what().pop().unwrap().replace(|c: char| c.is_ascii_digit(), "");
    insta::assert_snapshot!(ended, @"quarantined after  s, as ::. failed while a VM had it: Xid  (the GPU has fallen off the bus), as VM a says; resets  ms before,  ms after;  Xids,  PCIe errors; ::.: Xid  (memory page fault),  times; ::.: uncorrected memory error (ECC),  times; ::.: Xid  (the GPU has fallen off the bus)");
    assert_eq!(lease(&devices, CARD).verdict, Some(Verdict::Quarantined));
    assert_eq!(state(&devices, DISK), leased("b"));
    // Its word about what it has no longer is nothing.
    assert!(!devices.reported("a", &said("two", &[(79, 1), (48, 1)])).await);
    // A later laird knows all of it.
    assert_eq!(lease(&host.devices(), CARD), lease(&devices, CARD));
}

#[tokio::test]
async fn vf11_of_two_cards_that_are_alike_the_one_in_the_port_is_blamed_and_the_other_is_not() {
    let host = Host::new();
    for (name, text) in [("vendor", "0x10de\n"), ("device", "0x2684\n")] {
        std::fs::write(host.kernel.file(DISK, name), text).unwrap();
    }
    host.kernel.answers(DISK);
    let at_port = |slot: &str| Place { port: address(&format!("0000:00:{slot}.0")), function: 0 };
    let places = BTreeMap::from([(address(DISK), at_port("1a")), (address(CARD), at_port("1b"))]);
    // The guest has given the second card the lower address.
    let said = |faults: &[(u32, u64)]| {
        let mut said = said("one", faults);
        let [first, second] = said.report.devices.as_mut_slice() else { panic!() };
        first.port = Some("0000:00:1b.0".into());
        *second = GuestDevice {
            address: "0000:06:00.0".into(),
            port: Some("0000:00:1a.0".into()),
            ..first.clone()
        };
        said
    };
    let devices = host.devices();
    devices.acquire("a", &[at(DISK), at(CARD)]).await.unwrap();
    devices.place("a", &BTreeSet::new(), &places).await.unwrap();
    let before = devices.held();
    // What others have is nobody else's to place.
    let others = BTreeMap::from([(address(DISK), at_port("1c"))]);
    devices.place("b", &BTreeSet::new(), &others).await.unwrap();
    assert_eq!(devices.held(), before);
    // A later laird knows it, and it is all that there is.
    let devices = host.devices();
    assert!(devices.reported("a", &said(&[(31, 2), (79, 1)])).await);
    assert_eq!((lease(&devices, CARD).xids(), lease(&devices, DISK).xids()), (3, 0));
    assert_eq!(devices.faults("a").len(), 1);
    devices.release("a").await;
    assert!(matches!(state(&devices, CARD), State::Quarantined { .. }));
    assert_eq!((state(&devices, DISK), lease(&devices, DISK).verdict), (State::Free, Some(Verdict::Healthy)));

    // For the next one it is in no port, until that is known.
    devices.give_back(address(CARD)).await.unwrap();
    devices.acquire("a", &[at(DISK), at(CARD)]).await.unwrap();
    assert!(devices.functions_of("a").iter().all(|function| function.place.is_none()));
    devices.reported("a", &said(&[(31, 4), (79, 1)])).await;
    assert_eq!((lease(&devices, CARD).xids(), lease(&devices, DISK).xids()), (2, 2));
}

#[tokio::test]
async fn vf11_what_is_in_no_port_any_more_has_no_place() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK), at(CARD)]).await.unwrap();
    let place = |slot: &str| Place { port: address(&format!("0000:00:{slot}.0")), function: 0 };
    let places = |devices: &Devices| {
        let functions = devices.functions_of("a").into_iter();
        functions.filter_map(|lent| Some((lent.address, lent.place?))).collect::<BTreeMap<_, _>>()
    };
    let both = BTreeMap::from([(address(DISK), place("1a")), (address(CARD), place("1b"))]);
    devices.place("a", &BTreeSet::new(), &both).await.unwrap();
    assert_eq!(places(&devices), both);
    devices.place("a", &[address(CARD)].into(), &BTreeMap::new()).await.unwrap();
    let one = BTreeMap::from([(address(CARD), place("1b"))]);
    // A later laird knows it as well.
    assert_eq!([places(&devices), places(&host.devices())], [one.clone(), one]);
}

/// A guest tells sums, and what comes into a port may well have the address there of what was in it.
#[tokio::test]
async fn vf11_what_is_said_of_a_card_until_it_is_out_is_not_said_of_the_one_that_is_like_it() {
    let host = Host::new();
    for (name, text) in [("vendor", "0x10de\n"), ("device", "0x2684\n")] {
        std::fs::write(host.kernel.file(DISK, name), text).unwrap();
    }
    host.kernel.answers(DISK);
    let place = Place { port: address("0000:00:1e.0"), function: 0 };
    let said = |faults: &[(u32, u64)]| {
        let mut said = said("one", faults);
        said.report.devices.truncate(1);
        said.report.devices[0].port = Some("0000:00:1e.0".into());
        said
    };
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    devices.place("a", &BTreeSet::new(), &[(address(DISK), place)].into()).await.unwrap();
    devices.reported("a", &said(&[])).await;
    // Another is to come in its place, and it fails before it is out.
    devices.adjust("a", &[at(CARD)]).await.unwrap();
    devices.reported("a", &said(&[(79, 1)])).await;
    devices.place("a", &BTreeSet::new(), &[(address(CARD), place)].into()).await.unwrap();
    devices.reported("a", &said(&[(79, 1)])).await;
    let blamed = |devices: &Devices| {
        devices.faults("a").iter().map(|fault| fault[..12].to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((lease(&devices, CARD).xids(), blamed(&devices)), (0, vec![DISK.to_owned()]));
    // A later laird knows it as well; and what is said more is said of what is there.
    let devices = host.devices();
    devices.reported("a", &said(&[(79, 1)])).await;
    assert_eq!(blamed(&devices), [DISK]);
    devices.reported("a", &said(&[(79, 2)])).await;
    assert_eq!(blamed(&devices), [DISK, CARD]);
}

#[tokio::test]
async fn vf11_sv5_a_place_that_could_not_be_written_down_is_when_that_is_tried_again() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK), at(CARD)]).await.unwrap();
    let place = |slot: &str| Place { port: address(&format!("0000:00:{slot}.0")), function: 0 };
    let coming = BTreeMap::from([(address(DISK), place("1a")), (address(CARD), place("1b"))]);
    let (records, away) = (host.directory.path().join("state/devices"), host.directory.path().join("away"));
    std::fs::rename(&records, &away).unwrap();
    std::fs::write(&records, "").unwrap();
    let before = devices.held();
    let error = devices.place("a", &BTreeSet::new(), &coming).await.unwrap_err();
    assert!(matches!(error, DevicesError::Write(_)), "{error}");
    assert_eq!(devices.held(), before);
    std::fs::remove_file(&records).unwrap();
    std::fs::rename(&away, &records).unwrap();
    devices.place("a", &BTreeSet::new(), &coming).await.unwrap();
    let functions = host.devices().functions_of("a").into_iter();
    let recorded = functions.filter_map(|lent| Some((lent.address, lent.place?)));
    assert_eq!(recorded.collect::<BTreeMap<_, _>>(), coming);
}

#[tokio::test]
async fn vf11_a_certificate_has_windows_link_and_errors_before_and_after() {
    let host = Host::new();
    let devices = host.devices();
    let write = |name: &str, text: &str| std::fs::write(host.kernel.file(DISK, name), text).unwrap();
    let window = |end: &str| {
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        format!("0x00000000c0000000 {end} 0x0000000000040200\n{}", none.repeat(5))
    };
    let errors = |corrected: u64| {
        write("aer_dev_correctable", &format!("RxErr {corrected}\nTOTAL_ERR_COR {corrected}\n"));
        write("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL 0\n");
        write("aer_dev_fatal", "TOTAL_ERR_FATAL 0\n");
    };
    write("resource", &window("0x00000000c0003fff"));
    write("current_link_speed", "8.0 GT/s PCIe\n");
    errors(5);
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    let open = lease(&devices, DISK);
    assert!(open.is_open() && open.reset_before_ms.is_some());
    let before = &open.functions[0].before;
    assert_eq!((before.windows[0].size, before.width), (0x4000, Some(4)));
    assert_eq!(before.speed.unwrap().to_string(), "8.0 GT/s");
    devices.release("a").await;
    assert_eq!(lease(&devices, DISK).verdict, Some(Verdict::Healthy));

    // Another size is noted. The next lease has a certificate of its own.
    devices.acquire("b", &[at(DISK)]).await.unwrap();
    assert_eq!((lease(&devices, DISK).vm.as_str(), lease(&devices, DISK).verdict), ("b", None));
    write("resource", &window("0x00000000c0007fff"));
    errors(7);
    devices.release("b").await;
    let noted = lease(&devices, DISK);
    assert_eq!((state(&devices, DISK), noted.verdict), (State::Free, Some(Verdict::Noted)));
    assert_eq!(
        noted.findings(),
        ["window 0 has 32KiB, had 16KiB", "2 corrected PCIe errors counted by the host"]
    );

    // A window that is gone is a device that nobody can use.
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    write("resource", &window("0x00000000c0007fff").replace("40200", "00000"));
    devices.release("a").await;
    let State::Quarantined { reason } = state(&devices, DISK) else { panic!() };
    assert_eq!(reason.to_string(), format!("{DISK} failed while a VM had it: its window 0 of 32KiB is gone"));
    assert_eq!(lease(&devices, DISK).verdict, Some(Verdict::Quarantined));
}

#[tokio::test]
async fn what_no_vm_asks_for_any_more_goes_back_to_the_host_and_no_sooner() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    devices.want(vec![at(CARD)]);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(state(&devices, DISK), leased("a"));
    devices.release("a").await;
    assert_eq!((state(&devices, DISK), host.kernel.device(DISK)), (State::Host, "nvme (null) 1".into()));
    // One that is free already.
    devices.acquire("a", &[at(CARD)]).await.unwrap();
    devices.release("a").await;
    assert_eq!(state(&devices, CARD), State::Free);
    *lock(&devices.wanted) = vec![];
    devices.settle().await;
    assert_eq!(state(&devices, CARD), State::Host);
    // By need as well as by address.
    let disks: Gpu =
        serde_json::from_value(serde_json::json!({ "vendor": "1b36", "class": "0108" })).unwrap();
    *lock(&devices.wanted) = vec![disks.clone()];
    devices.acquire("a", &[disks]).await.unwrap();
    devices.release("a").await;
    assert_eq!(state(&devices, DISK), State::Free);
}

#[tokio::test]
async fn vf9_vf14_the_next_tenant_is_told_with_the_last_one_and_the_reset_between() {
    let host = Host::new();
    let devices = host.devices();
    let mut told = devices.told_since_the_start();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    devices.release("a").await;
    devices.acquire("b", &[at(DISK)]).await.unwrap();
    let mut states = Vec::new();
    while let Ok(Told { vm, what, .. }) = told.try_recv() {
        let What::State { state, detail } = what else {
            assert!(matches!(what, What::LeaseEnded(lease) if lease.vm == "a"));
            states.push("a's lease ended".into());
            continue;
        };
        let detail =
            detail.map(|detail| detail.replace(|c: char| c.is_ascii_digit(), "")).unwrap_or_default();
        states.push(format!("{} {state} {detail}", vm.unwrap_or_default()));
    }
    assert_eq!(
        states,
        [
            "a bound ",
            "a leased reset in  ms",
            " resetting ",
            " free reset in  ms",
            "a's lease ended",
            "b bound ",
            "b leased reset in  ms, after VM a had it",
        ]
    );
}

#[tokio::test]
async fn vf7_what_an_earlier_laird_had_under_way_is_done_and_what_a_vm_has_stays_its() {
    let host = Host::new();
    let first = host.devices();
    first.acquire("a", &[at(DISK)]).await.unwrap();
    first.acquire("b", &[at(CARD)]).await.unwrap();
    // As if it had been killed: b is gone meanwhile, a runs on.
    let next = host.devices();
    assert_eq!((state(&next, DISK), state(&next, CARD)), (leased("a"), leased("b")));
    // One that has it is not in its own way.
    next.check("b", &[at(CARD)]).await.unwrap();
    assert!(next.check("c", &[at(CARD)]).await.is_err());
    next.resume(BTreeSet::from(["a".to_owned()]));
    let began = Instant::now();
    while state(&next, CARD) != State::Free {
        assert!(began.elapsed() < Duration::from_secs(30));
        sleep(POLL).await;
    }
    assert_eq!(state(&next, DISK), leased("a"));
    // After another boot all is the host's, whatever was recorded.
    let dirs = Dirs { state: host.directory.path().join("state"), run: host.directory.path().join("run") };
    let writer = Writer { program: host.kernel.program(), patience: Duration::from_secs(30) };
    let later = Devices::open(Sysfs::at(host.kernel.root()), &dirs, "another boot", writer);
    assert!(later.held().is_empty());
    assert_eq!(host.records(), 0);
}

#[tokio::test]
async fn sv5_a_device_is_not_touched_where_that_cannot_be_written_down() {
    let host = Host::new();
    let devices = host.devices();
    let directory = host.directory.path().join("state/devices");
    std::fs::create_dir_all(directory.parent().unwrap()).unwrap();
    std::fs::write(&directory, "no directory").unwrap();
    assert!(matches!(devices.acquire("a", &[at(DISK)]).await, Err(DevicesError::Write(_))));
    assert_eq!((state(&devices, DISK), host.kernel.writes()), (State::Host, vec![]));
    std::fs::remove_file(&directory).unwrap();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    // What has failed is known as long as this laird runs.
    std::fs::rename(&directory, directory.with_extension("away")).unwrap();
    std::fs::write(&directory, "no directory").unwrap();
    assert!(devices.blame("a", address(DISK), "it is on fire".into()).await.unwrap());
    devices.release("a").await;
    assert!(matches!(state(&devices, DISK), State::Quarantined { .. }));
}

#[tokio::test]
async fn a_vm_that_runs_gets_more_keeps_what_it_has_and_gives_back_what_it_no_longer_asks_for() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    host.kernel.writes();
    let functions =
        |given: Vec<Given>| given.into_iter().flat_map(|given| given.functions).collect::<Vec<_>>();
    // By need it has one already.
    let any: Gpu = serde_json::from_value(serde_json::json!({ "vendor": "1b36", "class": "0108" })).unwrap();
    let given = devices.adjust("a", &[any, at(CARD)]).await.unwrap();
    assert_eq!(functions(given), [DISK, CARD, SOUND].map(address));
    assert_eq!((state(&devices, DISK), state(&devices, CARD)), (leased("a"), leased("a")));
    assert!(!host.kernel.writes().iter().any(|write| write.contains(DISK)), "its disk was touched");

    let given = devices.adjust("a", &[at(CARD)]).await.unwrap();
    assert_eq!(functions(given), [CARD, SOUND].map(address));
    // Its hypervisor has the disk still.
    assert_eq!((state(&devices, DISK), host.kernel.writes()), (leased("a"), vec![]));
    devices.release_all_but("a", &BTreeSet::from([CARD, SOUND].map(address))).await;
    assert_eq!((state(&devices, DISK), state(&devices, CARD)), (State::Free, leased("a")));
    assert_eq!(host.kernel.writes(), ["1 > devices/0000:01:00.0/reset"]);
    devices.release_all_but("a", &BTreeSet::new()).await;
    assert!(!devices.has_any("a"));
}

#[tokio::test]
async fn vf10_a_vm_that_runs_gets_nothing_new_where_it_cannot_have_all_of_it() {
    let host = Host::new();
    let devices = host.devices();
    devices.acquire("a", &[at(DISK)]).await.unwrap();
    devices.acquire("b", &[at(CARD)]).await.unwrap();
    let error = devices.adjust("b", &[at(CARD), at(DISK)]).await.unwrap_err();
    assert!(matches!(error, DevicesError::Unmet(_)) && error.to_string().contains("VM a has it"), "{error}");
    assert_eq!((state(&devices, DISK), state(&devices, CARD)), (leased("a"), leased("b")));
    // Nor where one of them cannot be made ready.
    devices.release("b").await;
    devices.adjust("a", &[at(CARD), at(DISK), at(ONCE)]).await.unwrap_err();
    assert_eq!((state(&devices, DISK), state(&devices, CARD)), (leased("a"), State::Host));
    assert!(matches!(state(&devices, ONCE), State::Quarantined { .. }));
    // What was being taken when an earlier laird was killed is taken anew.
    if let Some(holding) = lock(&devices.held).get_mut(&address(DISK)) {
        holding.life.state = State::Bound { vm: "a".into() };
    }
    devices.adjust("a", &[at(DISK)]).await.unwrap();
    assert_eq!(state(&devices, DISK), leased("a"));
}
