//! The cgroup of one VM.

use super::{
    CgroupError, file,
    hierarchy::{Kernel, make},
    parse::{self, CpuStat, MemoryEvents, Pressure},
    values::{Device, Setting, Values, io_max},
};
use crate::{fleet::schema::IoLimits, vm::machine::Part};
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
};

/// The cgroup of one VM, there or not.
#[derive(Debug, Clone)]
pub struct VmCgroup {
    dir: PathBuf,
    name: String,
    kernel: Kernel,
}

/// What a VM takes now, and has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// `memory.current` in bytes.
    pub memory: u64,
    /// `pids.current`.
    pub pids: u64,
    /// `cpu.stat`.
    pub cpu: CpuStat,
    /// `memory.events`.
    pub memory_events: MemoryEvents,
    /// `memory.pressure`; none where the kernel keeps no such accounts.
    pub memory_pressure: Option<Pressure>,
}

/// What is not as it was left.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Somebody removed it.
    #[error("The cgroup {0} was removed by somebody else: the VM is not limited any more")]
    Gone(PathBuf),
    /// Somebody moved its processes away.
    #[error("The cgroup {0} has no process any more, though the VM runs: it is not limited any more")]
    Empty(PathBuf),
    /// Somebody changed a limit.
    #[error("{path} is \"{found}\", and \"{expected}\" was written there")]
    Changed {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it was.
        expected: String,
    },
    /// It cannot be looked at.
    #[error("{0}")]
    Unknown(String),
}

/// The directory of a part's cgroup.
fn leaf(part: Part) -> &'static str {
    match part {
        Part::Hypervisor => "hypervisor",
        Part::StoreBackend => "store",
        Part::VsockDevice => "vsock",
        Part::Shim => "shim",
    }
}

/// All parts.
const PARTS: [Part; 4] = [Part::Hypervisor, Part::StoreBackend, Part::VsockDevice, Part::Shim];

impl VmCgroup {
    pub(super) fn new(dir: PathBuf, name: String, kernel: Kernel) -> Self {
        Self { dir, name, kernel }
    }

    /// The VM.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// Makes it with its leaves and sets all limits, each of which is read back. Can be repeated; one that is there gets the new values.
    ///
    /// `device` is the disk under the VM's volumes.
    pub fn create(&self, values: &Values, device: Option<Device>) -> Result<(), CgroupError> {
        make(&self.dir, self.kernel)?;
        // Before there is any process in it.
        for Setting { file, value } in values.settings() {
            file::set(&self.dir.join(file), &value)?;
        }
        self.follow_io(values.io.as_ref(), device)?;
        PARTS.into_iter().try_for_each(|part| make(&self.dir.join(leaf(part)), self.kernel))
    }

    /// Brings `io.max` to `limits` for `device`, and to none for any other. Can be repeated, as the device changes.
    pub fn follow_io(&self, limits: Option<&IoLimits>, device: Option<Device>) -> Result<(), CgroupError> {
        let path = self.dir.join("io.max");
        let wanted: BTreeMap<_, _> =
            limits.zip(device).map(|(limits, device)| (device, limits.clone())).into_iter().collect();
        if wanted.is_empty() && !path.exists() {
            // Without limits for disks there need be no controller.
            return Ok(());
        }
        let there = file::parsed(&path, parse::io_max)?;
        for device in there.keys().filter(|device| !wanted.contains_key(device)) {
            file::write(&path, &io_max(*device, &IoLimits::default()))?;
        }
        for (device, limits) in &wanted {
            let value = io_max(*device, limits);
            file::write(&path, &value)?;
            let found = file::parsed(&path, parse::io_max)?;
            if found.get(device) != Some(limits) {
                let found = found.get(device).map_or("nothing".into(), |limits| io_max(*device, limits));
                return Err(CgroupError::Altered { path, value, found });
            }
        }
        Ok(())
    }

