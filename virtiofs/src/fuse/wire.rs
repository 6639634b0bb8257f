//! The structures of the FUSE protocol, version 7.41, as in Linux' `include/uapi/linux/fuse.h`, whose names they have.
//! Little-endian machines only, as guest and host share their byte order.

#![allow(missing_docs)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's version that this server speaks.
pub const MAJOR: u32 = 7;
/// The minor version that this server knows.
pub const MINOR: u32 = 41;
/// The oldest minor version served: that of Linux 5.4, the first with virtiofs.
pub const MINOR_MIN: u32 = 31;

/// Length of [`InHeader`].
pub const IN_HEADER: usize = size_of::<InHeader>();
/// Length of [`OutHeader`].
pub const OUT_HEADER: usize = size_of::<OutHeader>();

macro_rules! wire {
    ($($(#[$meta:meta])* struct $name:ident: $size:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name {
                $(pub $field: $type,)*
            }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

wire! {
    /// `fuse_in_header`: begins each request.
    struct InHeader: 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
    }
    /// `fuse_out_header`: begins each reply. `error` is 0 or a negative errno.
    struct OutHeader: 16 { len: u32, error: i32, unique: u64, }
    /// `fuse_init_in`. Before 7.36 it ended after `flags`.
    struct InitIn: 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11], }
    /// `fuse_init_out`
    struct InitOut: 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// `fuse_attr`
    struct Attr: 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// `fuse_entry_out`
    struct EntryOut: 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    /// `fuse_attr_out`
    struct AttrOut: 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    /// `fuse_open_out`
    struct OpenOut: 16 { fh: u64, open_flags: u32, backing_id: i32, }
    /// `fuse_read_in`, also for directories
    struct ReadIn: 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// `fuse_statfs_out`
    struct StatfsOut: 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// `fuse_dirent`; the name follows, padded to 8 bytes.
    struct Dirent: 24 { ino: u64, off: u64, namelen: u32, kind: u32, }
}

/// Bits of `InitIn::flags` and, shifted by 32, `InitIn::flags2`.
pub mod flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// `OpenOut::open_flags`: keep the page cache.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `OpenOut::open_flags`: cache the listing.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
