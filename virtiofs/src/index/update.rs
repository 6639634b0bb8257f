//! Bringing an index up to date: what `lair-virtiofs index` does.
//!
//! One run writes one pack with all manifests that are missing, stale or damaged, and then tells of them in the registry. A run
//! that is killed leaves a file that the next one removes, or a pack of which nobody knows.

use super::{
    Identity, Index, IndexError, Manifest,
    build::{build, find},
    directory::{Directory, FileError},
    merge::{Live, pack_numbers},
    pack::{self, Given, Pack, Place},
    reader::Found,
    registry::{Known, Record, Registry},
    slot::{REGISTRY_MAX, ino_range},
};
use crate::store::StorePath;
use std::{
    num::NonZero,
    os::fd::AsFd,
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};
use thiserror::Error;

/// Why an index could not be brought up to date. What was in it is still there.
#[derive(Debug, Error)]
pub enum UpdateError {
    /// A file of it cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// All numbers have been given.
    #[error("The index has given all slots, inode numbers or pack numbers; only a new one has more")]
    Full,
    /// No thread could be started.
    #[error("Cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// What a run did.
#[derive(Debug, Default)]
pub struct Summary {
    /// Store paths that are indexed now, out of those asked for.
    pub paths: usize,
    /// How many of them were so before.
    pub present: usize,
    /// Their inodes.
    pub inodes: u64,
    /// Bytes of their manifests.
    pub bytes: u64,
    /// Bytes of the registry that are no sound records. They are skipped.
    pub damaged: usize,
    /// The store paths that could not be read.
    pub failed: Vec<IndexError>,
}

impl Summary {
    fn count(&mut self, manifest: &Manifest) {
        self.paths = self.paths.saturating_add(1);
        self.inodes = self.inodes.saturating_add(u64::from(manifest.inodes()));
        self.bytes = self.bytes.saturating_add(manifest.as_bytes().len() as u64);
    }
}

/// Makes the index in the directory `index` have all of `paths`, each from the first of the store directories that has it. Waits
/// for other runs. `jobs` threads read; `progress` is told how many of how many paths have been read.
pub fn update<D: AsFd + Sync>(
    index: &Path,
    stores: &[D],
    paths: &[StorePath],
    jobs: NonZero<usize>,
    progress: impl Fn(usize, usize),
) -> Result<Summary, UpdateError> {
    let directory = Directory::create(index)?;
    let lock = directory.lock()?;
    directory.clean(&lock)?;
    let (mut registry, bytes) = Registry::open(&directory, &lock)?;
    let (known, scan) = Known::of(paths, &bytes);
    let mut summary = Summary { damaged: scan.damaged, ..Summary::default() };
    let reader = Index::open(index)?;

    let mut todo = Vec::new();
    for path in paths {
        match find(stores, path) {
            Err(error) => summary.failed.push(error),
            Ok((source, identity)) => match reader.find(&known, path, identity) {
                Found::Sound { manifest, .. } => {
                    summary.present = summary.present.saturating_add(1);
                    summary.count(&manifest);
                }
                _ => todo.extend(stores.get(source).map(|store| (path, store))),
            },
        }
    }

    let (mut given, next_pack) = given(&directory, scan.given, scan.last_pack)?;
    let mut pack: Option<pack::Writer<'_>> = None;
    // In the order of `todo`, so that slots do not depend on which thread was faster.
    let mut read: Vec<Option<Read>> = Vec::new();
    read.resize_with(todo.len(), || None);
    let mut done: usize = 0;
    for_each_manifest(&todo, jobs, |position, result| {
        done = done.saturating_add(1);
        progress(done, todo.len());
        let (manifest, identity) = match result {
            Ok(built) => built,
            Err(error) => {
                summary.failed.push(error);
                return Ok(());
            }
        };
        let Some(&(path, _)) = todo.get(position) else { return Ok(()) };
        summary.count(&manifest);
        // The same contents keep their slot, and their place unless that is what is damaged.
        let before = known.records(path).find(|record| is_of(record, &manifest));
        let place = match before.filter(|record| reader.manifest(record).is_some()) {
            Some(record) => record.place,
            None => match &mut pack {
                Some(pack) => pack.append(&manifest)?,
                None => {
                    let number = next_pack.ok_or(UpdateError::Full)?;
                    pack.insert(pack::Writer::create(&directory, number)?).append(&manifest)?
                }
            },
        };
        if let Some(slot) = read.get_mut(position) {
            *slot = Some(Read {
                place,
                identity,
                checksum: manifest.checksum(),
                inodes: manifest.len(),
                numbers: before.map(|record| (record.slot, record.first_ino)),
            });
        }
        Ok(())
    })?;

    let mut records = Vec::new();
    for (read, (path, _)) in read.into_iter().zip(&todo) {
        let Some(read) = read else { continue };
        let (slot, first_ino) = match read.numbers {
            Some(numbers) => numbers,
            None => give(&mut given, read.inodes).ok_or(UpdateError::Full)?,
        };
        let Read { place, identity, checksum, inodes, .. } = read;
        records.extend(Record { slot, place, manifest: checksum, first_ino, inodes, identity }.encode(path));
    }
    let Some(mut pack) = pack else {
        if !records.is_empty() {
            registry.append(&records)?;
        }
        return Ok(summary);
    };
    // Before the new ones: of two records of the same store path, the later one counts.
    let mut all = Live::of(&bytes).merge(&directory, &reader, &mut pack)?;
    all.append(&mut records);
    let number = pack.number();
    pack.finish(given)?;
    registry.append(&all)?;
    Live::of(&[bytes, all].concat()).remove_others(&directory, number);
    Ok(summary)
}

/// What becomes a record.
struct Read {
    place: Place,
    identity: Identity,
    checksum: u64,
    inodes: u32,
    /// Slot and first inode number, if they were given before.
    numbers: Option<(u32, u64)>,
}

fn is_of(record: &Record, manifest: &Manifest) -> bool {
    record.manifest == manifest.checksum()
        && record.place.length == manifest.as_bytes().len() as u64
        && record.inodes == manifest.len()
}

/// What has been given according to the registry and the packs, and the number of the next pack.
fn given(directory: &Directory, registry: Given, last_pack: u32) -> Result<(Given, Option<u32>), FileError> {
    let (mut given, mut last) = (registry, last_pack);
    for number in pack_numbers(directory)? {
        last = last.max(number);
        // One that is damaged says nothing.
        if let Ok(Some(pack)) = Pack::open(directory, number) {
            given.next_slot = given.next_slot.max(pack.given.next_slot);
            given.next_ino = given.next_ino.max(pack.given.next_ino);
        }
    }
    Ok((given, last.checked_add(1)))
}

/// A slot, and inode numbers for `inodes` inodes, which nobody else gets.
fn give(given: &mut Given, inodes: u32) -> Option<(u32, u64)> {
    let slot = Some(given.next_slot).filter(|&slot| slot <= REGISTRY_MAX)?;
    let first_ino = ino_range(given.next_ino, inodes)?;
    given.next_slot = slot.checked_add(1)?;
    given.next_ino = first_ino.checked_add(u64::from(inodes))?;
    Some((slot, first_ino))
}

type Built = Result<(Manifest, Identity), IndexError>;

/// Reads the metadata of store paths in several threads, and hands each result to `each` as it comes, with its position.
fn for_each_manifest<D: AsFd + Sync>(
    todo: &[(&StorePath, &D)],
    jobs: NonZero<usize>,
    mut each: impl FnMut(usize, Built) -> Result<(), UpdateError>,
) -> Result<(), UpdateError> {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<(usize, Built)>(jobs.get());
        for _ in 0..jobs.get().min(todo.len()) {
            let (sender, next) = (sender.clone(), &next);
            let work = move || {
                loop {
                    let position = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(path, store)) = todo.get(position) else { return };
                    // When nobody listens any more, the run has failed.
                    if sender.send((position, build(store.as_fd(), path))).is_err() {
                        return;
                    }
                }
            };
            thread::Builder::new()
                .name("index".into())
                .spawn_scoped(scope, work)
                .map_err(UpdateError::Thread)?;
        }
        drop(sender);
        receiver.into_iter().try_for_each(|(position, built)| each(position, built))
    })
}
