//! The metadata of one store path as one run of bytes, with offsets instead of pointers, so that it is the same in memory and
//! in a mapped file.
//!
//! A [`Header`], then the inodes, the names and the targets of symbolic links, the last two filled up to 8 bytes. Inodes are
//! numbered breadth-first from 0, the store path itself. A directory's children so are one contiguous range, and are sorted
//! by the bytes of their names. A second name of a file (a hard link) is an alias: a record that has a name and refers to the
//! first one. Nothing in here is trusted further than that no access can go wrong; what the checksum is good for is damage.

use super::bytes::Bytes;
use std::ops::Range;
use thiserror::Error;
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 4] = *b"LMan";

/// The version of the format.
const VERSION: u32 = 1;

/// The beginning of a manifest.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: u32,
    /// XXH3 of all that follows this field.
    checksum: u64,
    inodes: u32,
    /// Bytes of all names.
    names: u32,
    /// Bytes of all targets.
    targets: u32,
    /// How many of the inodes are aliases.
    aliases: u32,
}

const HEADER: usize = size_of::<Header>();

/// Where the checksummed part begins.
const CHECKED: usize = 16;

/// Why bytes are no manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ManifestError {
    /// It does not begin as one.
    #[error("There is no manifest")]
    Magic,
    /// Another version.
    #[error("The manifest has version {0}; {VERSION} is known")]
    Version(u32),
    /// Its sections do not add up.
    #[error("The manifest has {0} bytes, which is not what its header says")]
    Length(usize),
    /// Damaged.
    #[error("The manifest's checksum is wrong")]
    Checksum,
}

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
    pub size: u64,
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
    reserved: u16,
}

const _: () = assert!(HEADER == 32 && size_of::<Inode>() == 32);

impl Inode {
    pub(super) fn new(kind: Kind, size: u64) -> Self {
        let (code, links) = match kind {
            Kind::Directory => (0, 2),
            Kind::File { executable: false } => (1, 1),
            Kind::File { executable: true } => (2, 1),
            Kind::Symlink => (3, 1),
            Kind::Alias => (4, 0),
        };
        Self { size, parent: 0, first: 0, count: 0, name: 0, links, name_len: 0, kind: code, reserved: 0 }
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
}

/// The three sections of a manifest, wherever they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections<'a> {
    pub(super) inodes: &'a [Inode],
    pub(super) names: &'a [u8],
    pub(super) targets: &'a [u8],
}

impl<'a> Sections<'a> {
    fn name(&self, inode: &Inode) -> &'a [u8] {
        range(self.names, inode.name, u64::from(inode.name_len)).unwrap_or_default()
    }

    fn inode(&self, number: u32) -> Option<&'a Inode> {
        self.inodes.get(usize::try_from(number).ok()?)
    }

    pub(super) fn path(&self, number: u32) -> Option<Vec<&'a [u8]>> {
        let mut names = Vec::new();
        let mut number = number;
        while number != 0 {
            let inode = self.inode(number)?;
            // A parent comes before its children, so this ends.
            if inode.parent >= number {
                return None;
            }
            let name = self.name(inode);
            // With anything else an index could lead out of the store path.
            if matches!(name, b"" | b"." | b"..") || name.iter().any(|&c| c == 0 || c == b'/') {
                return None;
            }
            names.push(name);
            number = inode.parent;
        }
        names.reverse();
        Some(names)
    }

    /// The manifest of these sections; `None` if 32 bits do not hold their lengths.
    pub(super) fn encode(&self) -> Option<Manifest> {
        let aliases = self.inodes.iter().filter(|inode| inode.kind() == Kind::Alias).count();
        let mut header = Header {
            magic: MAGIC,
            version: VERSION,
            checksum: 0,
            inodes: u32::try_from(self.inodes.len()).ok()?,
            names: u32::try_from(self.names.len()).ok()?,
            targets: u32::try_from(self.targets.len()).ok()?,
            aliases: u32::try_from(aliases).ok()?,
        };
        let layout = header.layout()?;
        let mut words = vec![0u64; layout.end.checked_div(8)?].into_boxed_slice();
        let bytes = words.as_mut_bytes();
        bytes.get_mut(HEADER..layout.names.start)?.copy_from_slice(self.inodes.as_bytes());
        bytes.get_mut(layout.names.clone())?.copy_from_slice(self.names);
        bytes.get_mut(layout.targets.clone())?.copy_from_slice(self.targets);
        bytes.get_mut(..HEADER)?.copy_from_slice(header.as_bytes());
        header.checksum = checksum(bytes);
        bytes.get_mut(..HEADER)?.copy_from_slice(header.as_bytes());
        Some(Manifest { bytes: Bytes::Private(words), header, layout })
    }
}

/// Where the sections are, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layout {
    names: Range<usize>,
    targets: Range<usize>,
    end: usize,
}

