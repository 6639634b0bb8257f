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
    io::{self, BufWriter, Write},
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
    file: BufWriter<File>,
    at: u64,
    published: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn create(directory: &'a Directory, number: u32) -> Result<Self, FileError> {
        let name = name(number);
        let file = BufWriter::with_capacity(1 << 20, directory.temporary(&name)?);
        let mut writer = Self { directory, name, number, file, at: 0, published: false };
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
        self.file.flush().map_err(|e| self.error(e))?;
        self.file.get_ref().write_all_at(header.as_bytes(), 0).map_err(|e| self.error(e))?;
        self.directory.publish(self.file.get_ref(), &self.name)?;
        self.published = true;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(|e| self.error(e))?;
        self.at = self.at.saturating_add(bytes.len() as u64);
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