    /// Where a process writes `0` to enter the leaf of `part`, before it becomes the program.
    pub fn entrance(&self, part: Part) -> Result<File, CgroupError> {
        let path = self.dir.join(leaf(part)).join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).map_err(|error| CgroupError::Read(path, error))
    }

    /// Whether the process `pid` is in the leaf of `part`: what an adopted process must be.
    pub fn has(&self, part: Part, pid: i32) -> Result<bool, CgroupError> {
        let processes = self.dir.join(leaf(part)).join("cgroup.procs");
        Ok(file::parsed(&processes, parse::processes)?.contains(&pid))
    }

    /// Whether there is any process in it, zombies aside.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        Ok(file::parsed(&self.dir.join("cgroup.events"), parse::cgroup_events)?.populated)
    }

    /// What it takes.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        let at = |name: &str| self.dir.join(name);
        Ok(Usage {
            memory: file::parsed(&at("memory.current"), parse::single)?,
            pids: file::parsed(&at("pids.current"), parse::single)?,
            cpu: file::parsed(&at("cpu.stat"), parse::cpu_stat)?,
            memory_events: file::parsed(&at("memory.events"), parse::memory_events)?,
            memory_pressure: file::parsed(&at("memory.pressure"), parse::pressure).ok(),
        })
    }

    /// What is wrong with the cgroup of a VM that runs and has these limits, with `device` under its volumes; nothing if all is as it was
    /// left.
    pub fn check(&self, values: &Values, device: Option<Device>) -> Option<Fault> {
        if !self.exists() {
            return Some(Fault::Gone(self.dir.clone()));
        }
        match self.populated() {
            Ok(true) => {}
            Ok(false) => return Some(Fault::Empty(self.dir.clone())),
            Err(error) => return Some(Fault::Unknown(crate::error::chain(&error))),
        }
        let changed = values.settings().into_iter().find_map(|Setting { file, value }| {
            let path = self.dir.join(file);
            match file::read(&path) {
                Ok(found) if found.trim_end() == value => None,
                Ok(found) => Some(Fault::Changed {
                    path,
                    found: found.trim_end().chars().take(200).collect(),
                    expected: value,
                }),
                Err(error) => Some(Fault::Unknown(crate::error::chain(&error))),
            }
        });
        changed.or_else(|| self.check_io(values.io.as_ref().zip(device)?))
    }

    fn check_io(&self, (limits, device): (&IoLimits, Device)) -> Option<Fault> {
        let path = self.dir.join("io.max");
        match file::parsed(&path, parse::io_max) {
            Ok(found) if found.get(&device) == Some(limits) => None,
            Ok(found) => Some(Fault::Changed {
                found: found.get(&device).map_or("nothing".into(), |limits| io_max(device, limits)),
                expected: io_max(device, limits),
                path,
            }),
            Err(error) => Some(Fault::Unknown(crate::error::chain(&error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cgroup::fake::Fake, fleet::units::Size};
    use std::io::Write;

    fn values() -> Values {
        Values { memory_max: 1 << 30, cpu_quota: Some(50_000), cpu_weight: 200, pids_max: 99, io: None }
    }

    #[test]
    fn cg3_cg4_the_limits_stand_on_the_vm_and_not_on_its_leaves() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("a");
        group.create(&values(), None).unwrap();
        group.create(&values(), None).unwrap();
        let at = |name: &str| fake.read(&format!("lair/vms/a/{name}"));
        assert_eq!(
            ["memory.max", "memory.oom.group", "cpu.max", "cpu.weight", "pids.max", "io.max"].map(at),
            ["1073741824", "1", "50000 100000", "200", "99", ""]
        );
        for leaf in ["hypervisor", "store", "vsock", "shim"] {
            assert_eq!(at(&format!("{leaf}/memory.max")), "max", "{leaf}");
        }
        assert_eq!(fake.hierarchy().names().unwrap(), ["a"]);
        group.entrance(Part::Shim).unwrap().write_all(b"17\n").unwrap();
        assert!(group.has(Part::Shim, 17).unwrap() && !group.has(Part::Shim, 1).unwrap());
        assert!(!group.has(Part::Hypervisor, 17).unwrap());
    }

    #[test]
    fn cg9_a_value_that_is_not_kept_ends_the_start() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("a");
        group.create(&values(), None).unwrap();
        let file = group.dir().join("pids.max");
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/null", &file).unwrap();
        let error = group.create(&values(), None).unwrap_err();
        assert!(
            matches!(&error, CgroupError::Altered { path, value, found } if *path == file && value == "99" && found.is_empty()),
            "{error}"
        );
    }

    #[test]
    fn cg5_limits_follow_the_device() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("a");
        let (old, new) = (Device { major: 8, minor: 0 }, Device { major: 259, minor: 3 });
        let limits = IoLimits { read: Some(Size(1 << 20)), ..IoLimits::default() };
        let values = Values { io: Some(limits.clone()), ..values() };
        group.create(&values, Some(old)).unwrap();
        assert_eq!(fake.read("lair/vms/a/io.max"), io_max(old, &limits));
        // The real kernel has a line for each device; the fake keeps what was written last.
        group.follow_io(values.io.as_ref(), Some(new)).unwrap();
        assert_eq!(fake.read("lair/vms/a/io.max"), io_max(new, &limits));
        // No limits, or no device any more.
        group.follow_io(values.io.as_ref(), None).unwrap();
        assert_eq!(fake.read("lair/vms/a/io.max"), io_max(new, &IoLimits::default()));
    }

    #[test]
    fn cg7_a_cgroup_that_somebody_removed_emptied_or_changed_is_seen() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("a");
        assert_eq!(group.check(&values(), None), Some(Fault::Gone(group.dir().into())));
        group.create(&values(), None).unwrap();
        assert_eq!(group.check(&values(), None), Some(Fault::Empty(group.dir().into())));
        fake.write("lair/vms/a/cgroup.events", "populated 1\nfrozen 0\n");
        assert_eq!(group.check(&values(), None), None);
        fake.write("lair/vms/a/memory.max", "max\n");
        let fault = group.check(&values(), None).unwrap();
        assert!(
            fault.to_string().ends_with("/memory.max is \"max\", and \"1073741824\" was written there"),
            "{fault}"
        );
        fake.write("lair/vms/a/cgroup.events", "nonsense");
        assert!(matches!(group.check(&values(), None), Some(Fault::Unknown(_))));
        std::fs::remove_dir_all(group.dir()).unwrap();
        assert_eq!(group.check(&values(), None), Some(Fault::Gone(group.dir().into())));
        assert!(group.usage().unwrap_err().is_gone());
    }

    #[test]
    fn usage_is_read_from_its_files() {
        let fake = Fake::new();
        let group = fake.hierarchy().vm("a");
        group.create(&values(), None).unwrap();
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("pids.current", "7\n"),
            ("cpu.stat", "usage_usec 9\nuser_usec 4\nsystem_usec 5\nthrottled_usec 1\n"),
        ] {
            fake.write(&format!("lair/vms/a/{file}"), text);
        }
        let usage = group.usage().unwrap();
        assert_eq!((usage.memory, usage.pids, usage.cpu.usage_us, usage.cpu.throttled_us), (4096, 7, 9, 1));
        assert_eq!(usage.memory_pressure, Some(Pressure::default()));
        fake.write("lair/vms/a/pids.current", "max\n");
        assert!(matches!(group.usage(), Err(CgroupError::Damaged(..))));
    }
}
