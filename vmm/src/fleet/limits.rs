//! What the host has, and how much of it VMs may take. Pure but for [`HostFacts::read`].

use super::{schema::Vm, units::Size};
use std::io;

const MIB: u64 = 1 << 20;

/// Memory that VMs get in whole such pieces: the size of a huge page.
pub const MEMORY_STEP: Size = Size(2 * MIB);

/// The least memory of a VM: less does not boot a stock kernel with our initramfs.
pub const MEMORY_MIN: Size = Size(64 * MIB);

/// The most virtual CPUs of a VM: a q35 machine without an emulated IOMMU addresses no more.
pub const VCPUS_MAX: u32 = 255;

/// The most processor time of a VM, in percent of one processor: ten times the processors of any host.
pub const CPU_PERCENT_MAX: u32 = 1_000_000;

/// The most and the least processes and threads of a VM: the kernel's own limit, and what QEMU and our programs cannot do without.
pub const PIDS_MAX: u32 = 4 << 20;
/// See [`PIDS_MAX`].
pub const PIDS_MIN: u32 = 128;

/// The greatest weight of a cgroup (Linux, Documentation/admin-guide/cgroup-v2.rst).
pub const CPU_WEIGHT_MAX: u32 = 10_000;

/// Private memory of a VM's processes. Measured with a 512 MiB guest: QEMU 7.2 18 MiB (stopped, before anything is translated),
/// lair-virtiofs 1 MiB, lair-shim 2 MiB, vhost-device-vsock less than 1 MiB; the rest is for connections, queues and disks. What
/// translated code takes under emulation, 100 MiB and more, is not counted: such a host is for trying things out.
const PROCESSES: Size = Size(64 * MIB);

/// For each virtual CPU: its thread's stacks and QEMU's state of it.
const PER_VCPU: Size = Size(MIB);

/// A guest's memory is mapped four times: in the guest, and by QEMU, lair-virtiofs and vhost-device-vsock. Page tables take 8 bytes
/// for each 4 KiB of each mapping.
const PAGE_TABLES: u64 = 4 * 8;

/// What a VM takes besides its guest's memory.
pub fn overhead(vm: &Vm) -> Size {
    let tables = (vm.memory.0 / 4096).saturating_mul(PAGE_TABLES);
    let vcpus = PER_VCPU.0.saturating_mul(u64::from(vm.vcpus));
    // The IOMMU maps all of a guest's memory for its devices, in entries of 8 bytes as well.
    let pinned = if vm.gpus.is_empty() { 0 } else { (vm.memory.0 / 4096).saturating_mul(8) };
    let sum = [vcpus, tables, pinned].into_iter().fold(PROCESSES.0, u64::saturating_add);
    Size(sum.checked_next_multiple_of(MIB).unwrap_or(sum))
}

/// The memory that a VM needs of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The guest's.
    pub guest: Size,
    /// That of its processes on the host.
    pub overhead: Size,
}

impl Need {
    /// What `vm` needs.
    pub fn of(vm: &Vm) -> Self {
        Self { guest: vm.memory, overhead: overhead(vm) }
    }

    /// Both together.
    pub fn sum(self) -> Size {
        Size(self.guest.0.saturating_add(self.overhead.0))
    }
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFacts {
    /// CPUs that this process may use.
    pub cpus: u32,
    /// All memory that the host's kernel manages.
    pub memory: Size,
}

/// Why a VM does not start: memory. Said of that VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "Its {guest} of memory, {overhead} for its processes and the {taken} of VMs that run make {sum}, more than the budget of {budget}: \
     the host has {host} and keeps {reserve} for itself",
    guest = .wanted.guest, overhead = .wanted.overhead
)]
pub struct OverBudget {
    /// What it needs.
    pub wanted: Need,
    /// What VMs have that run or are being started, their processes included.
    pub taken: Size,
    /// All together.
    pub sum: Size,
    /// What all VMs together may have.
    pub budget: Size,
    /// What the host has.
    pub host: Size,
    /// What the host keeps for itself.
    pub reserve: Size,
}

