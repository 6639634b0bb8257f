//! What facts mean for Lair, and how to mend what is not as it should be. Pure.

use super::facts::{Facts, FleetContent, Laird};
use crate::output::{bytes, count};
use lair_vmm::{
    cgroup::NoCgroups,
    fleet::{
        limits::MEMORY_MIN,
        schema::{Accel, Limits},
    },
    host::facts::NoKvm,
};
use serde::Serialize;

/// One line of the examination. The names are stable.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    pub(super) point: &'static str,
    pub(super) verdict: Verdict,
    pub(super) finding: String,
    /// What to do about it.
    pub(super) mend: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// Lair works, with less, or with a risk.
    Warning,
    /// Lair does not work as it is set up.
    Bad,
}

pub(super) fn ok(point: &'static str, finding: impl Into<String>) -> Point {
    Point { point, verdict: Verdict::Ok, finding: finding.into(), mend: None }
}

pub(super) fn warning(point: &'static str, finding: impl Into<String>, mend: impl Into<String>) -> Point {
    Point { point, verdict: Verdict::Warning, finding: finding.into(), mend: Some(mend.into()) }
}

pub(super) fn bad(point: &'static str, finding: impl Into<String>, mend: impl Into<String>) -> Point {
    Point { verdict: Verdict::Bad, ..warning(point, finding, mend) }
}

/// Looks at everything, what VMs need first.
pub(super) fn points(facts: &Facts) -> Vec<Point> {
    let mut points = vec![
        kvm(facts),
        processors(facts),
        memory(facts),
        swap(facts),
        ksm(facts),
        kernel(facts),
        command_line(facts),
        iommu(facts),
        vfio(facts),
        super::judge_gpus::vfio_pci(facts),
    ];
    points.extend(super::judge_gpus::gpus(facts));
    points.extend([cgroups(facts), landlock(facts), seccomp(facts)]);
    points.extend(super::judge_setup::points(facts));
    points.push(fleet(facts));
    points.push(laird(facts));
    points
}

fn kvm(facts: &Facts) -> Point {
    let Err(reason) = &facts.kvm else { return ok("kvm", "guests run on the processor") };
    let (finding, mend) = match reason {
        NoKvm::Missing => (
            "/dev/kvm is missing".into(),
            "modprobe kvm-intel or kvm-amd; where that fails, enable virtualization in the firmware, or nested virtualization in the \
             hypervisor of this machine",
        ),
        NoKvm::Denied => (
            "/dev/kvm does not open for this user".into(),
            "usermod -aG kvm NAME, and log in again; or run laird as root",
        ),
        NoKvm::Device(error) => {
            (format!("/dev/kvm does not open: {error}"), "look into the kernel's log: dmesg | grep -i kvm")
        }
        NoKvm::Processor => (
            "/dev/kvm opens, but the CPU shows neither vmx nor svm, so guests would hang".into(),
            "enable virtualization in the firmware, or nested virtualization in the hypervisor of this machine",
        ),
    };
    match facts.fleet.host.accel {
        Accel::Kvm => bad("kvm", format!("{finding}, and the fleet file has host.accel = \"kvm\""), mend),
        Accel::Auto => {
            warning("kvm", format!("{finding}; guests run under emulation, many times slower"), mend)
        }
        Accel::Tcg => ok("kvm", format!("{finding}; not needed: host.accel is \"tcg\"")),
    }
}

fn processors(facts: &Facts) -> Point {
    match &facts.host {
        Ok(host) if host.cpus < 2 => warning(
            "processors",
            "1: each VM's processes share it with its guest",
            "give this host two processors or more",
        ),
        Ok(host) => ok("processors", host.cpus.to_string()),
        Err(error) => bad("processors", format!("cannot be counted: {error}"), "mount /proc and /sys"),
    }
}

fn memory(facts: &Facts) -> Point {
    let host = match &facts.host {
        Ok(host) => host,
        Err(error) => return bad("memory", format!("cannot be read: {error}"), "mount /proc"),
    };
    let (budget, reserve) = (host.budget(), host.reserve());
    let finding = format!("{budget} for VMs; the host keeps {reserve} of {}", host.memory);
    if budget < MEMORY_MIN {
        return bad(
            "memory",
            finding,
            format!("give this host more memory: the smallest VM has {MEMORY_MIN}"),
        );
    }
    ok("memory", finding)
}

