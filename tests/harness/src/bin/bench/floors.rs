//! What no backend can be faster than: devices of no use behind the same frontend.

use crate::operation::{self, Operation};
use anyhow::Result;
use lair_harness::{
    frontend::{
        echo::{Device, Loopback},
        known::Known,
        queue::Wait,
        request::Request,
    },
    tree::Tree,
};
use std::{collections::BTreeMap, path::Path, time::Duration};

/// How late answers are, in nanoseconds.
pub(crate) const LATE: [u64; 8] = [0, 50, 100, 150, 200, 300, 400, 600];

/// A device of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Floor {
    /// Answers at once: what the frontend itself takes.
    Empty,
    /// Has each answer ready.
    Knowing,
    /// Answers so many nanoseconds later than at once.
    Late(u64),
}

/// The devices of one round, with queues of their own, as backends have new processes.
pub(crate) type Loopbacks<'a> = BTreeMap<Floor, Loopback<'a>>;

/// What they are asked, and what one of them knows.
pub(crate) struct Floors {
    known: Known,
    /// What a backend is asked as well.
    requests: BTreeMap<Operation, Vec<Request>>,
}

impl Floors {
    /// Learns the tree that is in `store`.
    pub(crate) fn new(tree: &Tree, store: &Path) -> Result<Self> {
        let mut known = Known::default();
        // All of it: with nothing but what is asked, all answers would be in the processor's caches, also where a backend's are not.
        for entry in tree.entries.iter().filter(|entry| entry.split().is_some()) {
            known.learn(entry)?;
        }
        let mut requests = BTreeMap::new();
        for operation in Operation::ALL {
            if let Some(those) = operation::known(operation, tree, store, &mut known)? {
                requests.insert(operation, those);
            }
        }
        Ok(Self { known, requests })
    }

    pub(crate) fn loopbacks(&self) -> Result<Loopbacks<'_>> {
        let late = LATE.map(|late| (Floor::Late(late), Device::Late(Duration::from_nanos(late))));
        [(Floor::Empty, Device::Empty), (Floor::Knowing, Device::Knowing(&self.known))]
            .into_iter()
            .chain(late)
            .map(|(floor, device)| Ok((floor, Loopback::new(device)?)))
            .collect()
    }

    /// The devices that show something of an operation, and what they are asked then.
    pub(crate) fn of(&self, operation: Operation, wait: Wait) -> (Vec<Floor>, &[Request]) {
        let Some(requests) = self.requests.get(&operation) else { return (vec![], &[]) };
        let mut floors = vec![Floor::Knowing];
        // All requests are alike to the others.
        if operation == Operation::Lookup {
            floors.push(Floor::Empty);
            if wait == Wait::Sleeping {
                floors.extend(LATE.map(Floor::Late));
            }
        }
        (floors, requests)
    }
}
