//! Whom the processes of a VM run as, what is theirs, and what they are left with.
//!
//! ```text
//! state/vms/NAME/          root, group of the VM, 0750
//!   VOLUME.img             the hypervisor's user, 0600
//! run/vms/NAME/            root, 0755
//!   initramfs              root, group of the VM, 0640
//!   store.sock             root, group of the VM, 0660; made by laird, handed to lair-virtiofs
//!   hypervisor/            the hypervisor's user, 0700: its control socket and the console
//!   device/                the vsock device's user, group of the VM, 2750: the hypervisor connects to it, and it to the shim
//! ```
//!
//! `lair-virtiofs` opens the store first and then becomes its user by itself. `lair-shim` keeps the user of `laird`: it reads credentials
//! and makes sockets where the fleet file says, which takes root's rights. It gets nothing else of `laird`'s.

use super::{machine::Part, plan::Plan};
use crate::{
    cgroup::{CgroupError, Hierarchy},
    host::{
        confine::{Confinement, Identity, Rlimits},
        ids::{Ids, IdsError, VmIds},
    },
    state::dirs::{self, Dirs, DirsError},
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Memory that is pinned besides the guest's: firmware and ROMs of devices, a few MiB each.
const PINNED: u64 = 256 << 20;

/// Open descriptors of a process other than `lair-virtiofs`, which sets its own limit. The shim has two for each of its 1024 links, the
/// vsock device one.
const FILES: u64 = 8192;

/// Whom the processes of one VM run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    ids: Option<VmIds>,
}

impl Users {
    /// Those of the VM `name`: its own, where there are any to give.
    pub fn of(ids: Option<&Ids>, name: &str) -> Result<Self, IdsError> {
        Ok(Self { ids: ids.map(|ids| ids.allot(name)).transpose()? })
    }

    /// The user and group that `lair-virtiofs` is told to become.
    pub fn store(self) -> Option<(u32, u32)> {
        self.ids.map(|ids| (ids.uid(Part::StoreBackend), ids.gid()))
    }

    /// Root with the VM's group: who owns what `laird` makes for the VM's processes.
    pub fn shared(self) -> Option<(u32, u32)> {
        self.ids.map(|ids| (0, ids.gid()))
    }

    /// Gives the VM's directories, which are there, to its users.
    pub fn own_directories(self, dirs: &Dirs, plan: &Plan) -> Result<(), DirsError> {
        let Some(ids) = self.ids else { return Ok(()) };
        let gid = ids.gid();
        // They may go through; the names in it are not for them to read.
        for path in [&dirs.state, &dirs.state.join("vms")] {
            dirs::give(path, 0, 0, 0o751)?;
        }
        dirs::give(&plan.dirs.state, 0, gid, 0o750)?;
        dirs::give(&plan.dirs.hypervisor(), ids.uid(Part::Hypervisor), gid, 0o700)?;
        // New files get its group, also those of the shim.
        dirs::give(&plan.dirs.device(), ids.uid(Part::VsockDevice), gid, 0o2750)
    }

    /// Gives the images of the VM's volumes to its hypervisor.
    pub fn own_volumes(self, plan: &Plan) -> Result<(), DirsError> {
        let Some(ids) = self.ids else { return Ok(()) };
        let mut disks = plan.machine.disks.iter();
        disks.try_for_each(|disk| dirs::give(&disk.image, ids.uid(Part::Hypervisor), ids.gid(), 0o600))
    }

    /// Gives the nodes of IOMMU groups to its hypervisor.
    pub fn own_nodes(self, nodes: &[PathBuf]) -> Result<(), DirsError> {
        let Some(ids) = self.ids else { return Ok(()) };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| DirsError::Io(path, error)
        };
        // Not opened for that: a group can be opened once only. Nobody but root makes names there.
        nodes.iter().try_for_each(|node| {
            std::os::unix::fs::chown(node, Some(ids.uid(Part::Hypervisor)), Some(ids.gid()))
                .map_err(failed(node))?;
            fs::set_permissions(node, fs::Permissions::from_mode(0o600)).map_err(failed(node))
        })
    }

    /// Lets the hypervisor read the initramfs.
    pub fn own_initramfs(self, plan: &Plan) -> Result<(), DirsError> {
        let Some(ids) = self.ids else { return Ok(()) };
        dirs::give(&plan.machine.initramfs, 0, ids.gid(), 0o640)
    }

    /// Whom a process becomes before it runs.
    fn identity(self, part: Part) -> Option<Identity> {
        let ids = self.ids?;
        let groups = match part {
            Part::Hypervisor => device_group(Path::new("/dev/kvm")).into_iter().collect(),
            Part::VsockDevice => vec![],
            Part::StoreBackend | Part::Shim => return None,
        };
        Some(Identity { uid: ids.uid(part), gid: ids.gid(), groups })
    }

    /// What a process is left with.
    pub fn confinement(
        self,
        part: Part,
        plan: &Plan,
        cgroups: Option<&Hierarchy>,
    ) -> Result<Confinement, CgroupError> {
        let cgroup = cgroups.map(|cgroups| cgroups.vm(&plan.name).entrance(part)).transpose()?;
        Ok(Confinement { identity: self.identity(part), cgroup, limits: limits(part, plan), keep: vec![] })
    }
}

/// The group whose members may use a device, where others may not.
fn device_group(path: &Path) -> Option<u32> {
    let metadata = fs::metadata(path).ok()?;
    let mode = metadata.permissions().mode();
    (mode & 0o006 != 0o006 && mode & 0o060 == 0o060 && metadata.gid() != 0).then(|| metadata.gid())
}

/// The memory that the hypervisor may lock, where it has devices.
pub(super) fn locked(plan: &Plan) -> Option<u64> {
    limits(Part::Hypervisor, plan).locked
}

fn limits(part: Part, plan: &Plan) -> Rlimits {
    let limits = Rlimits::default();
    match part {
        // Guest memory is a file to the kernel, so it may be as large.
        Part::Hypervisor => {
            let volumes = plan.vm.volumes.iter().map(|volume| volume.size.0);
            let largest = volumes.fold(plan.vm.memory.0, u64::max);
            // VFIO pins all of a guest's memory, and what firmware and ROMs have besides.
            let limits = Rlimits { file_size: Some(largest), ..limits.with_files(FILES) };
            if plan.machine.cards.is_empty() {
                return limits;
            }
            limits.with_locked(plan.vm.memory.0.saturating_add(PINNED))
        }
        Part::VsockDevice | Part::Shim => Rlimits { locked: Some(0), ..limits.with_files(FILES) },
        Part::StoreBackend => limits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{passthrough::Given, vm::plan};

    #[test]
    fn vf12_a_hypervisor_with_devices_may_lock_its_guests_memory_and_no_other_process_may() {
        let plan = plan::example("a");
        assert_eq!(limits(Part::Hypervisor, &plan).locked, None);
        let functions = vec!["0000:01:00.0".parse().unwrap(), "0000:01:00.1".parse().unwrap()];
        let with = plan.with_devices(&[Given { functions, nodes: vec![], windows: vec![] }], None);
        assert_eq!(with.machine.cards.len(), 1);
        // Where that may be allowed.
        let wanted = Rlimits::default().with_locked((512 + 256) << 20).locked;
        assert_eq!(limits(Part::Hypervisor, &with).locked, wanted);
        assert_eq!(limits(Part::VsockDevice, &with).locked, Some(0));
    }
}
