//! Real guests, under KVM, with a device of the host. SKIPPED where no guests are prepared.

use super::{CONTENT, device, is_host_vm, linked, read, until};
use anyhow::{Context, Result, ensure};
use lair_harness::{
    fleet::{empty, vm},
    host::Host,
    testbed::Testbed,
};
use lair_vmm::{
    fleet::{
        gpus::{Gpu, GpuAny, Vendor},
        schema::Users,
    },
    host::pci::Id,
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

#[test]
fn vf7_a_guest_reads_the_disk_that_it_asked_for_by_need_twice_and_the_host_has_it_back() -> Result<()> {
    if !is_host_vm() {
        return Ok(());
    }
    let Some(testbed) = Testbed::find()? else { return Ok(()) };
    open_the_way(&testbed.store_root)?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
    let mut host = Host::temporary("device")?;
    let mut fleet = empty(&testbed);
    // Its hypervisor has a user of its own, who gets the group's node and may lock the guest's memory.
    fleet.host.users = Users::Own;
    let mut builder = vm(&testbed, &["profile-plain", "linux"])?;
    builder.autostart = false;
    builder.gpus = vec![Gpu::Any(GpuAny {
        vendor: Vendor(Id(0x1b36)),
        arch: None,
        class: Some(Id(0x0108)),
        device: None,
        count: 1,
    })];
    fleet.vms.insert("builder".into(), builder);
    host.write_fleet(&fleet)?;
    host.start()?;
    let seconds = BOOT.as_secs().to_string();
    for _ in 0..2 {
        host.run_vmctl(&["start", "--wait", "--timeout", &seconds, "builder"]).with_context(|| {
            let console = fs::read(host.state_file("builder", "console.log")).unwrap_or_default();
            format!("{}\nits console:\n{}", host.laird_log(), String::from_utf8_lossy(&console))
        })?;
        ensure!(linked(device(NVME).join("driver")).as_deref() == Some("vfio-pci"));
        ensure!(content(&host, &testbed)?.as_bytes() == CONTENT, "the guest reads something else");
        let pid = host.vm("builder")?.processes[&lair_vmm::vm::machine::Part::Hypervisor];
        let limits = read(format!("/proc/{pid}/limits"))?;
        let locked = format!("{}", (512_u64 + 256) << 20);
        ensure!(
            limits.lines().any(|line| line.starts_with("Max locked memory") && line.contains(&locked)),
            "{limits}"
        );
        ensure!(!read(format!("/proc/{pid}/status"))?.contains("\nUid:\t0"), "it runs as root");
        host.run_vmctl(&["stop", "--wait", "builder"])?;
        let shown = host.run_vmctl(&["--json", "gpu", "show", NVME])?;
        ensure!(shown.contains("\"state\": \"free\"") || shown.contains("\"state\":\"free\""), "{shown}");
    }
    host.run_vmctl(&["gpu", "release", NVME])?;
    ensure!(linked(device(NVME).join("driver")).as_deref() == Some("nvme"));
    let has_content = || {
        let mut content = vec![0; CONTENT.len()];
        let read = fs::File::open("/dev/nvme0n1").and_then(|mut disk| disk.read_exact(&mut content));
        read.is_ok() && content == CONTENT
    };
    until("the disk, on the host again", has_content)?;
    host.stop()
}
