//! The registry: which store path has which slot, and where its manifest is.
//!
//! A file of records that only grows. A slot is given once and for all; a later record with the same slot says that the same
//! manifest is now somewhere else, or that the store path has another identity with the same contents. Each record has its own
//! checksum and begins with a mark, so damage costs the records that it hits and no others. A record that was cut short is at
//! the end, and the next program that writes takes it away.

use super::{
    Identity,
    directory::{Directory, FileError, Lock},
    pack::{Given, Place},
    slot::{FIRST_INO, REGISTRY_MAX},
};
use crate::store::StorePath;
use foldhash::fast::RandomState;
use nix::fcntl::OFlag;
use smallvec::SmallVec;
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
};
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The name of its file.
pub(super) const NAME: &str = "registry";

const MAGIC: [u8; 8] = *b"LairRegi";

/// The version of the format.
const VERSION: u32 = 1;

/// The largest registry that is read, in bytes: about seven million records.
const FILE_MAX: u64 = 1 << 30;

/// The beginning of the file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    reserved: u32,
}

const HEADER: usize = size_of::<Header>();

/// Begins a record. No name of a store path has such bytes.
const MARK: [u8; 8] = *b"\xffRecord\xff";

/// A record without its name, which follows and is filled up to 8 bytes with zeros.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fixed {
    mark: [u8; 8],
    /// XXH3 of all that follows this field.
    checksum: u64,
    slot: u32,
    pack: u32,
    offset: u64,
    length: u64,
    manifest: u64,
    first_ino: u64,
    ino: u64,
    ctime: i64,
    ctime_nsec: u32,
    inodes: u32,
    name_len: u32,
    filling: u32,
}

const FIXED: usize = size_of::<Fixed>();
const CHECKED: usize = 16;
const _: () = assert!(HEADER == 16 && FIXED == 88);

/// What is known of a store path with a certain identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) slot: u32,
    pub(super) place: Place,
    /// The manifest's checksum.
    pub(super) manifest: u64,
    pub(super) first_ino: u64,
    /// How many numbers of inodes the manifest has.
    pub(super) inodes: u32,
    pub(super) identity: Identity,
}

impl Record {
    pub(super) fn encode(&self, path: &StorePath) -> Vec<u8> {
        let name = path.base_name().as_bytes();
        let mut fixed = Fixed {
            mark: MARK,
            checksum: 0,
            slot: self.slot,
            pack: self.place.pack,
            offset: self.place.offset,
            length: self.place.length,
            manifest: self.manifest,
            first_ino: self.first_ino,
            ino: self.identity.ino,
            ctime: self.identity.ctime.0,
            ctime_nsec: self.identity.ctime.1,
            inodes: self.inodes,
            // A name has at most 244 bytes.
            name_len: u32::try_from(name.len()).unwrap_or_default(),
            filling: 0,
        };
        let mut bytes = [fixed.as_bytes(), name].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        fixed.checksum = checksum(&bytes);
        for (to, from) in bytes.iter_mut().zip(fixed.as_bytes()) {
            *to = *from;
        }
        bytes
    }

    /// The record at the beginning of `bytes`, whose it is, and its length.
    fn decode(bytes: &[u8]) -> Option<(Self, &str, usize)> {
        let (fixed, rest) = Fixed::read_from_prefix(bytes).ok()?;
        let name = rest.get(..usize::try_from(fixed.name_len).ok()?)?;
        let length = FIXED.checked_add(name.len())?.checked_next_multiple_of(8)?;
        if fixed.mark != MARK || checksum(bytes.get(..length)?) != fixed.checksum {
            return None;
        }
        if fixed.slot == 0 || fixed.slot > REGISTRY_MAX || fixed.inodes == 0 || fixed.first_ino < FIRST_INO {
            return None;
        }
        let record = Self {
            slot: fixed.slot,
            place: Place { pack: fixed.pack, offset: fixed.offset, length: fixed.length },
            manifest: fixed.manifest,
            first_ino: fixed.first_ino,
            inodes: fixed.inodes,
            identity: Identity { ino: fixed.ino, ctime: (fixed.ctime, fixed.ctime_nsec) },
        };
        Some((record, str::from_utf8(name).ok()?, length))
    }
}

fn checksum(record: &[u8]) -> u64 {
    XxHash3_64::oneshot(record.get(CHECKED..).unwrap_or_default())
}

/// What a registry says.
#[derive(Debug)]
pub(super) struct Scan {
    /// Where the last sound record ends. What is behind it is a record that was cut short.
    pub(super) end: usize,
    /// Bytes before that that are no sound record.
    pub(super) damaged: usize,
    /// What was given.
    pub(super) given: Given,
    /// The largest number of a pack.
    pub(super) last_pack: u32,
}

