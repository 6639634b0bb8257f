//! What a host's GPUs and the way to give them to VMs mean for Lair. Pure.

use super::{
    facts::{Driver, Facts},
    judge::{Point, ok, warning},
};
use lair_vmm::{api::gpus::GpuStatus, host::pci::names};

pub(super) fn vfio_pci(facts: &Facts) -> Point {
    const POINT: &str = "vfio-pci";
    match facts.vfio_pci {
        Driver::Loaded => ok(POINT, "the driver is there"),
        Driver::Loadable => ok(POINT, "the driver can be loaded"),
        Driver::Missing if facts.iommu_groups == 0 => {
            ok(POINT, "the kernel has no such driver; without an IOMMU it is of no use")
        }
        Driver::Missing => warning(
            POINT,
            "the kernel has no such driver: VMs cannot have devices",
            "if VMs are to have devices: install all modules of the kernel that runs, or boot one with CONFIG_VFIO_PCI",
        ),
    }
}

/// A point for each GPU, or one that there is none.
pub(super) fn gpus(facts: &Facts) -> Vec<Point> {
    match &facts.gpus {
        Ok(reply) if reply.devices.is_empty() => vec![ok("gpu", "none of NVIDIA's or AMD's")],
        Ok(reply) => reply.devices.iter().map(gpu).collect(),
        Err(error) => vec![warning("gpu", format!("cannot be looked for: {error}"), "mount /sys")],
    }
}

fn gpu(status: &GpuStatus) -> Point {
    const POINT: &str = "gpu";
    let device = &status.device;
    let name = format!("{} {}", device.address, names::short(device.vendor, device.device));
    if !status.available {
        let join = |of: fn(&lair_vmm::api::gpus::ObstacleStatus) -> &str| {
            status.obstacles.iter().map(of).collect::<Vec<_>>().join("; ")
        };
        let finding = format!("{name}: no VM can have it: {}", join(|obstacle| &obstacle.message));
        return warning(
            POINT,
            finding,
            format!("if a VM is to have it: {}", join(|obstacle| &obstacle.hint)),
        );
    }
    let group = device.group.map(|group| group.to_string()).unwrap_or_default();
    let others = status.together.len().saturating_sub(1);
    let with = match others {
        0 => format!("alone in its IOMMU group {group}"),
        1 => format!("with 1 device that goes with it; IOMMU group {group}"),
        _ => format!("with {others} devices that go with it; IOMMU group {group}"),
    };
    let screens = match status.screens.as_slice() {
        [] => String::new(),
        screens => format!("; a screen is at {}", screens.join(", ")),
    };
    let Some(driver) = device.host_driver() else {
        return ok(POINT, format!("{name}: could be given to a VM, {with}{screens}"));
    };
    let finding =
        format!("{name}: {driver} holds it, and lets go of it only when no program uses it; {with}{screens}");
    let stop = match driver {
        "nvidia" => "stop nvidia-persistenced and what fuser -v /dev/nvidia* shows",
        _ => "stop what uses it",
    };
    warning(
        POINT,
        finding,
        format!(
            "if only VMs are to have it: {stop}, and keep {driver} away: blacklist {driver} in /etc/modprobe.d, and boot again"
        ),
    )
}
