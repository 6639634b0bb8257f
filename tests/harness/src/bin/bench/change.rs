//! What a change of Lair's backend does to the time that requests take.

use crate::{
    backends::{OURS, ours, programs},
    floors::{Floor, Floors},
    measure::Effort,
    note,
    operation::Operation,
    report::table,
    results::wait_key,
    statistics::{median, ratios},
    store,
    turns::{self, Contender, Latencies},
};
use anyhow::Result;
use lair_harness::frontend::queue::Wait;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The directory of the programs before the change: a copy of target/lto/lair-virtiofs
    #[arg(long, value_name = "DIR")]
    before: PathBuf,
    /// An operation to measure; may be repeated
    #[arg(long, value_name = "OPERATION", value_parser = Operation::parse, default_values = ["lookup", "getattr", "read_4k", "read_128k"])]
    operation: Vec<Operation>,
    /// Times that everything is started anew
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Milliseconds for each figure, in each round
    #[arg(long, value_name = "MS", default_value_t = 250, value_parser = clap::value_parser!(u16).range(1..))]
    time: u16,
    /// Where the store that is measured is kept
    #[arg(long, value_name = "DIR", env = "LAIR_BENCH_CACHE", hide = true)]
    cache: PathBuf,
}

const BEFORE: &str = "before";

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let (tree, mut files) = store(&arguments.cache)?;
    let directory = tempfile::Builder::new().prefix("lair-bench-").tempdir()?;
    // Indexes of their own, made alike: of the same version or not, and where things are in them decides what is measured.
    files.index = directory.path().join("index-after");
    let after = ours(OURS, &programs()?, &files)?;
    files.index = directory.path().join("index-before");
    let before = ours(BEFORE, &arguments.before, &files)?;
    let floors = Floors::new(&tree, &files.store)?;
    let rounds = usize::from(arguments.rounds);
    let effort = Effort { rounds, seconds: f64::from(arguments.time) / 1e3, starts: 0 };
    let mut rounds = Vec::new();
    for number in 1..=effort.rounds {
        note(&format!("round {number} of {}", effort.rounds));
        // Each is the first one as often as the other.
        let mut backends = [before.clone(), after.clone()];
        backends.rotate_left(number % 2);
        rounds.push(turns::round(
            &backends,
            &arguments.operation,
            &floors,
            &tree,
            directory.path(),
            &effort,
        )?);
    }
    println!("{}", report(&arguments.operation, &rounds));
    Ok(())
}

/// A line for each operation and way of waiting.
fn report(operations: &[Operation], rounds: &[Latencies]) -> String {
    let mut table = table(&["", "BEFORE", "AFTER", "AFTER/BEFORE", "SLEPT", "THEN", "KNOWING ALL"]);
    let us = |values: &[u64]| format!("{:.3}", median(values.to_vec()) as f64 / 1e3);
    for wait in [Wait::Polling, Wait::Sleeping] {
        for &operation in operations {
            let of = |contender, field: fn(&turns::Latency) -> u64| -> Vec<u64> {
                let rows = rounds.iter().filter_map(|round| round.get(&(contender, operation, wait)));
                rows.map(field).collect()
            };
            let [before, after] = [BEFORE, OURS].map(Contender::Backend);
            let [was, is, knowing] = [before, after, Contender::Floor(Floor::Knowing)]
                .map(|who| of(who, |latency| latency.median));
            let slept = |who| format!("{} %", median(of(who, |latency| latency.slept)));
            let ratio = ratios(&is, &was);
            table.add_row([
                format!("{}, {}", operation.title(), wait_key(wait)),
                us(&was),
                us(&is),
                format!("{:.3} ({:.3} to {:.3})", ratio.median, ratio.p10, ratio.p90),
                slept(before),
                slept(after),
                if knowing.is_empty() { "-".into() } else { us(&knowing) },
            ]);
        }
    }
    format!("One at a time: us, medians of {} rounds; how often the frontend slept\n{table}", rounds.len())
}