impl Header {
    fn layout(&self) -> Option<Layout> {
        let size = |n: u32| usize::try_from(n).ok();
        let names = HEADER.checked_add(size(self.inodes)?.checked_mul(size_of::<Inode>())?)?;
        let names = names..names.checked_add(size(self.names)?)?;
        let targets = names.end.checked_next_multiple_of(8)?;
        let targets = targets..targets.checked_add(size(self.targets)?)?;
        let end = targets.end.checked_next_multiple_of(8)?;
        Some(Layout { names, targets, end })
    }
}

/// The checksum of a whole manifest.
fn checksum(manifest: &[u8]) -> u64 {
    XxHash3_64::oneshot(manifest.get(CHECKED..).unwrap_or_default())
}

/// The metadata of one store path.
#[derive(Debug, Clone)]
pub struct Manifest {
    bytes: Bytes,
    header: Header,
    layout: Layout,
}

impl PartialEq for Manifest {
    fn eq(&self, other: &Self) -> bool {
        *self.bytes == *other.bytes
    }
}

impl Eq for Manifest {}

impl Manifest {
    /// Checks all of it and takes it over.
    pub(super) fn parse(bytes: Bytes) -> Result<Self, ManifestError> {
        let (header, _) = Header::read_from_prefix(&bytes).map_err(|_| ManifestError::Magic)?;
        if header.magic != MAGIC {
            return Err(ManifestError::Magic);
        }
        if header.version != VERSION {
            return Err(ManifestError::Version(header.version));
        }
        let wrong = ManifestError::Length(bytes.len());
        let layout = header.layout().filter(|layout| layout.end == bytes.len()).ok_or(wrong)?;
        if header.inodes == 0 {
            return Err(wrong);
        }
        if checksum(&bytes) != header.checksum {
            return Err(ManifestError::Checksum);
        }
        Ok(Self { bytes, header, layout })
    }

    /// The manifest in memory of this process, from its bytes. For tests and fuzzers.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        let mut words = vec![0u64; bytes.len().div_ceil(8)].into_boxed_slice();
        let Ok(()) = bytes.write_to(words.as_mut_bytes()) else {
            return Err(ManifestError::Length(bytes.len()));
        };
        Self::parse(Bytes::Private(words))
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What tells it from another one.
    pub fn checksum(&self) -> u64 {
        self.header.checksum
    }

    /// How many numbers of inodes there are; the store path itself is number 0.
    pub fn len(&self) -> u32 {
        self.header.inodes
    }

    /// Whether there is nothing, which never is so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many inodes there are, each counted once however many names it has.
    pub fn inodes(&self) -> u32 {
        self.header.inodes.saturating_sub(self.header.aliases)
    }

    #[inline]
    fn sections(&self) -> Sections<'_> {
        let bytes: &[u8] = &self.bytes;
        let inodes = bytes.get(HEADER..self.layout.names.start).unwrap_or_default();
        Sections {
            inodes: <[Inode]>::ref_from_bytes(inodes).unwrap_or_default(),
            names: bytes.get(self.layout.names.clone()).unwrap_or_default(),
            targets: bytes.get(self.layout.targets.clone()).unwrap_or_default(),
        }
    }

    /// The record with this number, which may be an alias.
    pub fn inode(&self, number: u32) -> Option<&Inode> {
        self.sections().inode(number)
    }

    /// The inode that a record stands for, and its number: its own, or for an alias that of the first name.
    pub fn resolve(&self, number: u32) -> Option<(u32, &Inode)> {
        let inode = self.inode(number)?;
        if inode.kind() != Kind::Alias {
            return Some((number, inode));
        }
        self.inode(inode.first).filter(|of| of.kind() != Kind::Alias).map(|of| (inode.first, of))
    }

    /// The name of a record of this manifest; empty for the store path itself.
    pub fn name(&self, inode: &Inode) -> &[u8] {
        self.sections().name(inode)
    }

    /// The target of a symbolic link.
    pub fn target(&self, inode: &Inode) -> Option<&[u8]> {
        (inode.kind() == Kind::Symlink).then(|| range(self.sections().targets, inode.first, inode.size))?
    }

    /// The records of a directory's children, sorted by name, and the number of the first one. `None` for what is no
    /// directory.
    pub fn children(&self, directory: &Inode) -> Option<(u32, &[Inode])> {
        let children = directory
            .is_directory()
            .then(|| range(self.sections().inodes, directory.first, u64::from(directory.count)))??;
        Some((directory.first, children))
    }

    /// The number of the child with this name. For an alias it is that of the inode.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Option<u32> {
        let sections = self.sections();
        let (first, children) = self.children(directory)?;
        let position = children.binary_search_by(|child| sections.name(child).cmp(name)).ok()?;
        let number = first.checked_add(u32::try_from(position).ok()?)?;
        self.resolve(number).map(|(number, _)| number)
    }

    /// The names that lead from the store path to this inode; none for the store path itself. Each is a proper name, so
    /// they lead nowhere else.
    pub fn path(&self, number: u32) -> Option<Vec<&[u8]>> {
        self.sections().path(number)
    }
}

#[inline]
fn range<T>(all: &[T], first: u32, count: u64) -> Option<&[T]> {
    let first = usize::try_from(first).ok()?;
    let end = first.checked_add(usize::try_from(count).ok()?)?;
    all.get(first..end)
}
