//! FUSE requests as Linux 6.12 sends them over virtiofs.

use super::layout::PAGE;
use lair_virtiofs::fuse::{
    Opcode,
    wire::{AttrOut, EntryOut, InitIn, InitOut, MAJOR, MINOR, OpenOut, ReadIn},
};
use zerocopy::IntoBytes;

/// Pages of a READDIRPLUS: Linux before 6.14 asks for one.
pub const LISTING: u32 = PAGE as u32;

/// A request, and how much room its reply has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The operation.
    pub opcode: Opcode,
    /// The inode.
    pub node: u64,
    /// What follows the header.
    pub arguments: Vec<u8>,
    /// Bytes of the reply between its header and its data.
    pub body: u32,
    /// Bytes of data in the reply, each page of which has a descriptor of its own.
    pub data: u32,
}

impl Request {
    fn new(opcode: Opcode, node: u64, arguments: &[u8], body: usize, data: u32) -> Self {
        // Bodies are structures of FUSE, of some hundred bytes at most.
        Self { opcode, node, arguments: arguments.to_vec(), body: body as u32, data }
    }

    /// INIT, offering all that there is.
    pub fn init() -> Self {
        let init = InitIn {
            major: MAJOR,
            minor: MINOR,
            max_readahead: 1 << 20,
            flags: u32::MAX,
            flags2: u32::MAX,
            ..InitIn::default()
        };
        Self::new(Opcode::Init, 0, init.as_bytes(), size_of::<InitOut>(), 0)
    }

    /// LOOKUP of a name in a directory.
    pub fn lookup(parent: u64, name: &[u8]) -> Self {
        Self::new(Opcode::Lookup, parent, &[name, b"\0"].concat(), size_of::<EntryOut>(), 0)
    }

    /// GETATTR.
    pub fn getattr(node: u64) -> Self {
        Self::new(Opcode::Getattr, node, &[0; 16], size_of::<AttrOut>(), 0)
    }

    /// READLINK.
    pub fn readlink(node: u64) -> Self {
        Self::new(Opcode::Readlink, node, &[], 0, PAGE as u32)
    }

    /// OPEN for reading.
    pub fn open(node: u64) -> Self {
        Self::new(Opcode::Open, node, &[0; 8], size_of::<OpenOut>(), 0)
    }

    /// OPENDIR.
    pub fn opendir(node: u64) -> Self {
        Self::new(Opcode::Opendir, node, &[0; 8], size_of::<OpenOut>(), 0)
    }

    /// READ.
    pub fn read(node: u64, handle: u64, offset: u64, size: u32) -> Self {
        Self::reading(Opcode::Read, node, handle, offset, size)
    }

    /// READDIRPLUS.
    pub fn readdirplus(node: u64, handle: u64, offset: u64) -> Self {
        Self::reading(Opcode::Readdirplus, node, handle, offset, LISTING)
    }

    fn reading(opcode: Opcode, node: u64, handle: u64, offset: u64, size: u32) -> Self {
        let read = ReadIn { fh: handle, offset, size, ..ReadIn::default() };
        Self::new(opcode, node, read.as_bytes(), 0, size)
    }

    /// FLUSH, at each close.
    pub fn flush(node: u64, handle: u64) -> Self {
        Self::new(Opcode::Flush, node, &with_handle(handle), 0, 0)
    }

    /// RELEASE, at the last close.
    pub fn release(node: u64, handle: u64) -> Self {
        Self::new(Opcode::Release, node, &with_handle(handle), 0, 0)
    }

    /// RELEASEDIR.
    pub fn releasedir(node: u64, handle: u64) -> Self {
        Self::new(Opcode::Releasedir, node, &with_handle(handle), 0, 0)
    }
}

/// `fuse_flush_in` and `fuse_release_in` begin with the handle and have 24 bytes.
fn with_handle(handle: u64) -> [u8; 24] {
    let mut arguments = [0; 24];
    arguments[..8].copy_from_slice(&handle.to_le_bytes());
    arguments
}
