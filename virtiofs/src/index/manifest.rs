//! The metadata of one store path in flat arrays: offsets instead of pointers, so that it can be mapped from a file.
//!
//! Inodes are numbered breadth-first from 0, the store path itself. A directory's children so are one contiguous range,
//! and are sorted by the bytes of their names.

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
}

/// One inode, 32 bytes. Which fields mean what depends on [`Inode::kind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inode {
    /// Bytes of a file, or of a symbolic link's target; 0 for a directory.
    pub size: u64,
    /// The directory that holds it; 0 for the store path itself.
    pub parent: u32,
    /// Directory: its first child. Symbolic link: where its target begins among the targets.
    pub first: u32,
    /// Directory: how many children it has.
    pub count: u32,
    /// Where its name begins among the names.
    pub name: u32,
    /// Its link count as the guest sees it: 2 and its subdirectories for a directory, else 1.
    pub links: u32,
    /// The length of its name. The kernel allows 255.
    pub name_len: u8,
    /// 0 directory, 1 file, 2 executable file, 3 symbolic link.
    kind: u8,
    reserved: u16,
}

impl Inode {
    pub(super) fn new(kind: Kind, size: u64) -> Self {
        let (code, links) = match kind {
            Kind::Directory => (0, 2),
            Kind::File { executable: false } => (1, 1),
            Kind::File { executable: true } => (2, 1),
            Kind::Symlink => (3, 1),
        };
        Self { size, parent: 0, first: 0, count: 0, name: 0, links, name_len: 0, kind: code, reserved: 0 }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self.kind {
            0 => Kind::Directory,
            1 => Kind::File { executable: false },
            2 => Kind::File { executable: true },
            _ => Kind::Symlink,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == Kind::Directory
    }
}

/// The metadata of one store path.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub(super) inodes: Vec<Inode>,
    pub(super) names: Vec<u8>,
    pub(super) targets: Vec<u8>,
}

impl Manifest {
    /// How many inodes there are; the store path itself is number 0.
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Whether there is nothing, which never happens for a manifest that was built.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// The inode with this number.
    pub fn inode(&self, number: u32) -> Option<&Inode> {
        self.inodes.get(usize::try_from(number).ok()?)
    }

    /// The name of an inode of this manifest; empty for the store path itself.
    pub fn name(&self, inode: &Inode) -> &[u8] {
        range(&self.names, inode.name, u64::from(inode.name_len)).unwrap_or_default()
    }

    /// The target of a symbolic link.
    pub fn target(&self, inode: &Inode) -> Option<&[u8]> {
        (inode.kind() == Kind::Symlink).then(|| range(&self.targets, inode.first, inode.size))?
    }

    /// The children of a directory, sorted by name, and the number of the first one; nothing for other inodes.
    pub fn children(&self, directory: &Inode) -> (u32, &[Inode]) {
        let children = directory
            .is_directory()
            .then(|| range(&self.inodes, directory.first, u64::from(directory.count)))
            .flatten()
            .unwrap_or_default();
        (directory.first, children)
    }

    /// The number of the child with this name.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Option<u32> {
        let (first, children) = self.children(directory);
        let position = children.binary_search_by(|child| self.name(child).cmp(name)).ok()?;
        first.checked_add(u32::try_from(position).ok()?)
    }

    /// The names that lead from the store path to this inode; none for the store path itself.
    pub fn path(&self, number: u32) -> Option<Vec<&[u8]>> {
        let mut names = Vec::new();
        let mut number = number;
        while number != 0 {
            let inode = self.inode(number)?;
            // A parent comes before its children, so this ends.
            if inode.parent >= number {
                return None;
            }
            names.push(self.name(inode));
            number = inode.parent;
        }
        names.reverse();
        Some(names)
    }
}

fn range<T>(all: &[T], first: u32, count: u64) -> Option<&[T]> {
    let first = usize::try_from(first).ok()?;
    let end = first.checked_add(usize::try_from(count).ok()?)?;
    all.get(first..end)
}
