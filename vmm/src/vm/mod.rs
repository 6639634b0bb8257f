//! One VM: what it is to be, its life, and who performs it.

pub mod actor;
pub mod adopt;
pub mod budget;
pub mod generation;
pub mod machine;
pub mod plan;
pub mod record;
pub mod steps;
pub mod trace;
