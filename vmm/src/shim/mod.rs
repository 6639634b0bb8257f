//! `lair-shim`: the process beside each VM that carries what must outlive `laird`.

pub mod config;
pub mod protocol;
