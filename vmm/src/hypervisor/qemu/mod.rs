//! The QEMU driver: command line and QMP.
//!
//! Facts that shaped it: `vhost-user-fs-pci` needs shared memory, has 128 queue entries unless told otherwise (which
//! caps a request near 496 KiB), and never reconnects, so the backend must outlive every reboot of the guest. Console and QMP
//! are sockets of QEMU's own, so that they outlive `laird`.

pub mod command;
mod plug;
pub mod qmp;
