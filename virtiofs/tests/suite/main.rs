//! Tests of `lair-virtiofs`: the FUSE server alone, and the real program behind a frontend of our own.
//!
//! One binary, so that it is linked once. Tests of rows of the catalogue of faults carry their ids.

// Clippy takes only `#[test]` functions for tests, not what they call.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod cold;
mod damage;
mod disk;
mod driver;
mod fixture;
mod frontend;
mod fuse;
mod growth;
mod hostile;
mod index;
mod indexing;
mod model;
mod mounts;
mod program;
mod sandbox;
mod serve;
mod store;
