//! The command lines of our own programs and of the vsock device (pure); QEMU's is the driver's.

use super::text;
use crate::vm::plan::Plan;
use std::{os::fd::RawFd, path::Path};

/// What indexing and serving have in common.
pub(super) fn store_arguments(plan: &Plan) -> Vec<String> {
    let mut arguments = vec!["--index".into(), text(&plan.index)];
    for store in &plan.stores {
        arguments.extend(["--source".into(), text(store)]);
    }
    arguments.extend(["--view".into(), text(&plan.generation.view)]);
    arguments
}

/// The store backend's control socket.
pub(super) const STORE_CONTROL: &str = "store-control.sock";

/// `listener` is its vhost-user socket, `becomes` the user and group that it shall have.
pub(super) fn virtiofs_arguments(plan: &Plan, listener: RawFd, becomes: Option<(u32, u32)>) -> Vec<String> {
    let mut arguments = vec!["--fd".into(), listener.to_string()];
    if let Some((uid, gid)) = becomes {
        arguments.extend(["--uid".into(), uid.to_string(), "--gid".into(), gid.to_string()]);
    }
    arguments.extend(store_arguments(plan));
    arguments.extend(["--queues".into(), plan.machine.store_queues.to_string()]);
    arguments.extend(["--control".into(), text(&plan.dirs.socket(STORE_CONTROL))]);
    arguments
}

/// `socket` is for the hypervisor, `hybrid` for the shim.
pub(super) fn vsock_arguments(socket: &Path, hybrid: &Path) -> Vec<String> {
    // Not by its `--vm KEY=VALUE,...`, in which a comma cannot be escaped.
    let options = [
        // The guest's own number; it is not seen outside this device, so all VMs may have the same.
        ("--guest-cid", "3".into()),
        ("--socket", text(socket)),
        ("--uds-path", text(hybrid)),
        // The device drops packets of about 32 KiB and more, and so hangs the connection; a guest sends none larger than this.
        ("--tx-buffer-size", "16384".into()),
    ];
    options.into_iter().flat_map(|(option, value)| [option.into(), value]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cf12_paths_are_arguments_of_their_own() {
        for c in [",uds-path=", "=", " ", "+", "--config=", "%", "\""] {
            let (socket, hybrid) = (format!("/run/a{c}b/vsock.sock"), format!("/run/a{c}b/vsock"));
            let arguments = vsock_arguments(Path::new(&socket), Path::new(&hybrid));
            assert_eq!(arguments[2..6], ["--socket", &socket, "--uds-path", &hybrid]);
            assert_eq!(arguments.len(), 8);
        }
    }
}
