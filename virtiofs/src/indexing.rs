//! `lair-virtiofs index`.

use anyhow::{Context, Result, bail};
use lair_virtiofs::{
    arguments::Index as Args,
    error::chain,
    files::Files,
    index::{Summary, update},
    view::View,
};
use std::{
    cell::Cell,
    collections::HashSet,
    io::{IsTerminal, Write},
    num::NonZero,
    thread,
    time::{Duration, Instant},
};
use tracing::{error, warn};

/// Nothing is shown of what takes no longer.
const QUIET: Duration = Duration::from_secs(1);

/// Time between two updates of the progress line.
const REFRESH: Duration = Duration::from_millis(100);

/// How many failures are told one by one.
const TOLD: usize = 10;

pub(crate) fn run(args: &Args) -> Result<()> {
    let begin = Instant::now();
    let mut paths = Vec::new();
    let mut seen = HashSet::new();
    for file in &args.views {
        paths.extend(View::read(file)?.paths().iter().filter(|path| seen.insert((*path).clone())).cloned());
    }
    let files = Files::open_stores(&args.sources)?;
    let jobs = args.jobs.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZero::<usize>::MIN);
    let progress = Progress::new(begin);
    let summary = update(&args.index, files.stores(), &paths, jobs, |done, all| progress.show(done, all))
        .with_context(|| format!("Cannot bring the index {} up to date", args.index.display()))?;
    progress.clear();

    let seconds = begin.elapsed().as_secs_f64();
    if summary.damaged > 0 {
        warn!("{} bytes of the registry are damaged; what they told is indexed anew", summary.damaged);
    }
    for failed in summary.failed.iter().take(TOLD) {
        error!("{}", chain(failed));
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", json(&summary, seconds))?;
    } else {
        let Summary { paths, present, inodes, bytes, .. } = summary;
        writeln!(
            out,
            "{paths} store paths are indexed, {present} were before: {inodes} inodes, {bytes} bytes, {seconds:.2} s"
        )?;
    }
    if !summary.failed.is_empty() {
        bail!("{} of {} store paths are not indexed", summary.failed.len(), paths.len());
    }
    Ok(())
}

fn json(summary: &Summary, seconds: f64) -> serde_json::Value {
    let Summary { paths, present, inodes, bytes, damaged, failed } = summary;
    serde_json::json!({
        "paths": paths,
        "present": present,
        "inodes": inodes,
        "bytes": bytes,
        "seconds": seconds,
        "damaged_registry_bytes": damaged,
        "failed": failed.iter().map(|failed| chain(failed)).collect::<Vec<_>>(),
    })
}

/// A line on the terminal that tells how far it is.
struct Progress {
    next: Cell<Option<Instant>>,
    shown: Cell<bool>,
}

impl Progress {
    fn new(begin: Instant) -> Self {
        let next = std::io::stderr().is_terminal().then(|| begin + QUIET);
        Self { next: Cell::new(next), shown: Cell::new(false) }
    }

    fn show(&self, done: usize, all: usize) {
        let now = Instant::now();
        if self.next.get().is_some_and(|next| now >= next) {
            self.next.set(Some(now + REFRESH));
            self.shown.set(true);
            eprint!("\r\x1b[KRead {done} of {all} store paths");
        }
    }

    fn clear(&self) {
        if self.shown.get() {
            eprint!("\r\x1b[K");
        }
    }
}
