//! `lair-shim` as a process, between a fake guest and fake clients. Every wait is bounded.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod agent;
mod console;
mod credentials;
mod laird;
mod links;
#[path = "../common/operator.rs"]
mod operator;
mod output;
mod process;
mod sessions;
mod support;
mod terminal;
