//! The layouts of requests and replies.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The header of a request. Of its fields those are read that matter here.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InHeader {
    /// The whole request's length in bytes.
    pub len: u32,
    /// The opcode.
    pub opcode: u32,
    /// Names the request in its reply.
    pub unique: u64,
    /// The node that it is about.
    pub nodeid: u64,
    /// Who asks, by uid.
    pub uid: u32,
    /// Who asks, by gid.
    pub gid: u32,
    /// Who asks, by process.
    pub pid: u32,
    /// Length of extensions, in units of 8 bytes.
    pub total_extlen: u16,
    /// Unused.
    pub padding: u16,
}

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OutHeader {
    /// The whole reply's length in bytes.
    pub len: u32,
    /// 0, or an errno, negative.
    pub error: i32,
    /// The request's.
    pub unique: u64,
}

/// The beginning of INIT's arguments; what follows depends on the guest's minor version.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitIn {
    /// 7.
    pub major: u32,
    /// The guest's.
    pub minor: u32,
    /// The guest's read-ahead in bytes.
    pub max_readahead: u32,
    /// What the guest offers.
    pub flags: u32,
}

/// INIT's answer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitOut {
    /// 7.
    pub major: u32,
    /// Ours.
    pub minor: u32,
    /// As the guest said.
    pub max_readahead: u32,
    /// Of those that the guest offers, those that are taken.
    pub flags: u32,
    /// Requests in the background.
    pub max_background: u16,
    /// Where the guest begins to wait.
    pub congestion_threshold: u16,
    /// The largest write; not used, and not below 4096.
    pub max_write: u32,
    /// The granularity of time stamps in nanoseconds.
    pub time_gran: u32,
    /// The longest request in pages.
    pub max_pages: u16,
    /// For DAX; not used.
    pub map_alignment: u16,
    /// Bits 32 to 63 of the flags.
    pub flags2: u32,
    /// Not used.
    pub unused: [u32; 7],
}

/// READ's, READDIR's and READDIRPLUS's arguments.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadIn {
    /// The handle; 0 where nothing is opened.
    pub fh: u64,
    /// From where: bytes of a file, or the place after which a listing goes on.
    pub offset: u64,
    /// How many bytes.
    pub size: u32,
    /// Not used.
    pub read_flags: u32,
    /// Not used.
    pub lock_owner: u64,
    /// Not used.
    pub flags: u32,
    /// Not used.
    pub padding: u32,
}

/// Attributes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Attr {
    /// The inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Access, change of contents, change of inode: seconds.
    pub times: [u64; 3],
    /// The same: nanoseconds.
    pub nanoseconds: [u32; 3],
    /// Type and permissions.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device.
    pub rdev: u32,
    /// The best size of a read.
    pub blksize: u32,
    /// Not used.
    pub flags: u32,
}

/// GETATTR's answer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttrOut {
    /// How long it is true, in seconds.
    pub valid: u64,
    /// The rest of it in nanoseconds.
    pub valid_nanoseconds: u32,
    /// Not used.
    pub dummy: u32,
    /// The attributes.
    pub attr: Attr,
}

/// LOOKUP's answer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EntryOut {
    /// The node; 0: there is none of this name, and that too is true for a while.
    pub nodeid: u64,
    /// Tells nodes apart whose number was used again; they never are.
    pub generation: u64,
    /// How long the name is true, in seconds.
    pub entry_valid: u64,
    /// How long the attributes are true, in seconds.
    pub attr_valid: u64,
    /// The rest of it in nanoseconds.
    pub entry_valid_nanoseconds: u32,
    /// The rest of it in nanoseconds.
    pub attr_valid_nanoseconds: u32,
    /// The attributes.
    pub attr: Attr,
}

/// One entry of a listing; the name follows, padded to 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Dirent {
    /// The inode number.
    pub ino: u64,
    /// Where the listing goes on after this entry.
    pub off: u64,
    /// Bytes of the name.
    pub namelen: u32,
    /// The type, as in the mode, without its lower bits.
    pub kind: u32,
}

/// STATFS's answer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatfsOut {
    /// Blocks.
    pub blocks: u64,
    /// Free blocks, for root and for others.
    pub free: [u64; 2],
    /// Inodes, and free ones.
    pub files: [u64; 2],
    /// The size of a block.
    pub bsize: u32,
    /// The longest name.
    pub namelen: u32,
    /// The size of a fragment.
    pub frsize: u32,
    /// Not used.
    pub padding: u32,
    /// Not used.
    pub spare: [u32; 6],
}

/// Flags of INIT that are taken where the guest offers them. Bits 32 and above travel in `flags2`.
pub mod flags {
    /// Reads may run side by side.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// `.` and `..` can be looked up, for file handles.
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    /// Listings with attributes.
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    /// The guest chooses when.
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    /// The guest can do without OPEN.
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    /// Lookups and listings of one directory may run side by side.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `max_pages` counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// Link targets are cached.
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    /// The guest can do without OPENDIR.
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    /// Contents are dropped only when told so: never.
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    /// `flags2` counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// The mount may be idmapped.
    pub const ALLOW_IDMAP: u64 = 1 << 40;

    /// What is taken.
    pub const TAKEN: u64 = ASYNC_READ
        | EXPORT_SUPPORT
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | NO_OPEN_SUPPORT
        | PARALLEL_DIROPS
        | MAX_PAGES
        | CACHE_SYMLINKS
        | NO_OPENDIR_SUPPORT
        | EXPLICIT_INVAL_DATA
        | INIT_EXT
        | ALLOW_IDMAP;
}
