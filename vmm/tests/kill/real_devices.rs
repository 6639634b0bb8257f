//! Devices of a real kernel: VFIO, IOMMU groups, resets. SKIPPED but in the host VM; `tests/run` has it run in `tests/host-vm`. The
//! hypervisors are stand-ins, so no guest sees the devices.

use crate::host::{Host, LIMIT, until};
use lair_vmm::api::{client::ClientError, gpus::GpuStatus};
use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

const NVME: &str = "0000:01:00.0";
const DISPLAY: &str = "0000:03:00.0";
const SOUND: &str = "0000:03:00.1";
const NETWORK_BEHIND_BRIDGE: &str = "0000:05:01.0";
const EDU_BEHIND_BRIDGE: &str = "0000:05:02.0";
const EDU: &str = "0000:00:07.0";

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
fn vf4_a_card_of_two_functions_is_taken_whole_reset_by_its_bridge_and_given_back() {
    let Some((mut host, _alone)) = host(&[("a", &at(SOUND))]) else { return };
    let before = [driver(DISPLAY), driver(SOUND)];
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
    for function in [DISPLAY, SOUND] {
        assert_eq!(driver(function).as_deref(), Some("vfio-pci"));
        assert_eq!(told(&mut host, function).state, "leased");
    }
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped")]).unwrap();
    assert_eq!(told(&mut host, DISPLAY).state, "free");
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
    host.start("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    for device in [NETWORK_BEHIND_BRIDGE, EDU_BEHIND_BRIDGE] {
        assert_eq!(driver(device).as_deref(), Some("vfio-pci"));
    }
    host.stop("b").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    host.release_gpu(NETWORK_BEHIND_BRIDGE).unwrap();
    assert_eq!((driver(NETWORK_BEHIND_BRIDGE).as_deref(), driver(EDU_BEHIND_BRIDGE)), (Some("e1000"), None));
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
