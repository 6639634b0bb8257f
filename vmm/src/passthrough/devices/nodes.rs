//! The nodes of IOMMU groups below `/dev/vfio`, by which a VM has its devices.

use super::{Devices, POLL, in_time};
use crate::passthrough::{machine::Reason, record::Holding};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    unistd::{getegid, geteuid},
};
use std::{
    fs::{self, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::PathBuf,
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How long the descriptors of a hypervisor that has ended may take to be closed: the kernel first lets go of all of the guest's memory.
const CLOSED: Duration = Duration::from_secs(30);

impl Devices {
    /// Takes the nodes of the groups from the VM that had them.
    pub(super) async fn own_nodes(&self, holding: &Holding) -> Result<(), Reason> {
        // Nobody else could have given them away.
        if !geteuid().is_root() {
            return Ok(());
        }
        let nodes: Vec<_> = holding.groups().into_iter().map(|group| self.node(group)).collect();
        in_time(move || {
            for node in nodes {
                let (user, group) = (geteuid().as_raw(), getegid().as_raw());
                let taken = chown(&node, Some(user), Some(group))
                    .and_then(|()| fs::set_permissions(&node, Permissions::from_mode(0o600)));
                match taken {
                    // One that is gone is nobody's.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        let error =
                            format!("{} cannot be taken from the VM that had it: {error}", node.display());
                        return Err(Reason::Host { error });
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    /// Waits until no process has the devices open: a group can be opened once only.
    pub(super) async fn await_closed(&self, holding: &Holding) -> Result<(), Reason> {
        for group in holding.groups() {
            let (node, began) = (self.node(group), Instant::now());
            loop {
                let path = node.clone();
                let open = in_time(move || {
                    let flags = OFlag::O_NONBLOCK.bits();
                    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map(drop))
                });
                match open.await? {
                    Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                        if began.elapsed() > CLOSED {
                            return Err(Reason::Open { group, seconds: CLOSED.as_secs() });
                        }
                        sleep(POLL).await;
                    }
                    // Whether there is one, and what it says, is the hypervisor's concern.
                    _ => break,
                }
            }
        }
        Ok(())
    }

    pub(super) fn node(&self, group: u32) -> PathBuf {
        self.sysfs.path(&format!("/dev/vfio/{group}"))
    }
}
