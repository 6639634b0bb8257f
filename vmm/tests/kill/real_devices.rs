//! Devices of a real kernel: VFIO, IOMMU groups, resets. SKIPPED but in the host VM; `tests/run` has it run in `tests/host-vm`. The
//! hypervisors are stand-ins, so no guest sees the devices.

use crate::host::{Host, LIMIT, until};
use lair_vmm::api::{
    client::ClientError,
    gpus::GpuStatus,
    types::{EventKind, EventsQuery},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

const NVME: &str = "0000:01:00.0";
const DISPLAY: &str = "0000:03:00.0";
const SOUND: &str = "0000:03:00.1";
const NETWORK_BEHIND_BRIDGE: &str = "0000:05:01.0";
const EDU_BEHIND_BRIDGE: &str = "0000:05:02.0";
const EDU: &str = "0000:00:07.0";
const NETWORK: &str = "0000:02:00.0";

/// Devices that are there for one test each, which takes them away for good; and their slots.
const UNPLUGGED: (&str, u8) = ("0000:07:00.0", 6);
const KEPT: (&str, u8) = ("0000:08:00.0", 7);

/// What is at the start of the NVMe disk.
const CONTENT: &[u8] = b"lair: the content of the NVMe disk\n";

/// There is one of each device, so one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A host with VMs that ask for devices; `None`, with the reason, where there are none.
fn host(vms: &[(&str, &str)]) -> Option<(Host, MutexGuard<'static, ()>)> {
    if std::env::var_os("LAIR_HOST_VM").is_none() {
        println!("SKIPPED: devices of a real kernel, because this is not the host in a VM (tests/host-vm)");
        return None;
    }
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut host = Host::new();
    ask_for(&host, vms);
    host.laird(None);
    Some((host, alone))
}

/// VMs that start when they are told to, each with these devices.
fn ask_for(host: &Host, vms: &[(&str, &str)]) {
    let keys: Vec<_> =
        vms.iter().map(|(name, gpus)| (*name, format!("autostart = false\ngpus = [{gpus}]"))).collect();
    host.fleet(&keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect::<Vec<_>>());
}

fn at(address: &str) -> String {
    format!("{{ address = \"{address}\" }}")
}

fn attribute(address: &str, name: &str) -> String {
    let path = Path::new("/sys/bus/pci/devices").join(address).join(name);
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn linked(address: &str, name: &str) -> Option<String> {
    let path = Path::new("/sys/bus/pci/devices").join(address).join(name);
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn driver(address: &str) -> Option<String> {
    linked(address, "driver")
}

fn node(address: &str) -> PathBuf {
    Path::new("/dev/vfio").join(linked(address, "iommu_group").unwrap())
}

/// The device as `laird` tells it.
fn told(host: &mut Host, address: &str) -> GpuStatus {
    let address = address.parse().unwrap();
    host.ask(async |client| client.gpu(address).await).unwrap()
}

fn has_content() -> bool {
    let mut content = vec![0; CONTENT.len()];
    File::open("/dev/nvme0n1").and_then(|mut disk| disk.read_exact(&mut content)).is_ok()
        && content == CONTENT
}

fn refused(outcome: Result<(), ClientError>) -> String {
    outcome.unwrap_err().to_string()
}

#[test]
fn vf7_an_nvme_disk_asked_for_by_need_is_leased_reset_free_and_given_back() {
    let any = "{ vendor = \"1b36\", class = \"0108\" }";
    let Some((mut host, _alone)) = host(&[("a", any)]) else { return };
    until(|| has_content().then_some(()));
    let d3cold = attribute(NVME, "d3cold_allowed");
    assert_eq!(told(&mut host, NVME).state, "host");
    for _ in 0..2 {
        host.start("a").unwrap();
        host.settled(&[("a", "ready")]).unwrap();
        assert_eq!(driver(NVME).as_deref(), Some("vfio-pci"));
        assert_eq!(
            (attribute(NVME, "driver_override"), attribute(NVME, "d3cold_allowed")),
            ("vfio-pci".into(), "0".into())
        );
        assert!(node(NVME).exists() && !Path::new("/dev/nvme0n1").exists());
        let gpu = told(&mut host, NVME);
        assert_eq!((gpu.state.as_str(), gpu.held.unwrap().vm.as_deref()), ("leased", Some("a")));
        assert!(refused(host.release_gpu(NVME)).contains("VM a has it"));
        // Who runs without laird keeps what it has.
        host.kill();
        host.laird(None);
        host.settled(&[("a", "ready")]).unwrap();
        assert_eq!(told(&mut host, NVME).state, "leased");
        host.stop("a").unwrap();
        host.settled(&[("a", "stopped")]).unwrap();
        let gpu = told(&mut host, NVME);
        assert_eq!((gpu.state.as_str(), driver(NVME).as_deref()), ("free", Some("vfio-pci")));
        assert!(gpu.available && gpu.held.unwrap().clean);
    }
    host.release_gpu(NVME).unwrap();
    assert_eq!(
        (driver(NVME).as_deref(), attribute(NVME, "driver_override")),
        (Some("nvme"), "(null)".into())
    );
    assert_eq!((attribute(NVME, "d3cold_allowed"), node(NVME).exists()), (d3cold, false));
    until(|| has_content().then_some(()));
    assert_eq!(told(&mut host, NVME).state, "host");
}

#[test]
fn vf4_vf8_a_card_of_two_functions_is_taken_whole_reset_by_vfio_and_given_back() {
    let Some((mut host, _alone)) = host(&[("a", &at(SOUND))]) else { return };
    let before = [driver(DISPLAY), driver(SOUND)];
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    for function in [DISPLAY, SOUND] {
        assert_eq!(driver(function).as_deref(), Some("vfio-pci"));
        assert_eq!(told(&mut host, function).state, "leased");
    }
    host.checkpoints();
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped")]).unwrap();
    assert_eq!(told(&mut host, DISPLAY).state, "free");
    // They are in a slot that is watched.
    let points = host.checkpoints();
    assert!(points.iter().any(|point| point.contains("after VFIO has reset it")), "{points:?}");
    // The fleet no longer asks for it.
    ask_for(&host, &[("a", "")]);
    host.apply().unwrap();
    until(|| ([driver(DISPLAY), driver(SOUND)] == before).then_some(()));
    until(|| (told(&mut host, SOUND).state == "host").then_some(()));
}

#[test]
fn vf2_a_group_that_others_share_is_refused_with_them_and_can_be_taken_whole() {
    let both = format!("{}, {}", at(NETWORK_BEHIND_BRIDGE), at(EDU_BEHIND_BRIDGE));
    let Some((mut host, _alone)) = host(&[("a", &at(EDU_BEHIND_BRIDGE)), ("b", &both)]) else { return };
    let refusal = refused(host.start("a"));
    for words in [
        "IOMMU group",
        "has other devices of the host's",
        "0000:05:01.0 (Ethernet controller, driver e1000)",
        EDU_BEHIND_BRIDGE,
    ] {
        assert!(refusal.contains(words), "{refusal}");
    }
    assert_eq!(driver(NETWORK_BEHIND_BRIDGE).as_deref(), Some("e1000"));
    // Whole, but for the bridge, with whose driver VFIO does not take the group.
    let refusal = refused(host.start("b"));
    assert!(
        refusal.contains("the bridge 0000:04:00.0") && refusal.contains("has the driver shpchp"),
        "{refusal}"
    );
    fs::write("/sys/bus/pci/drivers/shpchp/unbind", "0000:04:00.0").unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    for device in [NETWORK_BEHIND_BRIDGE, EDU_BEHIND_BRIDGE] {
        assert_eq!(driver(device).as_deref(), Some("vfio-pci"));
    }
    host.stop("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    host.release_gpu(NETWORK_BEHIND_BRIDGE).unwrap();
    assert_eq!((driver(NETWORK_BEHIND_BRIDGE).as_deref(), driver(EDU_BEHIND_BRIDGE)), (Some("e1000"), None));
    // Other tests find the bridge as it was.
    fs::write("/sys/bus/pci/drivers/shpchp/bind", "0000:04:00.0").unwrap();
    assert_eq!(driver("0000:04:00.0").as_deref(), Some("shpchp"));
}

#[test]
fn vf8_a_device_that_cannot_be_reset_is_quarantined_until_it_is_released() {
    let Some((mut host, _alone)) = host(&[("a", &at(EDU))]) else { return };
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "failed")]).unwrap();
    let failure = vms["a"].failure.as_ref().unwrap().to_string();
    assert!(failure.contains("0000:00:07.0 cannot be reset: the kernel offers no way"), "{failure}");
    host.kill();
    host.laird(None);
    assert_eq!(told(&mut host, EDU).state, "quarantined");
    assert!(refused(host.start("a")).contains("it is quarantined"));
    host.release_gpu(EDU).unwrap();
    assert_eq!((told(&mut host, EDU).state.as_str(), driver(EDU)), ("host", None));
}

#[test]
fn vf1_the_hosts_own_disk_is_refused() {
    let Some((mut host, _alone)) = host(&[("a", &at("0000:00:06.0"))]) else { return };
    let refusal = refused(host.start("a"));
    assert!(refusal.contains("in use") && refusal.contains("is mounted on"), "{refusal}");
    assert_eq!(driver("0000:00:06.0").as_deref(), Some("virtio-pci"));
}

#[test]
fn vf9_a_device_is_not_reset_while_a_process_has_it_open() {
    let Some((mut host, _alone)) = host(&[("a", &at(NVME))]) else { return };
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    // As if its hypervisor had a child that outlives it.
    let group = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open(node(NVME))
        .unwrap();
    host.kill_vm("a").unwrap();
    until(|| (told(&mut host, NVME).state == "resetting").then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(told(&mut host, NVME).state, "resetting");
    assert!(host.status().unwrap()["a"].state == "cleaning");
    drop(group);
    host.settled(&[("a", "stopped")]).unwrap();
    assert_eq!(told(&mut host, NVME).state, "free");
    host.release_gpu(NVME).unwrap();
}

#[test]
fn vf10_a_device_goes_to_the_next_vm_only_when_the_first_has_ended() {
    let Some((mut host, _alone)) = host(&[("a", &at(NVME)), ("b", &at(NVME))]) else { return };
    host.start("a").unwrap();
    host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    assert!(refused(host.start("b")).contains("VM a has it; stop the VM first"));
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    let held = told(&mut host, NVME).held.unwrap();
    assert_eq!((held.vm.as_deref(), held.last_vm.as_deref()), (Some("b"), Some("b")));
    host.stop("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    host.release_gpu(NVME).unwrap();
}

/// Has the kernel take what is in a slot away.
fn unplug(slot: u8) {
    fs::write(format!("/sys/bus/pci/slots/{slot}/power"), "0").unwrap();
}

/// What is told of the devices of a VM. A `laird` that has just started tells as well that it does not hear the hypervisor yet.
fn faults(host: &mut Host, vm: &str) -> Vec<String> {
    let told = host.status().unwrap().remove(vm).unwrap().degraded;
    told.into_iter().filter(|fault| fault.contains("while a VM had it")).collect()
}

/// The same of VM `a`, once something is.
fn degraded(host: &mut Host) -> Vec<String> {
    until(|| Some(faults(host, "a")).filter(|faults| !faults.is_empty()))
}

/// What was told of a device, and by which states.
fn events(host: &mut Host) -> Vec<String> {
    host.ask(async |client| {
        let mut lines = client.events(&EventsQuery { follow: false, after: None }).await?;
        let mut told = Vec::new();
        while let Some(event) = lines.next().await? {
            if let EventKind::Device { device, state, detail, .. } = event.kind {
                told.push(format!("{device} {state}: {}", detail.unwrap_or_default()));
            }
        }
        Ok(told)
    })
    .unwrap()
}

/// Stops VM `a`, beside which `b` is ready, and sees its device quarantined as it was told before.
fn quarantined(host: &mut Host, address: &str) -> String {
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!((faults(host, "a").len(), faults(host, "b").len()), (1, 0));
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    let events = events(host);
    let last = events.last().unwrap();
    last.strip_prefix(&format!("{address} quarantined: ")).unwrap_or_else(|| panic!("{events:?}")).to_owned()
}

#[test]
fn vf11_a_device_that_is_unplugged_degrades_its_vm_alone_and_is_quarantined_when_that_has_ended() {
    let (address, slot) = UNPLUGGED;
    let Some((mut host, _alone)) = host(&[("a", &at(address)), ("b", "")]) else { return };
    host.start("a").unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    unplug(slot);
    let fault = format!("{address} failed while a VM had it: it was unplugged, or its link is down");
    assert_eq!(degraded(&mut host), [fault.as_str()]);
    let told = format!("{address} leased: {fault}; quarantined once the VM has ended");
    assert_eq!(events(&mut host).last(), Some(&told));
    // A later laird knows of it as well.
    host.kill();
    host.laird(None);
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!(degraded(&mut host), [fault.as_str()]);
    // The reason is what came first: that it is gone when the VM has ended as well is no news.
    assert_eq!(quarantined(&mut host, address), fault);
    assert!(refused(host.start("a")).contains("there is no PCI device"));
    // What is gone can be forgotten.
    let record = host.dirs().state.join("devices").join(format!("{address}.json"));
    assert!(record.exists());
    host.release_gpu(address).unwrap();
    assert!(!record.exists());
}

/// A process that does not outlive a test that fails: what waits for it would, for ever.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kernel does not take a device away from who has it open. It asks, and waits, which laird tells and does not do.
#[test]
fn vf11_a_device_that_is_unplugged_and_that_its_hypervisor_keeps_is_told_of_and_gone_when_that_lets_go() {
    let (address, slot) = KEPT;
    let Some((mut host, _alone)) = host(&[("a", &at(address)), ("b", "")]) else { return };
    host.start("a").unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    // The stand-in does not open it; a QEMU does whose guest lets go of nothing, as there is none.
    let device = format!("vfio-pci,host={address},bus=port1");
    let qemu = Command::new("qemu-system-x86_64")
        .args("-S -machine q35,accel=tcg -m 64 -nodefaults -no-user-config -display none".split(' '))
        .args(["-device", "pcie-root-port,id=port1,chassis=1,slot=1", "-device", &device])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let qemu = Ends(qemu);
    let descriptors = format!("/proc/{}/fd", qemu.0.id());
    let has_it = || {
        let mut links = fs::read_dir(&descriptors).unwrap().flatten().flat_map(|fd| fs::read_link(fd.path()));
        links.any(|link| link.to_string_lossy().contains("vfio-device"))
    };
    until(|| has_it().then_some(()));
    let unplugging = std::thread::spawn(move || unplug(slot));
    let fault = degraded(&mut host);
    assert_eq!(
        fault,
        [format!("{address} failed while a VM had it: it is being unplugged, or was unbound from vfio-pci")]
    );
    let is_there = || Path::new("/sys/bus/pci/devices").join(address).exists();
    assert!(!unplugging.is_finished() && is_there());
    // All else goes on.
    host.stop("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert!(!unplugging.is_finished() && is_there());
    drop(qemu);
    unplugging.join().unwrap();
    assert!(!is_there());
    // That it is gone is no news.
    assert_eq!([quarantined(&mut host, address)], *fault);
    host.release_gpu(address).unwrap();
}

/// Has the kernel find an error of a device: completion timeout, which is not fatal.
fn inject_error(bus: u8) {
    // struct aer_error_inj: bus, device, function, padding; uncorrectable and correctable errors, four words of a header, domain.
    let mut words = [0_u32; 8];
    words[0] = u32::from_le_bytes([bus, 0, 0, 0]);
    words[1] = 0x4000;
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut device = OpenOptions::new().write(true).open("/dev/aer_inject").unwrap();
    device.write_all(&bytes).unwrap();
}

#[test]
fn vf11_an_error_that_the_kernel_finds_of_a_device_degrades_its_vm_and_quarantines_the_device() {
    let Some((mut host, _alone)) = host(&[("a", &at(NETWORK)), ("b", "")]) else { return };
    host.start("a").unwrap();
    host.start("b").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    inject_error(2);
    let fault = degraded(&mut host);
    assert!(fault[0].starts_with(&format!("{NETWORK} failed while a VM had it: the kernel")), "{fault:?}");
    assert!(fault[0].contains("AER"), "{fault:?}");
    assert_eq!([quarantined(&mut host, NETWORK)], *fault);
    let gpu = told(&mut host, NETWORK);
    assert_eq!((gpu.state.as_str(), gpu.held.unwrap().reason), ("quarantined", Some(fault[0].clone())));
    assert!(refused(host.start("a")).contains("it is quarantined"));
    // What was counted by then is known, and no news for the next one.
    host.release_gpu(NETWORK).unwrap();
    assert_eq!(driver(NETWORK).as_deref(), Some("e1000e"));
    host.start("a").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(faults(&mut host, "a").is_empty());
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    host.release_gpu(NETWORK).unwrap();
}

/// A use of the NVMe disk from its driver to its driver, by whichever `laird` lives; it is killed at most once. The points that it reached.
fn whole_use(kill_at: Option<usize>) -> Vec<String> {
    let mut host = Host::new();
    ask_for(&host, &[("a", &at(NVME))]);
    host.laird(kill_at);
    let began = Instant::now();
    let done = |host: &mut Host,
                ask: &dyn Fn(&mut Host) -> Result<(), ClientError>,
                is: &dyn Fn(&mut Host) -> bool| {
        loop {
            let _ = ask(host);
            let asked = Instant::now();
            while asked.elapsed() < Duration::from_secs(20) && !host.is_dead() {
                if is(host) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            if host.is_dead() {
                host.await_death();
                host.laird(None);
            }
            assert!(began.elapsed() < LIMIT * 2, "{}", host.log());
        }
    };
    let state = |host: &mut Host| host.status().map(|vms| vms["a"].state.clone()).unwrap_or_default();
    done(&mut host, &|host| host.start("a"), &|host| state(host) == "ready");
    assert_eq!(driver(NVME).as_deref(), Some("vfio-pci"));
    done(&mut host, &|host| host.stop("a"), &|host| state(host) == "stopped");
    assert_eq!(driver(NVME).as_deref(), Some("vfio-pci"));
    let record = host.dirs().state.join("devices").join(format!("{NVME}.json"));
    done(&mut host, &|host| host.release_gpu(NVME), &|_| !record.exists());
    assert_eq!(driver(NVME).as_deref(), Some("nvme"));
    assert_eq!(attribute(NVME, "driver_override"), "(null)");
    assert!(host.traces().processes.is_empty());
    host.checkpoints()
}

#[test]
fn vf7_killed_between_any_two_writes_it_comes_to_the_same_end() {
    let Some((host, _alone)) = host(&[]) else { return };
    drop(host);
    let points = whole_use(None);
    let writes: Vec<_> = (1..).zip(&points).filter(|(_, point)| point.contains("after \"")).collect();
    assert!(writes.len() >= 10, "{points:?}");
    for (at, point) in writes {
        println!("killed at point {at}: {point}");
        whole_use(Some(at));
    }
}
