//! What no backend can be faster than: round trips to devices of no use, each round with new threads, as backends have new processes.

use crate::{
    operation::{self, Operation},
    results::{FloorRow, LateRow, Results, wait_key},
    statistics::median,
};
use anyhow::Result;
use lair_harness::{
    clock,
    frontend::{
        echo::{Device, round_trip},
        known::Known,
        queue::Wait,
        request::Request,
    },
    tree::Tree,
};
use std::{collections::BTreeMap, path::Path, time::Duration};

/// How late answers are, in nanoseconds.
const LATE: [u64; 8] = [0, 50, 100, 150, 200, 300, 400, 600];

/// Medians of each round, in nanoseconds.
pub(crate) struct Floors {
    known: Known,
    /// What a backend is asked as well.
    requests: BTreeMap<Operation, Vec<Request>>,
    own: BTreeMap<&'static str, Vec<u64>>,
    knowing: BTreeMap<(&'static str, &'static str), Vec<u64>>,
    late: BTreeMap<u64, Vec<u64>>,
}

impl Floors {
    /// Learns the tree that is in `store`.
    pub(crate) fn new(tree: &Tree, store: &Path) -> Result<Self> {
        let mut known = Known::default();
        let mut requests = BTreeMap::new();
        for operation in Operation::ALL {
            if let Some(those) = operation::known(operation, tree, store, &mut known)? {
                requests.insert(operation, those);
            }
        }
        let (own, knowing, late) = Default::default();
        Ok(Self { known, requests, own, knowing, late })
    }

    /// Measures all of them, with so many round trips each.
    pub(crate) fn round(&mut self, count: usize) -> Result<()> {
        let lookup = [Request::lookup(1, b"name")];
        for wait in [Wait::Polling, Wait::Sleeping] {
            let own = round_trip(Device::Empty, &lookup, wait, count)?;
            self.own.entry(wait_key(wait)).or_default().push(own);
            for (operation, requests) in &self.requests {
                // A few hundred ms each.
                let count = count / if *operation == Operation::Read1M { 20 } else { 2 };
                let knowing = round_trip(Device::Knowing(&self.known), requests, wait, count)?;
                self.knowing.entry((operation.key(), wait_key(wait))).or_default().push(knowing);
            }
        }
        for late in LATE {
            let device = Device::Late(Duration::from_nanos(late));
            self.late.entry(late).or_default().push(round_trip(device, &lookup, Wait::Sleeping, count / 4)?);
        }
        Ok(())
    }

    /// The medians of all rounds; of what shows a limit, the fastest round: a slow one says nothing of what cannot be.
    pub(crate) fn put_into(self, results: &mut Results) {
        let own = |wait| self.own.get(wait_key(wait)).cloned().map(median).unwrap_or_default();
        results.clock_ns = clock::cost().as_nanos() as u64;
        results.frontend_round_trip_ns = own(Wait::Polling);
        results.frontend_round_trip_sleeping_ns = own(Wait::Sleeping);
        let floor = |((operation, wait), rounds): (_, Vec<u64>)| {
            rounds.into_iter().min().map(|median_ns| FloorRow { operation, wait, median_ns })
        };
        results.floors = self.knowing.into_iter().filter_map(floor).collect();
        let late = |(late_ns, rounds)| LateRow { late_ns, median_ns: median(rounds) };
        results.late = self.late.into_iter().map(late).collect();
    }
}
