//! The test bed as a library: what `tests/demo`, `tests/run` and `tests/bench` share.
//!
//! | module | what is in it |
//! |---|---|
//! | [`testbed`] | the guests' contents that `tests/prepare` made |
//! | [`host`] | a `laird` of one's own, and `vmctl` |
//! | [`fleet`] | fleet files for tests |
//! | [`keys`] | keys made for one run |
//! | [`tree`] | a store directory for measurements |
//! | [`process`] | servers as child processes, and what they use of the machine |
//! | [`clock`] | what it takes to measure |
//! | [`frontend`] | a hypervisor and a guest of our own, for virtiofs backends |

pub mod clock;
pub mod fleet;
pub mod frontend;
pub mod host;
pub mod keys;
pub mod process;
pub mod testbed;
pub mod tree;
