//! What is on disk: directories, files that are replaced as a whole, the lock of a running `laird`.

pub mod dirs;
pub mod file;
pub mod lock;