fn swap(facts: &Facts) -> Point {
    // Compressed memory is not on a disk.
    let on_disk: Vec<_> = facts.swaps.iter().filter(|swap| !swap.path.starts_with("/dev/zram")).collect();
    if on_disk.is_empty() {
        return ok("swap", if facts.swaps.is_empty() { "none" } else { "in memory only (zram)" });
    }
    let size = on_disk.iter().map(|swap| swap.size).fold(0, u64::saturating_add);
    let paths: Vec<_> = on_disk.iter().map(|swap| swap.path.as_str()).collect();
    warning(
        "swap",
        format!(
            "{} on {}: guests' memory, with the secrets in it, may be written there",
            bytes(size),
            paths.join(", ")
        ),
        "swapoff -a and remove it from /etc/fstab, or encrypt it with a key of each boot (crypttab: swap)",
    )
}

fn ksm(facts: &Facts) -> Point {
    if facts.ksm {
        return warning(
            "ksm",
            "the kernel merges equal pages: by timing, a guest can tell what others have in memory, and guests' memory is shared, which \
             it does not merge anyway",
            "echo 2 > /sys/kernel/mm/ksm/run, and disable ksm.service or ksmtuned",
        );
    }
    ok("ksm", "off")
}

/// What each release brought (man pages pidfd_open(2), cgroups(7) and Linux, Documentation/admin-guide/cgroup-v2.rst).
fn kernel(facts: &Facts) -> Point {
    let finding = format!("Linux {}", facts.kernel);
    match super::parse::release(&facts.kernel) {
        Some(release) if release < (5, 3) => bad(
            "kernel",
            format!("{finding} has no pidfd: processes cannot be found again safely"),
            "boot Linux 5.14 or later",
        ),
        Some(release) if release < (5, 14) => warning(
            "kernel",
            format!("{finding} has no cgroup.kill: the processes of a VM are ended one by one"),
            "boot Linux 5.14 or later",
        ),
        Some(_) => ok("kernel", format!("{finding}, with pidfd and cgroup.kill")),
        None => warning(
            "kernel",
            format!("{finding}: not a release that is understood"),
            "boot Linux 5.14 or later",
        ),
    }
}

fn command_line(facts: &Facts) -> Point {
    let traps = super::parse::traps(&facts.command_line);
    if traps.is_empty() {
        return ok("command line", "no parameter of the kernel is in the way");
    }
    let told: Vec<_> = traps.iter().map(|(parameter, effect)| format!("{parameter}: {effect}")).collect();
    let remove: Vec<_> = traps.iter().map(|(parameter, _)| *parameter).collect();
    warning(
        "command line",
        told.join("; "),
        format!("remove {} from the kernel's parameters in the boot loader", remove.join(" and ")),
    )
}

fn iommu(facts: &Facts) -> Point {
    if facts.iommu_groups == 0 {
        return warning(
            "iommu",
            "off: VMs cannot have devices of this host, such as GPUs",
            "if VMs are to have devices, enable VT-d or AMD-Vi in the firmware, and intel_iommu=on for Intel's",
        );
    }
    ok("iommu", format!("on, with {}", count(facts.iommu_groups, "group")))
}

fn vfio(facts: &Facts) -> Point {
    let (mut dangers, mut mends) = (Vec::new(), Vec::new());
    if facts.no_iommu_mode {
        dangers.push("it takes devices without an IOMMU: one in a VM can write to all of the host's memory");
        mends.push("remove enable_unsafe_noiommu_mode from /etc/modprobe.d and the kernel's parameters");
    }
    if facts.unsafe_interrupts {
        dangers.push(
            "it allows unsafe interrupts: a device in a VM can send interrupts to the host as it likes",
        );
        mends.push("remove allow_unsafe_interrupts from /etc/modprobe.d, and reload vfio_iommu_type1");
    }
    match facts.vfio {
        _ if !dangers.is_empty() => warning("vfio", dangers.join("; "), mends.join("; ")),
        true => ok("vfio", "/dev/vfio/vfio is there"),
        false if facts.iommu_groups == 0 => {
            ok("vfio", "/dev/vfio/vfio is missing; without an IOMMU it is of no use")
        }
        false => warning(
            "vfio",
            "/dev/vfio/vfio is missing: VMs cannot have devices",
            "if VMs are to have devices: modprobe vfio-pci",
        ),
    }
}

