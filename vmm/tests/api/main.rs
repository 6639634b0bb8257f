//! `laird`'s API and `vmctl` at the other end of it, on a host made up by the test. No guest is started: a VM that runs is four
//! processes that sleep, with the record that an earlier `laird` would have left.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod admission;
mod apply;
mod connections;
mod gpus;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/operator.rs"]
mod operator;
mod roles;
#[path = "../common/store.rs"]
mod store;
mod streams;
mod support;
mod top;
