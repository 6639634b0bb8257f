//! One inode of a store path.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Whether it may be executed.
        executable: bool,
    },
    /// A symbolic link.
    Symlink,
    /// Another name of an inode, which is met instead of it wherever one looks.
    Alias,
}

/// One inode, 32 bytes. Which fields mean what depends on [`Inode::kind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inode {
    /// Bytes of a file, or of a symbolic link's target; 0 for a directory.
    pub(super) size: u64,
    /// The directory that holds it; 0 for the store path itself.
    pub parent: u32,
    /// Directory: its first child. Symbolic link: where its target begins among the targets. Alias: the inode it stands for.
    pub first: u32,
    /// Directory: how many children it has.
    pub count: u32,
    /// Where its name begins among the names.
    pub name: u32,
    /// Its link count as the guest sees it: 2 and its subdirectories for a directory, else how many names it has in this
    /// store path.
    pub links: u32,
    /// The length of its name. The kernel allows 255.
    pub name_len: u8,
    /// 0 directory, 1 file, 2 executable file, 3 symbolic link, 4 alias.
    kind: u8,
    /// A part of its name's hash.
    pub(super) tag: u16,
}

const _: () = assert!(size_of::<Inode>() == 32);

impl Inode {
    pub(super) fn new(kind: Kind, size: u64) -> Self {
        let (code, links) = match kind {
            Kind::Directory => (0, 2),
            Kind::File { executable: false } => (1, 1),
            Kind::File { executable: true } => (2, 1),
            Kind::Symlink => (3, 1),
            Kind::Alias => (4, 0),
        };
        Self { size, parent: 0, first: 0, count: 0, name: 0, links, name_len: 0, kind: code, tag: 0 }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self.kind {
            0 => Kind::Directory,
            1 => Kind::File { executable: false },
            2 => Kind::File { executable: true },
            3 => Kind::Symlink,
            _ => Kind::Alias,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == Kind::Directory
    }

    /// Bytes of a file, or of a symbolic link's target; 0 for a directory.
    pub fn size(&self) -> u64 {
        if self.is_directory() { 0 } else { self.size }
    }
}