fn cgroups(facts: &Facts) -> Point {
    let (finding, mend) = match &facts.cgroups {
        Ok(controllers) => return ok("cgroups", format!("v2, with {}", controllers.join(", "))),
        Err(NoCgroups::NoV2) => (
            "no cgroup v2 is mounted, so VMs cannot be limited".into(),
            "boot with systemd.unified_cgroup_hierarchy=1".to_owned(),
        ),
        Err(NoCgroups::Controllers { dir, missing, hybrid }) => (
            format!("v2 in {} has no controller {missing}, so VMs cannot be limited", dir.display()),
            if hybrid.is_empty() {
                "remove cgroup_disable from the kernel's parameters; in a container, have its manager pass the controllers on".into()
            } else {
                "cgroup v1 has them: boot with systemd.unified_cgroup_hierarchy=1".into()
            },
        ),
        Err(other) => (lair_vmm::error::chain(other), "mount /proc and /sys/fs/cgroup".into()),
    };
    match facts.fleet.host.limits {
        Limits::None => {
            warning("cgroups", format!("{finding}; the fleet file does without (host.limits)"), mend)
        }
        Limits::Cgroup => bad(
            "cgroups",
            finding,
            format!("{mend}; or host.limits = \"none\" in the fleet file, which leaves VMs unlimited"),
        ),
    }
}

fn landlock(facts: &Facts) -> Point {
    if facts.landlock {
        return ok("landlock", "confines what serves the store to its files");
    }
    bad(
        "landlock",
        "the kernel offers none, and without it no store is served",
        "boot Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and landlock in the kernel parameter lsm=",
    )
}

fn seccomp(facts: &Facts) -> Point {
    if facts.seccomp {
        return ok("seccomp", "filters the system calls of QEMU and of what serves the store");
    }
    bad(
        "seccomp",
        "the kernel offers no filters, and without them no VM starts",
        "boot a kernel with CONFIG_SECCOMP_FILTER",
    )
}

fn fleet(facts: &Facts) -> Point {
    let file = facts.fleet.path.display();
    match &facts.fleet.content {
        FleetContent::Good(vms) => ok("fleet file", format!("{file}: {}, no problems", count(*vms, "VM"))),
        FleetContent::Missing => warning(
            "fleet file",
            format!("{file} is missing"),
            "write one (vmctl schema says what may be in it)",
        ),
        FleetContent::Wrong(first, more) => bad(
            "fleet file",
            format!("{first}{}", others(*more)),
            format!("vmctl check {file} tells all; laird does not start with it"),
        ),
        FleetContent::Lacking(first, more) => warning(
            "fleet file",
            format!("{first}{}; a VM that needs it does not start", others(*more)),
            format!("vmctl check {file} tells all"),
        ),
    }
}

fn others(more: usize) -> String {
    if more == 0 { String::new() } else { format!(", and {more} more") }
}

fn laird(facts: &Facts) -> Point {
    let own = env!("CARGO_PKG_VERSION");
    match &facts.laird {
        Laird::Answers(version) if version == own => ok("laird", format!("{version} answers")),
        Laird::Answers(version) => warning(
            "laird",
            format!("{version} answers, and this vmctl is {own}"),
            "restart laird with the release that is installed; VMs run on",
        ),
        Laird::Down(socket) => {
            let unit = facts.unit.is_some();
            warning(
                "laird",
                format!("does not run: nothing listens on {}", socket.display()),
                if unit {
                    "systemctl start lair"
                } else {
                    "start laird; --socket or LAIR_SOCKET name another socket"
                },
            )
        }
        Laird::Denied(socket) => warning(
            "laird",
            format!("runs, but {} is closed to this user", socket.display()),
            "be root, or join the group that the socket belongs to",
        ),
        Laird::Odd(error) => bad("laird", error.clone(), "look into its log: journalctl -u lair"),
    }
}
