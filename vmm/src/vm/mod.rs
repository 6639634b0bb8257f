//! One VM: what it is to be, its life, and who performs it.

pub mod actor;
pub mod adopt;
pub mod budget;
pub(crate) mod checkpoint;
pub mod failure;
pub mod generation;
pub mod handle;
pub mod lasting;
pub mod limits;
pub mod machine;
pub mod orphan;
pub mod part;
pub mod plan;
pub mod record;
pub mod restart;
pub mod running;
pub mod steps;
pub mod trace;
pub mod users;
mod watch;
