//! A real `laird` with real child processes, killed at every point of every operation. The programs that it starts are stand-ins: this
//! test itself, executed again, with the sockets and protocols of the real ones and no guest.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod every_step;
mod exhaustion;
mod faults;
mod host;
#[path = "../common/kernel.rs"]
mod kernel;
mod lifecycle;
mod limits;
mod look;
#[path = "../common/machine.rs"]
mod machine;
mod passthrough;
mod real_devices;
mod stand_in;
#[path = "../common/store.rs"]
mod store;
