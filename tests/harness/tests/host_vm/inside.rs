//! What the host in a VM has. SKIPPED elsewhere.

mod guest;

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// What is at the start of the NVMe disk.
const CONTENT: &[u8] = b"lair: the content of the NVMe disk\n";

/// Whether this is the host in a VM; says why not.
fn is_host_vm() -> bool {
    let is = std::env::var_os("LAIR_HOST_VM").is_some();
    if !is {
        println!("SKIPPED: what the host in a VM has, because this is not it (tests/host-vm)");
    }
    is
}

/// A PCI device in sysfs.
fn device(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// What a link points to.
fn linked(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// The devices that share a device's IOMMU group, itself included.
fn group(address: &str) -> Result<BTreeSet<String>> {
    let devices = device(address).join("iommu_group/devices");
    let entries = fs::read_dir(&devices).with_context(|| format!("{address} has no IOMMU group"))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Makes sure that a device is `vendor:device`, and of its class, driver and companions in its IOMMU group.
fn has(address: &str, id: &str, class: &str, driver: Option<&str>, members: &[&str]) -> Result<()> {
    let hex = |name: &str| read(device(address).join(name)).map(|text| text.replacen("0x", "", 1));
    ensure!(format!("{}:{}", hex("vendor")?, hex("device")?) == id, "{address} is not {id}");
    ensure!(hex("class")? == class, "{address}: class {}", hex("class")?);
    let bound = linked(device(address).join("driver"));
    ensure!(bound.as_deref() == driver, "{address}: {bound:?}, not {driver:?}");
    let (found, wanted) = (group(address)?, members.iter().map(ToString::to_string).collect());
    ensure!(found == wanted, "{address}: {found:?}, not {wanted:?}");
    Ok(())
}

#[test]
fn the_devices_are_there_with_their_drivers_and_iommu_groups() -> Result<()> {
    if !is_host_vm() {
        return Ok(());
    }
    let card = ["0000:03:00.0", "0000:03:00.1"];
    let bridge = ["0000:04:00.0", "0000:05:01.0", "0000:05:02.0"];
    let (edu, nvme, network) = ("0000:00:07.0", "0000:01:00.0", "0000:02:00.0");
    has(edu, "1234:11e8", "00ff00", None, &[edu])?;
    has(nvme, "1b36:0010", "010802", Some("nvme"), &[nvme])?;
    has(network, "8086:10d3", "020000", Some("e1000e"), &[network])?;
    has(card[0], "1234:1111", "038000", None, &card)?;
    has(card[1], "8086:293e", "040300", Some("snd_hda_intel"), &card)?;
    has(bridge[0], "1b36:000e", "060400", Some("shpchp"), &bridge)?;
    has(bridge[1], "8086:100e", "020000", Some("e1000"), &bridge)?;
    has(bridge[2], "1234:11e8", "00ff00", None, &bridge)?;
    ensure!(Path::new("/sys/class/iommu/dmar0").exists(), "no IOMMU");
    ensure!(Path::new("/dev/vfio/vfio").exists() && Path::new("/sys/bus/pci/drivers/vfio-pci").exists());
    // Each root port is a slot, and a device behind it has a link.
    for slot in 1..=5 {
        let bus = if slot < 5 { slot } else { 6 };
        let address = read(format!("/sys/bus/pci/slots/{slot}/address"))?;
        ensure!(address == format!("0000:0{bus}:00"), "slot {slot}: {address}");
    }
    ensure!(read(device(nvme).join("current_link_width"))? == "1");
    // One that can be reset, one that cannot.
    ensure!(read(device(nvme).join("reset_method"))?.contains("flr"));
    ensure!(!device(edu).join("reset_method").exists());
    Ok(())
}

#[test]
fn cgroups_of_version_2_have_all_controllers_and_the_disk_is_one() -> Result<()> {
    if !is_host_vm() {
        return Ok(());
    }
    let controllers = read("/sys/fs/cgroup/cgroup.controllers")?;
    for wanted in ["cpuset", "cpu", "io", "memory", "pids"] {
        ensure!(controllers.split(' ').any(|name| name == wanted), "{wanted} is not among {controllers}");
    }
    let disk = std::env::var("LAIR_HOST_VM_DISK")?;
    ensure!(read("/proc/mounts")?.lines().any(|mount| mount.contains(&format!(" {disk} ext4 rw"))));
    let number = fs::metadata(&disk)?.dev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    ensure!(Path::new(&format!("/sys/dev/block/{major}:{minor}/queue")).exists(), "it is no whole disk");
    for device in ["/dev/vhost-vsock", "/dev/vhost-net", "/dev/net/tun", "/dev/fuse"] {
        ensure!(Path::new(device).exists(), "{device}");
    }
    Ok(())
}

/// Runs QEMU with KVM and a guest of four instructions, which end it with a status that nothing else gives.
fn run_guest(more: &[&str]) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let firmware = directory.path().join("firmware");
    // At the first instruction that an x86 processor executes: mov al, 42; out 0xf4, al; hlt.
    let mut image = vec![0xf4_u8; 1 << 16];
    let start = image.len() - 16;
    image[start..start + 4].copy_from_slice(&[0xb0, 42, 0xe6, 0xf4]);
    fs::write(&firmware, image)?;
    let output = Command::new("timeout")
        .args(["60", "qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "64"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-bios"])
        .arg(&firmware)
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(more)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(42 << 1 | 1), "{}: {said}", output.status);
    Ok(())
}

#[test]
fn kvm_runs_a_guest() -> Result<()> {
    if !is_host_vm() {
        return Ok(());
    }
    run_guest(&[])
}

/// Has a device go from its driver to another one, or to whichever wants it.
fn rebind(address: &str, to: Option<&str>) -> Result<()> {
    let directory = device(address);
    fs::write(directory.join("driver_override"), format!("{}\n", to.unwrap_or_default()))?;
    fs::write(directory.join("driver/unbind"), address)?;
    fs::write("/sys/bus/pci/drivers_probe", address)?;
    Ok(())
}

fn until(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let began = Instant::now();
    while !condition() {
        ensure!(began.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_device_goes_to_a_guest_by_vfio_and_back_to_its_driver() -> Result<()> {
    if !is_host_vm() {
        return Ok(());
    }
    let (address, disk) = ("0000:01:00.0", Path::new("/dev/nvme0n1"));
    let has_content = || {
        let mut content = vec![0; CONTENT.len()];
        fs::File::open(disk).and_then(|mut disk| disk.read_exact(&mut content)).is_ok() && content == CONTENT
    };
    until("the disk", has_content)?;
    let number = linked(device(address).join("iommu_group")).context("a group")?;
    let node = Path::new("/dev/vfio").join(&number);
    ensure!(!node.exists());

    rebind(address, Some("vfio-pci"))?;
    ensure!(linked(device(address).join("driver")).as_deref() == Some("vfio-pci"));
    until("the group's node", || node.exists())?;
    ensure!(!disk.exists(), "the host has it as well");
    run_guest(&["-device", &format!("vfio-pci,host={address}")])?;

    rebind(address, None)?;
    ensure!(linked(device(address).join("driver")).as_deref() == Some("nvme"));
    until("the disk, again", has_content)?;
    ensure!(!node.exists());
    Ok(())
}
