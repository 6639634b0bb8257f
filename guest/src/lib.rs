//! What the host and the guest of one VM agree on: the wire protocol and the boot configuration.
//!
//! The program `lair-guest` is the other half of this crate. `laird` and `lair-shim` depend on this
//! library, never the other way round: a guest carries none of the host's code.

pub mod boot;
pub mod initramfs;
pub mod wire;
