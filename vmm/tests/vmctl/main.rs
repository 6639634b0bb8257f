//! `vmctl` where it needs no `laird`.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod check;
#[path = "../common/store.rs"]
mod store;
mod support;
mod usage;