/// The bytes of the registry; `None` if there is none.
pub(super) fn read(directory: &Directory) -> Result<Option<Vec<u8>>, FileError> {
    let Some(file) = directory.file(NAME, OFlag::O_RDONLY)? else { return Ok(None) };
    let error = |e| directory.error("read", NAME, e);
    let path = || directory.path(NAME);
    let size = file.metadata().map_err(error)?.len();
    if size > FILE_MAX {
        return Err(FileError::TooLarge { path: path(), limit: FILE_MAX });
    }
    // It may grow meanwhile; what is added is not needed.
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default().saturating_add(1));
    file.take(size).read_to_end(&mut bytes).map_err(error)?;
    let (header, _) = Header::read_from_prefix(&bytes).map_err(|_| FileError::Magic { path: path() })?;
    if header.magic != MAGIC {
        return Err(FileError::Magic { path: path() });
    }
    if header.version != VERSION {
        return Err(FileError::Version { path: path(), version: header.version, known: VERSION });
    }
    Ok(Some(bytes))
}

/// Goes through the sound records, from the oldest to the newest.
pub(super) fn scan(registry: &[u8], mut each: impl FnMut(&str, Record)) -> Scan {
    let mut scan =
        Scan { end: HEADER, damaged: 0, given: Given { next_slot: 1, next_ino: FIRST_INO }, last_pack: 0 };
    let mut at = HEADER;
    while let Some((record, name, length)) = next(registry, &mut at) {
        scan.damaged = scan.damaged.saturating_add(at.saturating_sub(scan.end));
        at = at.saturating_add(length);
        scan.end = at;
        let given = &mut scan.given;
        given.next_slot = given.next_slot.max(record.slot.saturating_add(1));
        given.next_ino = given.next_ino.max(record.first_ino.saturating_add(u64::from(record.inodes)));
        scan.last_pack = scan.last_pack.max(record.place.pack);
        each(name, record);
    }
    scan
}

/// The next sound record, at or behind `at`, which is set to where it is.
fn next<'a>(registry: &'a [u8], at: &mut usize) -> Option<(Record, &'a str, usize)> {
    loop {
        let rest = registry.get(*at..).filter(|rest| !rest.is_empty())?;
        if rest.starts_with(&MARK)
            && let Some(found) = Record::decode(rest)
        {
            return Some(found);
        }
        *at = at.saturating_add(8);
    }
}

/// The records of some store paths, from the oldest to the newest. Most have one.
#[derive(Debug, Default)]
pub(super) struct Known<'a>(HashMap<&'a str, SmallVec<[Record; 1]>, RandomState>);

impl<'a> Known<'a> {
    /// What a registry says of these paths, and of itself.
    pub(super) fn of(paths: impl IntoIterator<Item = &'a StorePath>, registry: &[u8]) -> (Self, Scan) {
        let mut records: HashMap<&str, SmallVec<_>, _> =
            paths.into_iter().map(|path| (path.base_name(), SmallVec::new())).collect();
        let scan = scan(registry, |name, record| {
            if let Some(list) = records.get_mut(name) {
                list.push(record);
            }
        });
        (Self(records), scan)
    }

    /// From the newest to the oldest.
    pub(super) fn records(&self, path: &StorePath) -> impl Iterator<Item = &Record> {
        self.0.get(path.base_name()).map(SmallVec::as_slice).unwrap_or_default().iter().rev()
    }
}

/// A registry that is written to, with the lock held.
pub(super) struct Registry<'a> {
    directory: &'a Directory,
    file: File,
    /// Where the next record goes.
    end: u64,
}

impl<'a> Registry<'a> {
    /// Opens it, makes it if there is none, and takes away a record that was cut short. Returns what is in it as well.
    pub(super) fn open(directory: &'a Directory, _lock: &Lock) -> Result<(Self, Vec<u8>), FileError> {
        let error = |verb| move |e: io::Error| directory.error(verb, NAME, e);
        let mut bytes = match read(directory)? {
            Some(bytes) => bytes,
            None => {
                let header = Header { magic: MAGIC, version: VERSION, reserved: 0 };
                let mut file = directory.temporary(NAME)?;
                file.write_all(header.as_bytes()).map_err(error("write"))?;
                directory.publish(&file, NAME)?;
                header.as_bytes().to_vec()
            }
        };
        let file = directory.file(NAME, OFlag::O_RDWR)?;
        let file = file.ok_or_else(|| error("open")(io::ErrorKind::NotFound.into()))?;
        let end = scan(&bytes, |_, _| ()).end;
        if end < bytes.len() {
            file.set_len(end as u64).map_err(error("write"))?;
            bytes.truncate(end);
        }
        Ok((Self { directory, file, end: end as u64 }, bytes))
    }

    /// Adds records, for good.
    pub(super) fn append(&mut self, records: &[u8]) -> Result<(), FileError> {
        let error = |e| self.directory.error("write", NAME, e);
        self.file.write_all_at(records, self.end).map_err(error)?;
        self.file.sync_all().map_err(error)?;
        self.end = self.end.saturating_add(records.len() as u64);
        Ok(())
    }
}
