//! The test bed as a library: what `tests/demo` and `tests/run` share.
//!
//! | module | what is in it |
//! |---|---|
//! | [`testbed`] | the guests' contents that `tests/prepare` made |
//! | [`host`] | a `laird` of one's own, and `vmctl` |
//! | [`fleet`] | fleet files for tests |
//! | [`keys`] | keys made for one run |

pub mod fleet;
pub mod host;
pub mod keys;
pub mod testbed;
