//! The host in a VM: [`outside`] that it runs a command and brings back all of what came of it, [`inside`] that it has what tests of a
//! real host rely on. `tests/run` has the latter run in it.

mod inside;
mod outside;
