//! The vhost-user device: a guest's virtqueues on one side, the server and the host's files on the other.

pub mod chain;
pub mod device;
pub mod files;
pub mod listen;
