//! Files and answers of the system, as facts. Pure.

use super::facts::{Swap, Unit};
use lair_vmm::fleet::schema::IdRange;
use std::collections::BTreeMap;

/// `/proc/swaps` (proc(5)): a line of headings, then a line for each; the sizes are KiB.
pub(super) fn swaps(text: &str) -> Vec<Swap> {
    let swap = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (path, size) = (fields.next()?, fields.nth(1)?.parse::<u64>().ok()?);
        Some(Swap { path: path.into(), size: size.saturating_mul(1024) })
    };
    text.lines().skip(1).filter_map(swap).collect()
}

/// The first two numbers of a kernel's release.
pub(super) fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether a list of modules has one (modules.dep, modules.builtin: a path at the beginning of each line; the file may be compressed).
pub(super) fn lists_module(list: &str, name: &str) -> bool {
    let is = |line: &str| {
        let file = line.split(':').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        file.trim().split_once(".ko").is_some_and(|(module, _)| module == name)
    };
    list.lines().any(is)
}

/// Those who have numbers of `range`: users and groups (passwd(5), group(5): the third field is a number) and the ranges of users'
/// containers (subuid(5): the second field is the first number, the third how many there are).
pub(super) fn clashes(range: IdRange, files: &[(&str, &str)]) -> Vec<String> {
    let end = u64::from(range.first) + u64::from(range.count);
    let inside = |first: u64, count: u64| first < end && first.saturating_add(count) > range.first.into();
    let mut found = Vec::new();
    for (file, text) in files {
        for line in text.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
            let taken =
                if file.starts_with("/etc/sub") { number(1).zip(number(2)) } else { number(2).zip(Some(1)) };
            if let Some((first, count)) = taken
                && inside(first, count)
            {
                let name = fields.first().copied().unwrap_or_default();
                let last = first.saturating_add(count.saturating_sub(1));
                let numbers = if count == 1 { first.to_string() } else { format!("{first} to {last}") };
                found.push(format!("{name} in {file} ({numbers})"));
            }
        }
    }
    found
}

/// What `systemctl show` says of a unit; none where it knows no such unit.
pub(super) fn unit(text: &str) -> Option<Unit> {
    let values: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let value = |key: &str| values.get(key).copied().unwrap_or_default();
    (value("LoadState") == "loaded").then(|| Unit {
        active: value("ActiveState").into(),
        kill_mode: value("KillMode").into(),
        delegate: value("Delegate") == "yes",
        // "infinity" is no number.
        descriptors: value("LimitNOFILE").parse().unwrap_or(u64::MAX),
    })
}

/// Parameters on the kernel's command line that Lair suffers from, with what they do.
pub(super) fn traps(command_line: &str) -> Vec<(&str, &'static str)> {
    let trap = |parameter: &str| {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let lists = |word: &str| value.split(',').any(|part| part == word);
        Some(match key {
            "systemd.unified_cgroup_hierarchy" if ["0", "no", "false", "off"].contains(&value) => {
                "it brings cgroup v1 back, so VMs cannot be limited"
            }
            "cgroup_disable" if lists("memory") || lists("cpu") || lists("pids") || lists("io") => {
                "it takes a controller away that limits need"
            }
            "intel_iommu" | "amd_iommu" | "iommu" if lists("off") => "no device can be given to a VM",
            "pcie_acs_override" => {
                "it claims that devices are apart which are not: one in a VM may reach others of the host"
            }
            "vfio_iommu_type1.allow_unsafe_interrupts" if ["1", "y", "Y"].contains(&value) => {
                "a device in a VM can send interrupts to the host as it likes"
            }
            "mitigations" if lists("off") => "guests may read what other guests and the host have in memory",
            "nokaslr" => "the host's kernel is where every attacker expects it",
            "psi" if value == "0" => "pressure is not measured, so a VM short of memory is not noticed",
            _ => return None,
        })
    };
    command_line
        .split_ascii_whitespace()
        .filter_map(|parameter| Some((parameter, trap(parameter)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_areas_with_their_sizes() {
        let text =
            "Filename\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/dm-1 partition\t2097148\t0\t-2\nnonsense\n";
        assert_eq!(swaps(text), [Swap { path: "/dev/dm-1".into(), size: 2_097_148 << 10 }]);
        assert_eq!(swaps(""), []);
    }

    #[test]
    fn a_module_is_found_in_a_list_by_its_whole_name() {
        let list = "kernel/drivers/vfio/pci/vfio-pci-core.ko.xz:\n\
                    kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n";
        assert!(lists_module(list, "vfio-pci"));
        assert!(lists_module("kernel/drivers/vfio/pci/vfio-pci.ko\n", "vfio-pci"));
        assert!(!lists_module(
            "kernel/x/a.ko: kernel/x/vfio-pci.ko\nkernel/x/vfio-pci-core.ko\n",
            "vfio-pci"
        ));
        assert!(!lists_module("", "vfio-pci"));
    }

    #[test]
    fn releases_are_two_numbers() {
        assert_eq!(release("6.12.43+deb13-amd64"), Some((6, 12)));
        assert_eq!(release("5.4"), Some((5, 4)));
        assert_eq!(release("6"), None);
        assert_eq!(release("x.y"), None);
    }

    #[test]
    fn ranges_that_touch_are_apart_and_ranges_that_overlap_are_named() {
        let range = IdRange { first: 1000, count: 100 };
        let passwd =
            "root:x:0:0::/root:/bin/sh\na:x:999:1\nb:x:1000:1\nc:x:1099:1\nd:x:1100:1\nbroken\n::x:\n";
        let subuid = "e:900:100\nf:900:101\ng:1099:1\nh:1100:65536\ni:0:18446744073709551615\nj:1:-1\n";
        assert_eq!(
            clashes(range, &[("/etc/passwd", passwd), ("/etc/subuid", subuid)]),
            [
                "b in /etc/passwd (1000)",
                "c in /etc/passwd (1099)",
                "f in /etc/subuid (900 to 1000)",
                "g in /etc/subuid (1099)",
                "i in /etc/subuid (0 to 18446744073709551614)",
            ]
        );
    }

    #[test]
    fn a_unit_that_systemd_does_not_know_is_none() {
        assert_eq!(unit("LoadState=not-found\nKillMode=control-group\n"), None);
        assert_eq!(unit(""), None);
        let text =
            "LoadState=loaded\nActiveState=active\nKillMode=process\nDelegate=yes\nLimitNOFILE=65536\n";
        let known =
            Unit { active: "active".into(), kill_mode: "process".into(), delegate: true, descriptors: 65536 };
        assert_eq!(unit(text), Some(known.clone()));
        let unlimited = Unit { descriptors: u64::MAX, ..known };
        assert_eq!(unit(&text.replace("65536", "infinity")), Some(unlimited));
    }

    #[test]
    fn parameters_are_judged_by_their_values() {
        let found = |line| traps(line).into_iter().map(|(parameter, _)| parameter).collect::<Vec<_>>();
        assert!(
            found(
                "root=/dev/sda1 ro quiet intel_iommu=on iommu=pt mitigations=auto psi=1 cgroup_disable=rdma"
            )
            .is_empty()
        );
        assert_eq!(
            found(
                "mitigations=off,nosmt cgroup_disable=rdma,memory iommu=pt,off pcie_acs_override=downstream nokaslr"
            ),
            [
                "mitigations=off,nosmt",
                "cgroup_disable=rdma,memory",
                "iommu=pt,off",
                "pcie_acs_override=downstream",
                "nokaslr"
            ]
        );
    }
}
