//! What fuzzers call: each function takes bytes, does with them what a guest, a hypervisor or a damaged disk could make happen, and
//! panics if that broke a promise. The same functions run on the stable compiler: `tests/corpus.rs` replays what fuzzers found.
//!
//! Only with the feature `fuzzing`. No part of the program uses this.

// A fuzzer says what is wrong by panicking, and what is used here besides is small and chosen.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod chain;
mod fuse;
mod index;
mod input;
mod model;
mod reply;
pub mod seeds;
mod session;
mod world;

pub use chain::chain;
pub use fuse::fuse;
pub use index::index;
pub use session::{requests_served, session};
