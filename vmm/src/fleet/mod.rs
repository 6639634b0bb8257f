//! The fleet file: all that one host runs.

pub mod schema;
pub mod units;
