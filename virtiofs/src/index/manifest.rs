//! The metadata of one store path as one run of bytes, with offsets instead of pointers, so that it is the same in memory and
//! in a mapped file.
//!
//! A [`Header`], then the inodes, the hash table of their names, the names and the targets of symbolic links, all of them
//! filled up to 8 bytes. Inodes are numbered breadth-first from 0, the store path itself. A directory's children so are one
//! contiguous range, and are sorted by the bytes of their names. A second name of a file (a hard link) is an alias: a record that has a name and refers to the
//! first one. Nothing in here is trusted further than that no access can go wrong; what the checksum is good for is damage.

use super::{
    bytes::Bytes,
    held::Held,
    inode::{Inode, Kind},
    records::{Records, range},
    table::{self, Place},
};
use std::ops::Range;
use thiserror::Error;
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 3] = *b"LMa";

/// The version of the format.
const VERSION: u8 = 2;

/// The beginning of a manifest.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    /// XXH3 of all that follows.
    checksum: u64,
    magic: [u8; 3],
    version: u8,
    /// How many of the inodes are aliases.
    aliases: u32,
    inodes: u32,
    /// The length of the table, in places; 0 if there is none.
    table: u32,
    /// Bytes of all names.
    names: u32,
    /// Bytes of all targets.
    targets: u32,
}

const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 32);

/// Where the checksummed part begins.
const CHECKED: usize = size_of::<u64>();

/// Why bytes are no manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ManifestError {
    /// It does not begin as one.
    #[error("There is no manifest")]
    Magic,
    /// Another version.
    #[error("The manifest has version {0}; {VERSION} is known")]
    Version(u8),
    /// Its sections do not add up.
    #[error("The manifest has {0} bytes, which is not what its header says")]
    Length(usize),
    /// Damaged.
    #[error("The manifest's checksum is wrong")]
    Checksum,
    /// It was made wrong.
    #[error("An inode of the manifest refers to what is not in it")]
    Range,
}

/// The sections of a manifest, wherever they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections<'a> {
    pub(super) records: Records<'a>,
    pub(super) targets: &'a [u8],
}

impl Sections<'_> {
    /// The manifest of these sections; `None` if 32 bits do not hold their lengths.
    fn encode(&self) -> Option<Manifest> {
        let Records { inodes, table, names } = self.records;
        let aliases = inodes.iter().filter(|inode| inode.kind() == Kind::Alias).count();
        let mut header = Header {
            checksum: 0,
            magic: MAGIC,
            version: VERSION,
            aliases: u32::try_from(aliases).ok()?,
            inodes: u32::try_from(inodes.len()).ok()?,
            table: u32::try_from(table.len()).ok()?,
            names: u32::try_from(names.len()).ok()?,
            targets: u32::try_from(self.targets.len()).ok()?,
        };
        let layout = header.layout()?;
        let mut words = vec![0u64; layout.end.checked_div(8)?].into_boxed_slice();
        let bytes = words.as_mut_bytes();
        bytes.get_mut(HEADER..layout.table.start)?.copy_from_slice(inodes.as_bytes());
        bytes.get_mut(layout.table.clone())?.copy_from_slice(table.as_bytes());
        bytes.get_mut(layout.names.clone())?.copy_from_slice(names);
        bytes.get_mut(layout.targets.clone())?.copy_from_slice(self.targets);
        bytes.get_mut(..HEADER)?.copy_from_slice(header.as_bytes());
        header.checksum = checksum(bytes);
        bytes.get_mut(..HEADER)?.copy_from_slice(header.as_bytes());
        Manifest::of(header, Bytes::Private(words.into()))
    }
}

/// A manifest in the making.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) inodes: Vec<Inode>,
    table: Vec<Place>,
    pub(super) names: Vec<u8>,
    pub(super) targets: Vec<u8>,
}

impl Parts {
    pub(super) fn sections(&self) -> Sections<'_> {
        let Self { inodes, table, names, targets } = self;
        Sections { records: Records { inodes, table, names }, targets }
    }

    /// The manifest; `None` if 32 bits do not hold the lengths of its sections.
    pub(super) fn finish(mut self) -> Option<Manifest> {
        let records = self.sections().records;
        let hashes: Vec<u64> = self.inodes.iter().map(|inode| table::hash(records.name(inode))).collect();
        let table = table::make(&self.inodes, &hashes);
        for (inode, hash) in self.inodes.iter_mut().zip(&hashes) {
            inode.tag = table::tag(*hash);
        }
        self.table = table.unwrap_or_default();
        self.sections().encode()
    }
}

