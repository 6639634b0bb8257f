//! What the host has, and how much of it VMs may take. Pure but for [`HostFacts::read`].

use super::units::Size;
use std::io;

const MIB: u64 = 1 << 20;

/// Memory that VMs get in whole such pieces: the size of a huge page.
pub const MEMORY_STEP: Size = Size(2 * MIB);

/// The least memory of a VM: less does not boot a stock kernel with our initramfs.
pub const MEMORY_MIN: Size = Size(64 * MIB);

/// The most virtual CPUs of a VM: a q35 machine without an emulated IOMMU addresses no more.
pub const VCPUS_MAX: u32 = 255;

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
    "Its {wanted} of memory and the {taken} of VMs that run make {sum}, more than the budget of {budget}: the host has {host} and \
     keeps {reserve} for itself"
)]
pub struct OverBudget {
    /// What it needs.
    pub wanted: Size,
    /// What VMs have that run or are being started.
    pub taken: Size,
    /// Both together.
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

    /// What the host keeps for itself, its page cache and what runs beside each VM: a sixteenth, at least 512 MiB.
    pub fn reserve(&self) -> Size {
        Size((self.memory.0 / 16).max(512 * MIB) & !(MIB - 1)).min(self.memory)
    }

    /// What all VMs together may have.
    pub fn budget(&self) -> Size {
        Size(self.memory.0.saturating_sub(self.reserve().0))
    }

    /// Whether a VM may have `wanted` where VMs that run or are being started have `taken`.
    pub fn admit(&self, wanted: Size, taken: Size) -> Result<(), OverBudget> {
        let (sum, budget) = (Size(wanted.0.saturating_add(taken.0)), self.budget());
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
        assert_eq!(host.admit(Size(30 * GIB), Size(0)), Ok(()));
        assert_eq!(host.admit(Size(10 * GIB), Size(20 * GIB)), Ok(()));
        let refused = host.admit(Size(10 * GIB), Size(20 * GIB + MIB)).unwrap_err();
        insta::assert_snapshot!(refused, @"Its 10GiB of memory and the 20481MiB of VMs that run make 30721MiB, more than the budget of 30GiB: the host has 32GiB and keeps 2GiB for itself");
        assert!(host.admit(Size(u64::MAX), Size(u64::MAX)).is_err());
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
