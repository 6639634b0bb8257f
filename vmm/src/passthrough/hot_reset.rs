//! Resets all functions on a bus together by VFIO (VFIO_DEVICE_PCI_HOT_RESET), as a hypervisor does: who has opened all of their groups may.
//!
//! The kernel's own file for it, `reset_subordinate`, is younger, and before Linux 7.1 the hotplug driver takes its reset for a removal.

#![allow(unsafe_code)] // Requests of the kernel that no library has as safe functions; `vfio-ioctls` lacks this one.

use crate::host::pci::Address;
use nix::{errno::Errno, libc};
use requests::HotReset;
use std::{
    ffi::{CString, OsString},
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
};

/// The word by which `laird` knows that it is to do this and nothing else.
pub const WORD: &str = "hot-reset";

/// The most groups on a bus: one for each function that can be there.
const GROUPS_MAX: usize = 256;

/// Where IOMMUs are set up for groups.
const CONTAINER: &str = "/dev/vfio/vfio";

/// The IOMMU as QEMU sets it up.
const TYPE1V2_IOMMU: libc::c_int = 3;

/// Linux, include/uapi/linux/vfio.h. All are numbered as if they had no argument.
mod requests {
    use super::GROUPS_MAX;
    use nix::{libc, request_code_none};

    const KIND: u8 = b';';

    /// struct vfio_pci_hot_reset, with room for all groups.
    #[repr(C)]
    pub(super) struct HotReset {
        pub(super) length: u32,
        pub(super) flags: u32,
        pub(super) count: u32,
        pub(super) groups: [i32; GROUPS_MAX],
    }

    nix::ioctl_write_int_bad!(
        /// VFIO_SET_IOMMU
        set_iommu,
        request_code_none!(KIND, 102)
    );
    nix::ioctl_write_ptr_bad!(
        /// VFIO_GROUP_SET_CONTAINER
        set_container,
        request_code_none!(KIND, 104),
        libc::c_int
    );
    nix::ioctl_write_ptr_bad!(
        /// VFIO_GROUP_GET_DEVICE_FD
        get_device,
        request_code_none!(KIND, 106),
        libc::c_char
    );
    nix::ioctl_write_ptr_bad!(
        /// VFIO_DEVICE_PCI_HOT_RESET
        hot_reset,
        request_code_none!(KIND, 113),
        HotReset
    );
}

/// Why it is not done.
#[derive(Debug, thiserror::Error)]
pub enum HotResetError {
    /// A node cannot be opened.
    #[error("{path} cannot be opened: {error}")]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The kernel refuses a step of it.
    #[error("{step}: {error}")]
    Step {
        /// The step.
        step: &'static str,
        /// Why.
        error: Errno,
    },
    /// There are none, or more than a bus can have.
    #[error("{0} IOMMU groups cannot be those of one bus")]
    Groups(usize),
}

/// Resets `function`, and all that are on its bus, whose groups' nodes are `groups`: its own first. All must be VFIO's, and nobody else's.
pub fn hot_reset(function: Address, groups: &[PathBuf]) -> Result<(), HotResetError> {
    let open = |path: &PathBuf| {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.map_err(|error| HotResetError::Open { path: path.clone(), error })
    };
    let step = |step| move |error| HotResetError::Step { step, error };
    if groups.is_empty() || groups.len() > GROUPS_MAX {
        return Err(HotResetError::Groups(groups.len()));
    }
    let container = open(&CONTAINER.into())?;
    let groups = groups.iter().map(open).collect::<Result<Vec<File>, _>>()?;
    for group in &groups {
        // SAFETY: both are open files, and the kernel reads one number.
        unsafe { requests::set_container(group.as_raw_fd(), &container.as_raw_fd()) }
            .map_err(step("a group cannot be taken"))?;
    }
    // SAFETY: it is an open file, and the argument is a number.
    unsafe { requests::set_iommu(container.as_raw_fd(), TYPE1V2_IOMMU) }
        .map_err(step("the IOMMU cannot be set up"))?;
    let own = groups.first().ok_or(HotResetError::Groups(0))?;
    // An address has no NUL.
    let name = CString::new(function.to_string()).unwrap_or_default();
    // SAFETY: it is an open file, and the kernel reads a name up to its NUL.
    let device = unsafe { requests::get_device(own.as_raw_fd(), name.as_ptr()) }
        .map_err(step("it cannot be opened"))?;
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    let device = unsafe { OwnedFd::from_raw_fd(device) };
    let mut request = HotReset { length: 0, flags: 0, count: 0, groups: [-1; GROUPS_MAX] };
    for (place, group) in request.groups.iter_mut().zip(&groups) {
        (*place, request.count) = (group.as_raw_fd(), request.count.saturating_add(1));
    }
    request.length = request.count.saturating_add(3).saturating_mul(4);
    // SAFETY: it is an open file, and the kernel reads `length` bytes, of which the request has no fewer.
    unsafe { requests::hot_reset(device.as_raw_fd(), &request) }.map_err(step("VFIO does not reset it"))?;
    Ok(())
}

/// The same as a process is told it: the function, then the groups.
pub(super) fn told(mut arguments: impl Iterator<Item = OsString>) -> Result<(), String> {
    let function = arguments.next().and_then(|word| word.to_str()?.parse().ok());
    let function = function.ok_or("the first word is no PCI address")?;
    let groups: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    hot_reset(function, &groups).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's part is tested in the host VM.
    #[test]
    fn vf8_what_cannot_be_reset_is_told_with_the_step() {
        let function = "0000:01:00.0".parse().unwrap();
        assert_eq!(
            hot_reset(function, &[]).unwrap_err().to_string(),
            "0 IOMMU groups cannot be those of one bus"
        );
        assert!(matches!(
            hot_reset(function, &vec!["/dev/vfio/0".into(); 257]),
            Err(HotResetError::Groups(257))
        ));
        let missing = hot_reset(function, &["/nonexistent".into()]).unwrap_err().to_string();
        assert!(missing.contains("cannot be opened"), "{missing}");
        assert!(told(["x".into(), "/dev/vfio/0".into()].into_iter()).is_err());
        assert!(told(std::iter::empty()).is_err());
    }
}
