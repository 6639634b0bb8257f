//! The supervisor of a Lair host: what `laird`, `vmctl` and `lair-shim` are made of.
//!
//! | module | what is in it |
//! |---|---|
//! | [`api`] | `laird`'s API on a unix socket: types, server, client, audit |
//! | [`arguments`] | the command lines of `laird` and `lair-shim` |
//! | [`cgroup`] | cgroup v2: limits of a VM, its end as a whole, what happens to it |
//! | [`error`] | how errors are told |
//! | [`fleet`] | the fleet file: schema, loading, validation |
//! | [`host`] | the host: processes, programs, facts |
//! | [`hypervisor`] | the machine as data, and the QEMU driver |
//! | [`passthrough`] | devices of the host that VMs have for themselves: bound, leased, reset, given back |
//! | [`shim`] | `lair-shim`: links, sessions, console log of one VM; and the protocol to it |
//! | [`state`] | what is on disk |
//! | [`supervisor`] | all VMs of one host |
//! | [`vm`] | one VM: plan, lifecycle (a pure state machine), steps, executor |

pub mod api;
pub mod arguments;
pub mod cgroup;
pub mod error;
pub mod fleet;
pub mod host;
pub mod hypervisor;
pub mod passthrough;
pub mod shim;
pub mod state;
pub mod supervisor;
pub mod vm;

#[cfg(test)]
use host::pci::machine;
