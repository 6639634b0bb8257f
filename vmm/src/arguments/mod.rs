//! The command lines of `laird` and `lair-shim`. Here, so that `vmctl man` knows them, too.

mod laird;
mod shim;

pub use laird::Laird;
pub use shim::Shim;
