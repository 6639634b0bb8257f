//! From a VM's definition to what is written into its cgroup (pure).
//!
//! The files and their syntax: Linux, Documentation/admin-guide/cgroup-v2.rst.

use crate::fleet::{
    limits::{self, MEMORY_STEP},
    schema::{IoLimits, Vm},
    units::Size,
};

/// The period of `cpu.max` in microseconds: the kernel's default.
const PERIOD: u64 = 100_000;

/// `cpu.weight` of a VM that the fleet file gives none: the kernel's default, the same for all, so that a VM with many virtual CPUs
/// takes no more from its neighbour than one with few.
const WEIGHT: u32 = 100;

/// Threads and processes of a VM that the fleet file gives no number, besides one for each virtual CPU. Our programs stay below 100
/// each; an async runtime may start up to 512 threads for blocking work, and QEMU 64 for disks.
const PIDS: u32 = 1024;

/// Page cache of the store that a VM may hold if the fleet file says nothing. It is reclaimed before anything is killed.
const STORE_CACHE: Size = Size(512 << 20);

/// What QEMU's translator may keep of translated code, at most: its default for large hosts. Only emulated guests have it.
const TRANSLATED: Size = Size(1 << 30);

/// A file of a cgroup and what is written to it. The kernel answers a read with exactly that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The file's name.
    pub file: &'static str,
    /// Its content, without the final newline.
    pub value: String,
}

/// What a VM may take of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Values {
    /// `memory.max` in bytes: guest, overhead and page cache of the store. A multiple of any page size, so that the kernel does not round.
    pub memory_max: u64,
    /// `cpu.max`, microseconds of each 100 ms; no bound if none.
    pub cpu_quota: Option<u64>,
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: u32,
    /// `pids.max`.
    pub pids_max: u32,
    /// What goes to and from the disks under its volumes; no bound if none.
    pub io: Option<IoLimits>,
}

impl Values {
    /// Those of `vm`, which is emulated or not.
    pub fn of(vm: &Vm, emulated: bool) -> Self {
        let limits = &vm.limits;
        let cache = limits.store_cache.unwrap_or(STORE_CACHE).0;
        let translated = if emulated { TRANSLATED.0 } else { 0 };
        let parts = [limits::overhead(vm).0, cache, translated];
        let memory = parts.into_iter().fold(vm.memory.0, u64::saturating_add);
        let cpu = limits.cpu.as_ref();
        Self {
            memory_max: memory.checked_next_multiple_of(MEMORY_STEP.0).unwrap_or(memory),
            cpu_quota: cpu.and_then(|cpu| cpu.percent).map(|percent| u64::from(percent) * PERIOD / 100),
            cpu_weight: cpu.and_then(|cpu| cpu.weight).unwrap_or(WEIGHT),
            pids_max: limits.pids.unwrap_or(PIDS.saturating_add(vm.vcpus)),
            io: limits.io.clone().filter(|io| *io != IoLimits::default()),
        }
    }

    /// What is written, in this order. `io.max` is not among it: it needs the numbers of devices ([`io_max`]).
    pub fn settings(&self) -> Vec<Setting> {
        let quota = self.cpu_quota.map_or("max".into(), |quota| quota.to_string());
        let setting = |file, value| Setting { file, value };
        vec![
            setting("memory.max", self.memory_max.to_string()),
            // One process less leaves a guest that hangs; the whole VM ends, and restarts by its policy.
            setting("memory.oom.group", "1".into()),
            setting("cpu.max", format!("{quota} {PERIOD}")),
            setting("cpu.weight", self.cpu_weight.to_string()),
            setting("pids.max", self.pids_max.to_string()),
        ]
    }
}

/// A block device by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A line of `io.max`, as the kernel shows it; without limits, the line that takes a device's limits away.
pub fn io_max(device: Device, limits: &IoLimits) -> String {
    let number = |value: Option<u64>| value.map_or("max".into(), |value| value.to_string());
    format!(
        "{device} rbps={} wbps={} riops={} wiops={}",
        number(limits.read.map(|size| size.0)),
        number(limits.write.map(|size| size.0)),
        number(limits.read_ops.map(u64::from)),
        number(limits.write_ops.map(u64::from)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(limits: &serde_json::Value) -> Vm {
        let vm = serde_json::json!({
            "vcpus": 4, "memory": "8GiB", "kernel": "/k", "modules": "/m", "roots": [], "limits": limits,
        });
        serde_json::from_value(vm).unwrap()
    }

    fn shown(limits: serde_json::Value, emulated: bool) -> String {
        let values = Values::of(&vm(&limits), emulated);
        let settings = values.settings();
        settings.iter().map(|setting| format!("{} {}\n", setting.file, setting.value)).collect()
    }

    #[test]
    fn a_vm_without_limits_of_its_own() {
        // 8 GiB; 64 MiB for its processes, 4 for its processors and 64 for page tables; 512 MiB of page cache.
        insta::assert_snapshot!(shown(serde_json::json!({}), false));
        let emulated = Values::of(&vm(&serde_json::json!({})), true).memory_max;
        assert_eq!(emulated - Values::of(&vm(&serde_json::json!({})), false).memory_max, 1 << 30);
    }

    #[test]
    fn a_vm_with_all_limits() {
        let limits = serde_json::json!({
            "cpu": { "percent": 250, "weight": 300 }, "pids": 500, "store_cache": "1GiB",
            "io": { "read": "100MiB", "write_ops": 1000 },
        });
        insta::assert_snapshot!(shown(limits.clone(), false));
        let values = Values::of(&vm(&limits), false);
        let line = io_max(Device { major: 8, minor: 16 }, &values.io.unwrap());
        assert_eq!(line, "8:16 rbps=104857600 wbps=max riops=max wiops=1000");
    }

    #[test]
    fn cg5_no_limit_takes_a_devices_limits_away() {
        let line = io_max(Device { major: 259, minor: 0 }, &IoLimits::default());
        assert_eq!(line, "259:0 rbps=max wbps=max riops=max wiops=max");
    }

    proptest! {
        /// Whatever is asked for, the kernel rounds nothing, and the guest's memory is within.
        #[test]
        fn cg9_memory_is_whole_pages_of_any_size(memory in 64_u64..(1 << 40), cache in 0_u64..(1 << 40), vcpus in 1_u32..256) {
            let mut vm = vm(&serde_json::json!({}));
            vm.memory = Size(memory);
            vm.vcpus = vcpus;
            vm.limits.store_cache = Some(Size(cache));
            let values = Values::of(&vm, false);
            prop_assert!(values.memory_max.is_multiple_of(65536));
            prop_assert!(values.memory_max > memory.saturating_add(cache));
        }
    }
}
