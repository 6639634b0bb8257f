//! `laird`'s API: HTTP and JSON on a unix socket.

pub mod audit;
pub mod client;
pub mod log;
pub mod server;
pub mod types;
