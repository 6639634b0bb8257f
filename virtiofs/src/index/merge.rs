//! Keeping packs few: each run writes one, and a backend maps each that it needs.
//!
//! When there are many small ones, the run that writes the next one moves what they hold into it. Packs that no record needs any
//! more are then removed; backends that have mapped them keep them as long as they run, and one that has just read the registry
//! reads it again.

use super::{
    Identity, Index,
    directory::{Directory, FileError},
    pack::{self, Writer},
    registry::{Record, scan},
};
use crate::store::StorePath;
use nix::fcntl::OFlag;
use std::collections::{HashMap, HashSet};

/// How many small packs there may be.
const SMALL_PACKS: usize = 32;

/// A pack with fewer bytes is small.
const SMALL: u64 = 16 << 20;

/// The records that count: of each store path and identity the newest.
#[derive(Debug, Default)]
pub(super) struct Live(HashMap<(StorePath, Identity), Record>);

impl Live {
    pub(super) fn of(registry: &[u8]) -> Self {
        let mut live = Self::default();
        scan(registry, |name, record| {
            if let Ok(path) = StorePath::from_base_name(name) {
                live.0.insert((path, record.identity), record);
            }
        });
        live
    }

    /// Copies into `pack` what small packs hold, if there are too many of them. Returns the new records.
    pub(super) fn merge(
        &self,
        directory: &Directory,
        reader: &Index,
        pack: &mut Writer<'_>,
    ) -> Result<Vec<u8>, FileError> {
        let small = small_packs(directory)?;
        let mut records = Vec::new();
        if small.len() < SMALL_PACKS {
            return Ok(records);
        }
        let mut moving: Vec<_> =
            self.0.iter().filter(|(_, record)| small.contains(&record.place.pack)).collect();
        moving.sort_by_key(|(_, record)| (record.place.pack, record.place.offset));
        for ((path, _), record) in moving {
            // What is damaged stays where it is, until it is needed and read anew.
            if let Some(manifest) = reader.manifest(record) {
                records.extend(Record { place: pack.append(&manifest)?, ..*record }.encode(path));
            }
        }
        Ok(records)
    }

    /// Removes the packs before this one that no record needs. If that fails, the next run tries again.
    pub(super) fn remove_others(&self, directory: &Directory, before: u32) {
        let needed: HashSet<u32> = self.0.values().map(|record| record.place.pack).collect();
        for number in pack_numbers(directory).unwrap_or_default() {
            if number < before && !needed.contains(&number) {
                let _ = directory.remove(&pack::name(number));
            }
        }
    }
}

/// The numbers of all packs.
pub(super) fn pack_numbers(directory: &Directory) -> Result<Vec<u32>, FileError> {
    Ok(directory.names()?.iter().filter_map(|name| pack::number(name)).collect())
}

fn small_packs(directory: &Directory) -> Result<HashSet<u32>, FileError> {
    let is_small = |number: &u32| {
        let file = directory.file(&pack::name(*number), OFlag::O_RDONLY).ok().flatten();
        file.and_then(|file| file.metadata().ok()).is_some_and(|meta| meta.len() < SMALL)
    };
    Ok(pack_numbers(directory)?.into_iter().filter(is_small).collect())
}
