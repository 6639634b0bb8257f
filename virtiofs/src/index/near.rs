//! Store paths by their slot, which is what requests name them by.
//!
//! Of many store paths none is in a processor's cache when a guest asks for it, and each thing that has to be met before it is known where the
//! next one is costs as much as all else that an answer takes. So what finds an inode is here beside the entry that it is of, in one cache line.

#![allow(unsafe_code)] // A thing that refers to itself.

use super::{records::Records, tree::Entry};
use std::{mem::MaybeUninit, sync::Arc};

/// A store path, and its records.
#[derive(Debug, Clone)]
#[repr(align(64))]
pub(super) struct Near {
    /// Of `entry`, and not to be given out for longer than that lives. Always initialised: it is kept like this because a reference promises
    /// that what it refers to outlives the call to which it is passed, and these may go with the entry in such a call.
    records: MaybeUninit<Records<'static>>,
    entry: Arc<Entry>,
    slot: u32,
}

const _: () = assert!(size_of::<Option<Near>>() == 64);

impl Near {
    fn new(entry: Arc<Entry>) -> Self {
        let whole: *const Entry = &raw const *entry;
        // SAFETY: The entry is on the heap and stays where it is when `entry` is moved or cloned, for as long as any of these lives; and it never
        // changes, being shared. The records leave here with the lifetime of `self` only, which holds one of them.
        let whole: &'static Entry = unsafe { &*whole };
        Self { records: MaybeUninit::new(whole.manifest.records()), slot: entry.slot, entry }
    }

    #[inline(always)]
    pub(super) fn records(&self) -> Records<'_> {
        // SAFETY: `new` has initialised it, and `entry` lives as long as `self`.
        unsafe { self.records.assume_init() }
    }

    #[inline(always)]
    pub(super) fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// A hash table of store paths by their slot. Slots are the registry's choice, not the guest's.
#[derive(Debug, Clone, Default)]
pub(super) struct BySlot {
    /// None, or a power of two of them, of which at least half are empty. Each store path is where its slot says, or in the first cell behind
    /// that which was empty.
    cells: Vec<Option<Near>>,
    count: usize,
}

impl BySlot {
    /// The store path with this slot.
    #[inline(always)]
    pub(super) fn get(&self, slot: u32) -> Option<&Near> {
        // A loop, since the compiler puts what is chained into a function of its own.
        for at in places(slot, self.cells.len()) {
            match self.cells.get(at)? {
                Some(near) if near.slot == slot => return Some(near),
                Some(_) => {}
                None => return None,
            }
        }
        None
    }

    /// Makes room for so many more.
    pub(super) fn reserve(&mut self, more: usize) {
        let length = self.count.saturating_add(more).saturating_mul(2);
        if length > self.cells.len() {
            let cells = std::mem::replace(&mut self.cells, vec![None; length.next_power_of_two()]);
            cells.into_iter().flatten().for_each(|near| self.put(near));
        }
    }

    /// Adds a store path whose slot is not there yet.
    pub(super) fn insert(&mut self, entry: Arc<Entry>) {
        self.reserve(1);
        self.count = self.count.saturating_add(1);
        self.put(Near::new(entry));
    }

    fn put(&mut self, near: Near) {
        let empty = places(near.slot, self.cells.len()).find(|&at| matches!(self.cells.get(at), Some(None)));
        if let Some(cell) = empty.and_then(|at| self.cells.get_mut(at)) {
            *cell = Some(near);
        }
    }
}

impl FromIterator<Arc<Entry>> for BySlot {
    fn from_iter<T: IntoIterator<Item = Arc<Entry>>>(entries: T) -> Self {
        let entries = entries.into_iter();
        let mut all = Self::default();
        all.reserve(entries.size_hint().0);
        entries.for_each(|entry| all.insert(entry));
        all
    }
}

/// Where to look, in so many cells.
#[inline(always)]
fn places(slot: u32, length: usize) -> impl Iterator<Item = usize> {
    let mask = length.wrapping_sub(1);
    // An odd factor keeps neighbours apart; its upper half is what they differ in.
    let mixed = u64::from(slot).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let start = usize::try_from(mixed).unwrap_or_default();
    (0..length).map(move |step| start.wrapping_add(step) & mask)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)] // Small, chosen numbers.
mod tests {
    use super::*;
    use crate::{
        index::{Inode, Kind, manifest::Parts},
        store::StorePath,
    };

    fn entry(slot: u32) -> Arc<Entry> {
        let mut parts = Parts::default();
        parts.inodes.push(Inode::new(Kind::File { executable: false }, slot.into()));
        Arc::new(Entry {
            first_ino: 2,
            slot,
            position: 0,
            source: 0,
            path: StorePath::from_base_name(&format!("{}-{slot}", "0".repeat(32))).unwrap(),
            manifest: parts.finish().unwrap(),
        })
    }

    /// Slots in a row, as a registry gives them, and some that are far apart.
    #[test]
    fn each_is_found_with_its_own_records_and_no_other_is() {
        let slots: Vec<u32> = (1..=1000).chain((1..=100).map(|n| n << 24)).chain([u32::MAX]).collect();
        let mut all = BySlot::default();
        assert!(all.get(1).is_none());
        for (number, &slot) in slots.iter().enumerate() {
            all.insert(entry(slot));
            assert!(all.cells.len() >= 2 * (number + 1));
        }
        // What was there before still is when others are dropped.
        let other = all.clone();
        drop(all);
        for &slot in &slots {
            let near = other.get(slot).unwrap();
            assert_eq!((near.entry().slot, near.records().inode(0).unwrap().size()), (slot, slot.into()));
        }
        assert!([0, 1001, 1_000_000, u32::MAX - 1].iter().all(|&slot| other.get(slot).is_none()));
        let half: BySlot = slots.iter().filter(|&slot| slot % 2 == 0).map(|&slot| entry(slot)).collect();
        assert!(slots.iter().all(|&slot| half.get(slot).is_some() == (slot % 2 == 0)));
    }

    #[test]
    fn slots_in_a_row_are_found_at_once() {
        let all: BySlot = (1..=4000).map(entry).collect();
        let looks: usize = (1..=4000)
            .map(|slot| {
                let mut places = places(slot, all.cells.len());
                places.position(|at| all.cells[at].as_ref().is_some_and(|near| near.slot == slot)).unwrap()
                    + 1
            })
            .sum();
        assert!(looks < 2 * 4000, "{looks}");
        let longest = (4001..100_000)
            .map(|slot| places(slot, all.cells.len()).take_while(|&at| all.cells[at].is_some()).count())
            .max();
        assert!(longest < Some(64), "{longest:?}");
    }
}
