//! Pack files: many manifests one after the other, each at a multiple of 64 bytes. Nothing in a pack says whose they are; the
//! registry does.

use super::{
    bytes::{Bytes, Map, Part},
    directory::{Directory, FileError},
    manifest::{Manifest, ManifestError},
};
use nix::fcntl::OFlag;
use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::Arc,
};
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"LairPack";

/// The version of the format.
const VERSION: u32 = 1;

/// Where manifests may begin.
const ALIGN: usize = 64;

/// The beginning of a pack.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    number: u32,
    /// XXH3 of the header's fields that follow.
    checksum: u64,
    /// Slots below this one, and inode numbers, had been given when the pack was written, or were given then. A registry that
    /// lost its end to damage so gives none of them again.
    next_slot: u32,
    reserved: u32,
    next_ino: u64,
    filling: [u64; 3],
}

const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == ALIGN);

impl Header {
    fn checksum(&self) -> u64 {
        XxHash3_64::oneshot(self.as_bytes().get(24..).unwrap_or_default())
    }
}

/// Where a manifest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pack: u32,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// What had been given when a pack was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) next_slot: u32,
    pub(super) next_ino: u64,
}

/// The name of a pack's file.
pub(super) fn name(number: u32) -> String {
    format!("pack-{number:08}")
}

/// The number in the name of a pack's file.
pub(super) fn number(file: &str) -> Option<u32> {
    file.strip_prefix("pack-")?.parse().ok().filter(|&n| name(n) == file)
}

/// A pack that is mapped.
#[derive(Debug, Clone)]
pub(super) struct Pack {
    map: Arc<Map>,
    pub(super) given: Given,
}

impl Pack {
    /// `None` if there is no such pack.
    pub(super) fn open(directory: &Directory, number: u32) -> Result<Option<Self>, FileError> {
        let name = name(number);
        let Some(file) = directory.file(&name, OFlag::O_RDONLY)? else { return Ok(None) };
        let map = Map::open(&file).map_err(|e| directory.error("map", &name, e))?;
        let magic = || FileError::Magic { path: directory.path(&name) };
        let (header, _) = Header::read_from_prefix(&map).map_err(|_| magic())?;
        if header.magic != MAGIC {
            return Err(magic());
        }
        if header.version != VERSION {
            let (path, version) = (directory.path(&name), header.version);
            return Err(FileError::Version { path, version, known: VERSION });
        }
        if header.number != number || header.checksum() != header.checksum {
            return Err(magic());
        }
        let given = Given { next_slot: header.next_slot, next_ino: header.next_ino };
        Ok(Some(Self { map: Arc::new(map), given }))
    }

    /// Whether a manifest of it is in use.
    pub(super) fn is_used(&self) -> bool {
        Arc::strong_count(&self.map) > 1
    }

    /// The manifest at this place, if it is sound.
    pub(super) fn manifest(&self, offset: u64, length: u64) -> Result<Manifest, ManifestError> {
        let part = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(ALIGN))
            .and_then(|offset| Some(offset..offset.checked_add(usize::try_from(length).ok()?)?))
            .and_then(|range| Part::of(self.map.clone(), range))
            .ok_or(ManifestError::Magic)?;
        Manifest::parse(Bytes::Mapped(part))
    }
}

/// Writes a pack.
pub(super) struct Writer<'a> {
    directory: &'a Directory,
    name: String,
    number: u32,
    file: File,
    /// What is not in the file yet.
    block: Vec<u8>,
    at: u64,
    published: bool,
}

/// How much is written at once: a huge page. The kernel keeps it in its cache as it comes, so that whoever maps it later meets one page and
/// not 512: a start with a pack of 9 MiB takes 440 page faults instead of 570, if the file system has such folios (ext4 since Linux 6.16, XFS since 5.18).
const BLOCK: usize = 2 << 20;

impl<'a> Writer<'a> {
    pub(super) fn create(directory: &'a Directory, number: u32) -> Result<Self, FileError> {
        let name = name(number);
        let file = directory.temporary(&name)?;
        let block = Vec::with_capacity(BLOCK);
        let mut writer = Self { directory, name, number, file, block, at: 0, published: false };
        // The header comes last.
        writer.write(&[0; HEADER])?;
        Ok(writer)
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn append(&mut self, manifest: &Manifest) -> Result<Place, FileError> {
        let bytes = manifest.as_bytes();
        let place = Place { pack: self.number, offset: self.at, length: bytes.len() as u64 };
        self.write(bytes)?;
        let filling = bytes.len().next_multiple_of(ALIGN).saturating_sub(bytes.len());
        self.write([0; ALIGN].get(..filling).unwrap_or_default())?;
        Ok(place)
    }

    /// Completes the pack, for good.
    pub(super) fn finish(mut self, given: Given) -> Result<(), FileError> {
        let mut header = Header {
            magic: MAGIC,
            version: VERSION,
            number: self.number,
            checksum: 0,
            next_slot: given.next_slot,
            reserved: 0,
            next_ino: given.next_ino,
            filling: [0; 3],
        };
        header.checksum = header.checksum();
        self.flush()?;
        self.file.write_all_at(header.as_bytes(), 0).map_err(|e| self.error(e))?;
        self.directory.publish(&self.file, &self.name)?;
        self.published = true;
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), FileError> {
        self.at = self.at.saturating_add(bytes.len() as u64);
        while !bytes.is_empty() {
            let room = BLOCK.saturating_sub(self.block.len());
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.extend_from_slice(now);
            if self.block.len() >= BLOCK {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), FileError> {
        self.file.write_all(&self.block).map_err(|e| self.error(e))?;
        self.block.clear();
        Ok(())
    }

    fn error(&self, source: io::Error) -> FileError {
        self.directory.error("write", &self.name, source)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if !self.published {
            self.directory.discard(&self.name);
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)] // Small, chosen numbers.
mod tests {
    use super::*;
    use crate::index::{
        inode::{Inode, Kind},
        manifest::Parts,
    };
    use std::fs;

    /// Some end in mid-block, one is longer than a block, and one ends where a block does.
    #[test]
    fn manifests_are_whole_wherever_blocks_end() {
        let manifest = |byte: u8, targets: usize| {
            let mut parts = Parts::default();
            parts.inodes.push(Inode::new(Kind::Symlink, targets as u64));
            parts.targets.resize(targets, byte);
            parts.finish().unwrap()
        };
        // Behind a header of 32 bytes, and an inode of 32.
        let lengths = [700_000, BLOCK - HEADER - 700_096 - 64, 2 * BLOCK + 8, 8];
        let manifests: Vec<_> = (1..).zip(lengths).map(|(byte, length)| manifest(byte, length)).collect();
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap();
        let mut writer = Writer::create(&directory, 7).unwrap();
        let mut places = Vec::new();
        for manifest in &manifests {
            places.push(writer.append(manifest).unwrap());
        }
        assert_eq!(places[2].offset, BLOCK as u64);
        let given = Given { next_slot: 5, next_ino: 50 };
        writer.finish(given).unwrap();
        let pack = Pack::open(&directory, 7).unwrap().unwrap();
        assert_eq!((pack.given.next_slot, pack.given.next_ino), (5, 50));
        for (manifest, place) in manifests.iter().zip(&places) {
            assert!(pack.manifest(place.offset, place.length).unwrap() == *manifest, "{place:?}");
        }
        let last = places[3];
        let end = (last.offset + last.length).next_multiple_of(ALIGN as u64);
        assert_eq!(fs::metadata(place.path().join(name(7))).unwrap().len(), end);
    }
}
