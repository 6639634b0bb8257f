//! The host's devices that VMs have for themselves (VFIO). See the README.md here.

pub mod binding;
pub mod certificate;
mod devices;
pub mod fault;
#[cfg(test)]
#[path = "../../tests/common/kernel.rs"]
mod kernel;
pub mod machine;
pub mod record;
pub mod reset;
pub mod select;
pub mod write;

pub use devices::{Devices, DevicesError, Given, Told, What, reports};