impl HostFacts {
    /// Those of this host.
    pub fn read() -> io::Result<Self> {
        let memory = nix::sys::sysinfo::sysinfo()?.ram_total();
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory: Size(memory & !(MIB - 1)) })
    }

    /// What the host keeps for itself and its page cache: a sixteenth, at least 512 MiB.
    pub fn reserve(&self) -> Size {
        Size((self.memory.0 / 16).max(512 * MIB) & !(MIB - 1)).min(self.memory)
    }

    /// What all VMs together may have.
    pub fn budget(&self) -> Size {
        Size(self.memory.0.saturating_sub(self.reserve().0))
    }

    /// Whether a VM may have `wanted` where VMs that run or are being started have `taken`.
    pub fn admit(&self, wanted: Need, taken: Size) -> Result<(), OverBudget> {
        let (sum, budget) = (Size(wanted.sum().0.saturating_add(taken.0)), self.budget());
        if sum <= budget {
            return Ok(());
        }
        Err(OverBudget { wanted, taken, sum, budget, host: self.memory, reserve: self.reserve() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn cf5_admission_names_the_budget() {
        let host = HostFacts { cpus: 8, memory: Size(32 * GIB) };
        assert_eq!(host.budget(), Size(30 * GIB));
        let need = |guest: u64, overhead: u64| Need { guest: Size(guest), overhead: Size(overhead) };
        assert_eq!(host.admit(need(30 * GIB, 0), Size(0)), Ok(()));
        assert!(host.admit(need(30 * GIB, 1), Size(0)).is_err());
        assert_eq!(host.admit(need(9 * GIB, GIB), Size(20 * GIB)), Ok(()));
        let refused = host.admit(need(9 * GIB, GIB), Size(20 * GIB + MIB)).unwrap_err();
        insta::assert_snapshot!(refused, @"Its 9GiB of memory, 1GiB for its processes and the 20481MiB of VMs that run make 30721MiB, more than the budget of 30GiB: the host has 32GiB and keeps 2GiB for itself");
        assert!(host.admit(need(u64::MAX, u64::MAX), Size(u64::MAX)).is_err());
    }

    #[test]
    fn what_runs_beside_a_guest_grows_with_it() {
        let vm = |vcpus: u32, memory: &str| -> Vm {
            let vm = serde_json::json!({ "vcpus": vcpus, "memory": memory, "kernel": "/k", "modules": "/m", "roots": [] });
            serde_json::from_value(vm).unwrap()
        };
        assert_eq!(overhead(&vm(1, "512MiB")), Size((64 + 1 + 4) * MIB));
        assert_eq!(overhead(&vm(16, "48GiB")), Size((64 + 16 + 384) * MIB));
        assert_eq!(Need::of(&vm(1, "512MiB")).sum(), Size(581 * MIB));
    }

    /// All of a guest's memory counts for every VM, so pinned memory does as well.
    #[test]
    fn vf12_a_vm_with_devices_counts_with_what_the_iommu_needs_besides() {
        let vm: Vm = serde_json::from_value(serde_json::json!({
            "vcpus": 16, "memory": "48GiB", "kernel": "/k", "modules": "/m", "roots": [],
            "gpus": [{ "address": "0000:01:00.0" }],
        }))
        .unwrap();
        assert_eq!(Need::of(&vm), Need { guest: Size(48 * GIB), overhead: Size((64 + 16 + 384 + 96) * MIB) });
    }

    #[test]
    fn cf5_a_small_host_keeps_what_it_needs() {
        let host = HostFacts { cpus: 1, memory: Size(GIB) };
        assert_eq!((host.reserve(), host.budget()), (Size(512 * MIB), Size(512 * MIB)));
        let tiny = HostFacts { cpus: 1, memory: Size(256 * MIB) };
        assert_eq!((tiny.reserve(), tiny.budget()), (Size(256 * MIB), Size(0)));
    }

    #[test]
    fn the_facts_of_this_host_are_plausible() {
        let host = HostFacts::read().unwrap();
        assert!(host.cpus >= 1 && host.memory > MEMORY_MIN, "{host:?}");
    }
}
