//! What the host is and has: its processes, its programs, its facts.

pub mod facts;
pub mod logging;
pub mod process;
pub mod tools;