/// Where the sections are, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layout {
    table: Range<usize>,
    names: Range<usize>,
    targets: Range<usize>,
    end: usize,
}

impl Header {
    fn layout(&self) -> Option<Layout> {
        let size = |n: u32| usize::try_from(n).ok();
        let table = HEADER.checked_add(size(self.inodes)?.checked_mul(size_of::<Inode>())?)?;
        let table = table..table.checked_add(size(self.table)?.checked_mul(size_of::<Place>())?)?;
        let names = table.end..table.end.checked_add(size(self.names)?)?;
        let targets = names.end.checked_next_multiple_of(8)?;
        let targets = targets..targets.checked_add(size(self.targets)?)?;
        let end = targets.end.checked_next_multiple_of(8)?;
        Some(Layout { table, names, targets, end })
    }
}

impl Layout {
    fn sections(self, manifest: &[u8]) -> Option<Sections<'_>> {
        Some(Sections {
            records: Records {
                inodes: <[Inode]>::ref_from_bytes(manifest.get(HEADER..self.table.start)?).ok()?,
                table: <[Place]>::ref_from_bytes(manifest.get(self.table)?).ok()?,
                names: manifest.get(self.names)?,
            },
            targets: manifest.get(self.targets)?,
        })
    }
}

/// The checksum of a whole manifest.
fn checksum(manifest: &[u8]) -> u64 {
    XxHash3_64::oneshot(manifest.get(CHECKED..).unwrap_or_default())
}

/// The metadata of one store path.
#[derive(Debug, Clone)]
pub struct Manifest {
    held: Held,
    /// As in its header.
    checksum: u64,
    inodes: u32,
    aliases: u32,
}

