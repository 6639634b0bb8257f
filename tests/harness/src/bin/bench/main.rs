//! Lair beside what does the same work, in one run. Started by `tests/bench`, which installs and builds what this needs.

mod backends;
mod boot;
mod change;
mod chart;
mod floors;
mod gates;
mod guest;
mod measure;
mod operation;
mod report;
mod results;
mod statistics;
mod turns;

use anyhow::{Context, Result};
use backends::Files;
use clap::{Parser, Subcommand};
use floors::Floors;
use lair_harness::{
    frontend::queue::Wait,
    tree::{Scale, Tree},
};
use measure::{Effort, Round};
use operation::Operation;
use results::{BackendFacts, HostFacts, Results, WholeRow};
use statistics::median;
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

/// Measures Lair beside what does the same work, in one run.
#[derive(Debug, Parser)]
#[command(name = "tests/bench", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The store backend beside virtiofsd: the same requests, on the same tree, through the same frontend
    Virtiofs(Virtiofs),
    /// Two builds of the store backend, the one before a change and the one after it, one request at a time and in turn
    Change(change::Arguments),
    /// The start of a VM by laird beside the same programs started by hand; laird's memory and CPU with 1, 10 and 100 VMs
    Boot(boot::Arguments),
    /// A program of a VM, as far as laird can tell
    #[command(hide = true)]
    StandIn(boot::stand_in::Arguments),
}

#[derive(Debug, clap::Args)]
struct Virtiofs {
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// Less of everything: for a glance, not for publishing
    #[arg(long)]
    quick: bool,
    /// Boot no guest: only what the frontend measures
    #[arg(long)]
    no_guest: bool,
    /// Only what is measured in a guest
    #[arg(long, conflicts_with = "no_guest")]
    only_guest: bool,
    /// Also write virtiofs.json, and charts as SVG, into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where the store that is measured is kept
    #[arg(long, value_name = "DIR", env = "LAIR_BENCH_CACHE", hide = true)]
    cache: PathBuf,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().bench {
        Bench::Virtiofs(arguments) => virtiofs(&arguments),
        Bench::Change(arguments) => change::run(&arguments),
        Bench::Boot(arguments) => boot::boot(&arguments),
        Bench::StandIn(arguments) => boot::stand_in::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tests/bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Some 140,000 inodes.
const SCALE: Scale = Scale { store_paths: 1000, large: 64 << 20 };

/// A line on stderr before something that takes long.
fn note(text: &str) {
    eprintln!("--- {text}");
}

fn virtiofs(arguments: &Virtiofs) -> Result<()> {
    let effort = if arguments.quick {
        Effort { rounds: 2, seconds: 0.04, starts: 3 }
    } else {
        Effort { rounds: 9, seconds: 0.15, starts: 5 }
    };
    let mut results = Results::new(HostFacts::here(), effort);
    let directory = tempfile::Builder::new().prefix("lair-bench-").tempdir()?;
    if !arguments.only_guest {
        frontend(&mut results, &arguments.cache, directory.path())?;
    }
    if !arguments.no_guest {
        let rounds = if arguments.quick { 1 } else { 3 };
        results.guest = Some(guest::measure(&arguments.cache, directory.path(), rounds)?);
    }
    results.gates = gates::gates(&results);

    if let Some(out) = &arguments.out {
        write_out(&results, out)?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        for line in report::tables(&results).lines() {
            println!("{}", line.trim_end());
        }
    }
    Ok(())
}

/// Makes sure that the store that is measured is there.
fn store(cache: &Path) -> Result<(Tree, Files)> {
    let tree = Tree::new(SCALE);
    let files = Files { store: cache.join("store"), view: cache.join("view"), index: cache.join("index") };
    note(&format!("the store of {} inodes in {}", tree.entries.len(), files.store.display()));
    let begin = Instant::now();
    if tree.write(&files.store)? {
        note(&format!("written in {:.1} s", begin.elapsed().as_secs_f64()));
    }
    fs::write(&files.view, tree.view())?;
    Ok((tree, files))
}

/// Measures all backends through the frontend.
fn frontend(results: &mut Results, cache: &Path, directory: &Path) -> Result<()> {
    let effort = results.effort;
    let (tree, files) = store(cache)?;
    let store = &files.store;
    let backends = backends::all(&files)?;

    (results.store_paths, results.inodes) = (tree.names.len(), tree.entries.len());
    let floors = Floors::new(&tree, store)?;
    let mut turns = Vec::new();
    let mut rounds: Vec<Vec<Round>> = backends.iter().map(|_| Vec::new()).collect();
    let mut starts: Vec<Vec<u64>> = backends.iter().map(|_| Vec::new()).collect();
    for number in 1..=effort.rounds {
        note(&format!("round {number} of {}: one request at a time, in turn", effort.rounds));
        turns.push(turns::round(&backends, &Operation::ALL, &floors, &tree, directory, &effort)?);
        for (backend, rounds) in backends.iter().zip(&mut rounds) {
            note(&format!("round {number} of {}: {}", effort.rounds, backend.name));
            let round = measure::round(backend, &tree, store, directory, &effort);
            rounds.push(round.with_context(|| format!("{} cannot be measured", backend.name))?);
        }
        for _ in 0..effort.starts {
            for (backend, starts) in backends.iter().zip(&mut starts) {
                starts.push(measure::start(backend, directory)?);
            }
        }
    }
    results.put_turns(&backends, &turns);
    for ((backend, rounds), starts) in backends.iter().zip(&rounds).zip(starts) {
        note(&format!("{}: memory after a walk, then idle", backend.name));
        let (inodes_walked, memory) = measure::memory(backend, directory)?;
        results.backends.push(BackendFacts { name: backend.name, command: backend.command_line() });
        results.throughput.extend(results::throughput(backend, rounds));
        results.sequential.extend(results::sequential(backend, rounds));
        results.whole.push(WholeRow {
            backend: backend.name,
            inodes_walked,
            memory,
            start_ns: median(starts),
            idle_seconds: measure::IDLE.as_secs_f64(),
            idle_cpu_ns: measure::idle(backend, directory)?,
            paced_cpu_ns: median(rounds.iter().map(|round| round.paced_cpu).collect()),
        });
    }
    Ok(())
}

fn write_out(results: &Results, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("Cannot make {}", out.display()))?;
    fs::write(out.join("virtiofs.json"), serde_json::to_string_pretty(results)? + "\n")?;
    for wait in [Wait::Polling, Wait::Sleeping] {
        let svg = chart::latency(results, wait)?;
        if !svg.is_empty() {
            fs::write(out.join(format!("virtiofs-{}.svg", results::wait_key(wait))), svg)?;
        }
    }
    Ok(())
}
