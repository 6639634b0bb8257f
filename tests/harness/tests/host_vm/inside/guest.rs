//! Real guests, under KVM, with a device of the host. SKIPPED where no guests are prepared.

use super::{CONTENT, device, is_host_vm, linked, read, until};
use anyhow::{Context, Result, ensure};
use lair_harness::{
    fleet::{empty, vm},
    host::Host,
    testbed::Testbed,
};
use lair_vmm::{
    api::gpus::GpuStatus,
    fleet::{
        gpus::{Gpu, GpuAny, Vendor},
        schema::Users,
    },
    host::pci::Id,
    vm::machine::Part,
};
use std::{
    fs::{self, Permissions},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

const NVME: &str = "0000:01:00.0";

/// Under emulation of the host a boot takes some ten seconds.
const BOOT: Duration = Duration::from_secs(240);

/// A device comes to a guest and leaves it within this.
const PLUG: Duration = Duration::from_secs(120);

/// Lets anybody go through to a path. What is changed here is gone with the VM.
fn open_the_way(path: &Path) -> Result<()> {
    for directory in path.ancestors() {
        let mode = fs::metadata(directory)?.permissions().mode();
        if mode & 0o001 == 0 {
            fs::set_permissions(directory, Permissions::from_mode(mode | 0o011))?;
        }
    }
    Ok(())
}

/// What the guest reads at the start of the disk. Its modules are compressed, which its insmod does not understand.
fn content(host: &Host, testbed: &Testbed) -> Result<String> {
    let modules = format!("{}/kernel/drivers/nvme", testbed.modules);
    let length = CONTENT.len();
    host.shell(
        "builder",
        &format!(
            "test -e /dev/nvme0n1 || for module in common/nvme-auth host/nvme-core host/nvme; do \
                 xzcat {modules}/$module.ko.xz >/tmp/module.ko; insmod /tmp/module.ko; \
             done; \
             for try in $(seq 100); do test -e /dev/nvme0n1 && break; sleep 0.1; done; \
             head -c {length} /dev/nvme0n1"
        ),
    )
}

/// An NVMe disk, whichever.
fn any_disk() -> Vec<Gpu> {
    vec![Gpu::Any(GpuAny {
        vendor: Vendor(Id(0x1b36)),
        arch: None,
        class: Some(Id(0x0108)),
        device: None,
        count: 1,
    })]
}

/// Writes the fleet file: a builder with these devices.
fn write_fleet(host: &Host, testbed: &Testbed, gpus: Vec<Gpu>) -> Result<()> {
    let mut fleet = empty(testbed);
    // Its hypervisor has a user of its own, who gets the group's node and may lock the guest's memory.
    fleet.host.users = Users::Own;
    let mut builder = vm(testbed, &["profile-plain", "linux"])?;
    builder.autostart = false;
    builder.gpus = gpus;
    fleet.vms.insert("builder".into(), builder);
    host.write_fleet(&fleet)
}

/// A host with a builder that is down; `None`, with the reason, where there can be none.
fn host_with_builder(name: &str, gpus: Vec<Gpu>) -> Result<Option<(Host, Testbed)>> {
    if !is_host_vm() {
        return Ok(None);
    }
    let Some(testbed) = Testbed::find()? else { return Ok(None) };
    open_the_way(&testbed.store_root)?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
    let mut host = Host::temporary(name)?;
    write_fleet(&host, &testbed, gpus)?;
    host.start()?;
    Ok(Some((host, testbed)))
}

fn start(host: &Host) -> Result<()> {
    let seconds = BOOT.as_secs().to_string();
    let started = host.run_vmctl(&["start", "--wait", "--timeout", &seconds, "builder"]);
    started.map(drop).with_context(|| {
        let console = fs::read(host.state_file("builder", "console.log")).unwrap_or_default();
        format!("{}\nits console:\n{}", host.laird_log(), String::from_utf8_lossy(&console))
    })
}

/// The builder has the disk: its guest reads it, and its hypervisor has what it needs for that and no more.
fn has_disk(host: &Host, testbed: &Testbed) -> Result<()> {
    ensure!(linked(device(NVME).join("driver")).as_deref() == Some("vfio-pci"));
    ensure!(content(host, testbed)?.as_bytes() == CONTENT, "the guest reads something else");
    let pid = host.vm("builder")?.processes[&Part::Hypervisor];
    let limits = read(format!("/proc/{pid}/limits"))?;
    let locked = format!("{}", (512_u64 + 256) << 20);
    ensure!(
        limits.lines().any(|line| line.starts_with("Max locked memory") && line.contains(&locked)),
        "{limits}"
    );
    ensure!(!read(format!("/proc/{pid}/status"))?.contains("\nUid:\t0"), "it runs as root");
    Ok(())
}

/// The guest sees the disk in the port that laird has put it into.
fn sees_the_port(host: &Host) -> Result<()> {
    let record = host.directory().join("state/devices").join(format!("{NVME}.json"));
    let record: serde_json::Value = serde_json::from_str(&read(record)?)?;
    let port = record["places"][NVME]["port"].as_str().context("laird knows no port of the disk")?;
    // Its agent tells with its next sign of life.
    host.wait_for("builder", PLUG, |vm| {
        let mut devices = vm.devices.iter().flat_map(|said| &said.report.devices);
        devices.any(|device| device.vendor == 0x1b36 && device.port.as_deref() == Some(port))
    })?;
    Ok(())
}

fn state(host: &Host) -> Result<String> {
    let shown: GpuStatus = serde_json::from_str(&host.run_vmctl(&["--json", "gpu", "show", NVME])?)?;
    Ok(shown.state)
}

/// The host has the disk: its driver, and its content.
fn is_the_hosts() -> Result<()> {
    until("the disk, on the host again", || {
        let mut content = vec![0; CONTENT.len()];
        let read = fs::File::open("/dev/nvme0n1").and_then(|mut disk| disk.read_exact(&mut content));
        read.is_ok() && content == CONTENT
    })?;
    ensure!(linked(device(NVME).join("driver")).as_deref() == Some("nvme"));
    Ok(())
}

#[test]
fn vf7_a_guest_reads_the_disk_that_it_asked_for_by_need_twice_and_the_host_has_it_back() -> Result<()> {
    let Some((mut host, testbed)) = host_with_builder("device", any_disk())? else { return Ok(()) };
    for _ in 0..2 {
        start(&host)?;
        has_disk(&host, &testbed)?;
        sees_the_port(&host)?;
        host.run_vmctl(&["stop", "--wait", "builder"])?;
        ensure!(state(&host)? == "free");
    }
    host.run_vmctl(&["gpu", "release", NVME])?;
    is_the_hosts()?;
    host.stop()
}

#[test]
fn hv11_a_disk_comes_to_a_guest_that_runs_and_leaves_it_by_apply() -> Result<()> {
    let Some((mut host, testbed)) = host_with_builder("plug", vec![])? else { return Ok(()) };
    start(&host)?;
    let before = host.vm("builder")?.processes;
    let disks =
        |host: &Host| host.shell("builder", "cat /sys/bus/pci/devices/*/class | grep -c 0x010802 || true");
    // More than once: its port is free again.
    for _ in 0..2 {
        ensure!(disks(&host)?.trim() == "0");
        write_fleet(&host, &testbed, any_disk())?;
        let said = host.run_vmctl(&["apply"])?;
        ensure!(said.contains("its devices follow at once; it runs on"), "{said}");
        host.wait_for("builder", PLUG, |vm| !vm.pending_restart)?;
        has_disk(&host, &testbed)?;
        sees_the_port(&host)?;
        ensure!(state(&host)? == "leased");

        write_fleet(&host, &testbed, vec![])?;
        host.run_vmctl(&["apply"])?;
        host.wait_for("builder", PLUG, |vm| !vm.pending_restart)?;
        ensure!(disks(&host)?.trim() == "0");
        // Nobody asks for it any more.
        until("the host's", || state(&host).is_ok_and(|state| state == "host"))?;
        is_the_hosts()?;
    }
    let vm = host.vm("builder")?;
    ensure!(vm.processes == before && vm.state == "ready" && vm.degraded.is_empty(), "{vm:?}");
    host.run_vmctl(&["stop", "--wait", "builder"])?;
    host.stop()
}