impl PartialEq for Manifest {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
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
        let fits = header.layout().is_some_and(|layout| layout.end == bytes.len());
        if !fits || header.inodes == 0 {
            return Err(wrong);
        }
        if checksum(&bytes) != header.checksum {
            return Err(ManifestError::Checksum);
        }
        Self::of(header, bytes).ok_or(wrong)
    }

    /// The manifest that begins with this header.
    fn of(header: Header, bytes: Bytes) -> Option<Self> {
        let held = Held::new(bytes, |bytes| header.layout()?.sections(bytes))?;
        let Header { checksum, inodes, aliases, .. } = header;
        Some(Self { held, checksum, inodes, aliases })
    }

    /// The manifest in memory of this process, from its bytes. For tests and fuzzers.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        let mut words = vec![0u64; bytes.len().div_ceil(8)].into_boxed_slice();
        let Ok(()) = bytes.write_to(words.as_mut_bytes()) else {
            return Err(ManifestError::Length(bytes.len()));
        };
        Self::parse(Bytes::Private(words.into()))
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        self.held.bytes()
    }

    /// What tells it from another one.
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// How many numbers of inodes there are; the store path itself is number 0.
    pub fn len(&self) -> u32 {
        self.inodes
    }

    /// Whether there is nothing, which never is so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many inodes there are, each counted once however many names it has.
    pub fn inodes(&self) -> u32 {
        self.inodes.saturating_sub(self.aliases)
    }

    #[inline]
    fn sections(&self) -> Sections<'_> {
        self.held.sections()
    }

    /// The records.
    #[inline]
    pub(super) fn records(&self) -> Records<'_> {
        self.sections().records
    }

    /// The record with this number, which may be an alias.
    #[inline]
    pub fn inode(&self, number: u32) -> Option<&Inode> {
        self.records().inode(number)
    }

    /// The inode that a record stands for, and its number: its own, or for an alias that of the first name.
    pub fn resolve(&self, number: u32) -> Option<(u32, &Inode)> {
        self.records().resolve(number)
    }

    /// The name of a record of this manifest; empty for the store path itself.
    pub fn name(&self, inode: &Inode) -> &[u8] {
        self.records().name(inode)
    }

    /// The target of a symbolic link; `None` for a wrong one, and for what is none.
    pub fn target(&self, inode: &Inode) -> Option<&[u8]> {
        (inode.kind() == Kind::Symlink).then(|| range(self.sections().targets, inode.first, inode.size))?
    }

    /// The records of a directory's children, sorted by name, and the number of the first one. `None` for what is no
    /// directory.
    pub fn children(&self, directory: &Inode) -> Option<(u32, &[Inode])> {
        self.records().children(directory).map(|children| (directory.first, children))
    }

    /// The child with this name of the directory with this number, for an alias the inode that it stands for, and its number.
    pub fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<(u32, &Inode)>, ManifestError> {
        self.records().lookup(directory, name)
    }

    /// The names that lead from the store path to this inode; none for the store path itself. Each is a proper name, so
    /// they lead nowhere else.
    pub fn path(&self, number: u32) -> Option<Vec<&[u8]>> {
        self.records().path(number)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    /// A directory of `count` empty files.
    fn directory(count: u32) -> Manifest {
        let mut parts = Parts::default();
        let mut top = Inode::new(Kind::Directory, 0);
        (top.first, top.count) = (1, count);
        parts.inodes.push(top);
        let mut names: Vec<String> = (0..count).map(|number| format!("file-{number}")).collect();
        names.sort();
        for name in names {
            let mut file = Inode::new(Kind::File { executable: false }, 0);
            (file.name, file.name_len) = (parts.names.len() as u32, name.len() as u8);
            parts.names.extend(name.as_bytes());
            parts.inodes.push(file);
        }
        parts.finish().unwrap()
    }

    #[test]
    fn names_are_found_with_and_without_a_table() {
        for count in [0, 1, 16, 17, 1000] {
            let manifest = directory(count);
            let mut without = manifest.sections();
            without.records.table = &[];
            let without = without.encode().unwrap();
            assert_eq!(manifest.records().table.is_empty(), count == 0);
            assert_eq!(manifest.inode(0).unwrap().size(), 0);
            for manifest in [&manifest, &without] {
                let found: Vec<_> = (0..count)
                    .map(|number| manifest.lookup(0, format!("file-{number}").as_bytes()).unwrap().unwrap())
                    .map(|(number, _)| manifest.path(number).unwrap()[0].to_vec())
                    .collect();
                assert!(
                    found
                        .iter()
                        .enumerate()
                        .all(|(number, name)| *name == format!("file-{number}").into_bytes())
                );
                for name in ["", "file-", "file-00", "fil", "zzz", &format!("file-{count}")] {
                    assert_eq!(manifest.lookup(0, name.as_bytes()), Ok(None), "{name}");
                }
            }
        }
    }

    /// One name in every second directory: its hash says nothing of whose it is, and who looks in the others passes by many of them.
    #[test]
    fn a_name_of_another_directory_is_not_found() {
        const DIRECTORIES: u32 = 1000;
        let mut parts = Parts { names: b"same".to_vec(), ..Parts::default() };
        let mut directory = |parent, first, count| {
            let mut inode = Inode::new(Kind::Directory, 0);
            (inode.parent, inode.first, inode.count) = (parent, first, count);
            parts.inodes.push(inode);
        };
        directory(0, 1, DIRECTORIES);
        (1..=DIRECTORIES).for_each(|number| directory(0, DIRECTORIES + 1 + number / 2, (number + 1) % 2));
        for number in (2..=DIRECTORIES).step_by(2) {
            let mut file = Inode::new(Kind::File { executable: false }, 0);
            (file.parent, file.name_len) = (number, 4);
            parts.inodes.push(file);
        }
        for number in 1..=DIRECTORIES {
            let name = format!("d{number:04}");
            let inode = &mut parts.inodes[number as usize];
            (inode.name, inode.name_len) = (parts.names.len() as u32, name.len() as u8);
            parts.names.extend(name.as_bytes());
        }
        let manifest = parts.finish().unwrap();
        assert!(!manifest.records().table.is_empty());
        for number in 1..=DIRECTORIES {
            let found = manifest.lookup(number, b"same").unwrap().map(|(_, inode)| inode.parent);
            assert_eq!(found, (number % 2 == 0).then_some(number));
        }
    }

    #[test]
    fn only_sound_bytes_are_taken() {
        let manifest = directory(20);
        let bytes = manifest.as_bytes().to_vec();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest);
        let changed = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            Manifest::from_bytes(&bytes).unwrap_err()
        };
        assert_eq!(changed(8, b'X'), ManifestError::Magic);
        assert_eq!(changed(11, 1), ManifestError::Version(1));
        assert_eq!(changed(16, 99), ManifestError::Length(bytes.len()));
        assert_eq!(changed(0, !bytes[0]), ManifestError::Checksum);
        assert_eq!(changed(bytes.len() - 1, 1), ManifestError::Checksum);
        for length in 0..bytes.len() {
            assert!(Manifest::from_bytes(&bytes[..length]).is_err(), "{length}");
        }
        let longer = [&bytes[..], &[0; 8]].concat();
        assert_eq!(Manifest::from_bytes(&longer), Err(ManifestError::Length(longer.len())));
    }
}
