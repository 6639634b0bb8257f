//! FUSE as a guest's kernel speaks it over virtio: the wire format, the table of opcodes, and a server that answers from the index.
//!
//! Numbers and layouts are those of the kernel's `include/uapi/linux/fuse.h`, protocol 7.31 and later.

pub mod opcode;
pub mod server;
pub mod wire;
