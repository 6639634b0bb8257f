//! One request at a time: all backends and devices of no use in turn, within a fraction of a second. A machine that is now faster and now
//! slower is so for all of them, and only what was measured in the same round is compared.

use crate::{
    backends::{Backend, Running},
    floors::{Floor, Floors, Loopbacks},
    measure::Effort,
    operation::{Nodes, Operation, Work},
    statistics::quantile,
};
use anyhow::{Context, Result, ensure};
use lair_harness::{
    clock,
    frontend::{
        layout::{PAGE, Shape},
        queue::Wait,
        session::Session,
    },
    tree::Tree,
};
use nix::sys::resource::{UsageWho, getrusage};
use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

/// How long a turn is, behind the part that is not measured.
const TURN: Duration = Duration::from_millis(25);

/// How long the part before that may be.
const WARM_UP_MAX: Duration = Duration::from_millis(50);

/// Operations in a turn that are not timed.
const RISE: usize = 8;

const WAITS: [Wait; 2] = [Wait::Polling, Wait::Sleeping];

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    /// By name.
    Backend(&'static str),
    Floor(Floor),
}

/// What an operation takes, one at a time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Latency {
    pub(crate) median: u64,
    pub(crate) p99: u64,
    /// CPU time of the backend for one operation, nanoseconds.
    pub(crate) cpu: u64,
    /// Requests for a hundred operations.
    pub(crate) messages: u64,
    /// How many times the frontend has slept in a hundred operations.
    pub(crate) slept: u64,
}

/// What all of them took in one round.
pub(crate) type Latencies = BTreeMap<(Contender, Operation, Wait), Latency>;

/// A backend that runs, and what it is asked.
struct Mounted {
    name: &'static str,
    running: Running,
    session: Session,
    works: BTreeMap<Operation, Work>,
}

impl Mounted {
    fn new(backend: &Backend, operations: &[Operation], tree: &Tree, directory: &Path) -> Result<Self> {
        let shape = Shape { queues: 1, depth: 1, pages: (1 << 20) / PAGE };
        let (running, mut queues) = backend.start(directory, shape)?;
        let mut session = Session::mount(queues.pop().context("no queue")?)?;
        let mut nodes = Nodes::default();
        let works = operations
            .iter()
            .map(|&operation| Ok((operation, Work::prepare(operation, tree, &mut session, &mut nodes)?)))
            .collect::<Result<_>>()
            .with_context(|| format!("{} cannot be measured", backend.name))?;
        Ok(Self { name: backend.name, running, session, works })
    }
}

/// What one contender took of one operation so far.
struct Seat {
    contender: Contender,
    wait: Wait,
    times: Vec<u64>,
    /// The number of the next request.
    next: usize,
    /// Operations, and requests for them, but for those of the warm-up.
    done: u64,
    messages: u64,
    /// How many times this thread has waited for something.
    slept: u64,
    /// CPU time of the backend.
    cpu: Duration,
}

/// How many times this thread has waited for something so far.
fn slept() -> Result<u64> {
    Ok(getrusage(UsageWho::RUSAGE_THREAD)?.voluntary_context_switches().cast_unsigned())
}

impl Seat {
    fn new(contender: Contender, wait: Wait) -> Self {
        Self {
            contender,
            wait,
            times: Vec::new(),
            next: 0,
            done: 0,
            messages: 0,
            slept: 0,
            cpu: Duration::ZERO,
        }
    }

    /// The beginning of a turn: once through all `requests`, as far as there is time for that, so that nothing is seen for the first time and what
    /// others have pushed out of the caches is back. `once` does the operation with the request of a number.
    fn warm_up(&mut self, requests: usize, mut once: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let until = Instant::now() + WARM_UP_MAX;
        for _ in 0..requests {
            once(self.next)?;
            self.next += 1;
            if Instant::now() > until {
                break;
            }
        }
        Ok(())
    }

    /// The rest of it: as often as there is time for.
    fn measure(&mut self, turn: Duration, mut once: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let clock = clock::cost();
        let (begin, slept_before) = (self.next, slept()?);
        // Since the warm-up the backend may have gone to sleep.
        for _ in 0..RISE {
            once(self.next)?;
            self.next += 1;
        }
        // Between two requests the clock is read once, which is no part of either.
        let mut last = Instant::now();
        let until = last + turn;
        while last < until {
            once(self.next)?;
            self.next += 1;
            let now = Instant::now();
            self.times.push((now - last).saturating_sub(clock).as_nanos() as u64);
            last = now;
        }
        self.slept += slept()? - slept_before;
        self.done += (self.next - begin) as u64;
        Ok(())
    }

    fn latency(mut self) -> Result<Latency> {
        if self.messages == 0 {
            return Ok(Latency::default());
        }
        ensure!(!self.times.is_empty(), "no time to measure in");
        let count = self.done;
        Ok(Latency {
            median: quantile(&mut self.times, 0.5),
            p99: quantile(&mut self.times, 0.99),
            cpu: self.cpu.as_nanos() as u64 / count,
            messages: self.messages * 100 / count,
            slept: self.slept * 100 / count,
        })
    }
}

/// One round of turns.
pub(crate) fn round(
    backends: &[Backend],
    operations: &[Operation],
    floors: &Floors,
    tree: &Tree,
    directory: &Path,
    effort: &Effort,
) -> Result<Latencies> {
    let mut mounted = backends
        .iter()
        .map(|backend| Mounted::new(backend, operations, tree, directory))
        .collect::<Result<Vec<_>>>()?;
    let mut loopbacks = floors.loopbacks()?;
    let mut latencies = Latencies::new();
    for &operation in operations {
        let mut seats = Vec::new();
        for wait in WAITS {
            let names = backends.iter().map(|backend| Contender::Backend(backend.name));
            let (devices, _) = floors.of(operation, wait);
            let contenders = names.chain(devices.into_iter().map(Contender::Floor));
            seats.extend(contenders.map(|contender| Seat::new(contender, wait)));
        }
        let turn = TURN.min(effort.budget());
        let turns = effort.budget().as_nanos().div_ceil(turn.as_nanos());
        for _ in 0..turns {
            for seat in &mut seats {
                match seat.contender {
                    Contender::Backend(name) => {
                        let found = mounted.iter_mut().find(|mounted| mounted.name == name);
                        backend_turn(seat, operation, turn, found.context("no such backend")?)
                            .with_context(|| format!("{name} cannot be measured"))?;
                    }
                    Contender::Floor(floor) => {
                        floor_turn(seat, operation, turn, floor, floors, &mut loopbacks)?
                    }
                }
            }
        }
        for seat in seats {
            latencies.insert((seat.contender, operation, seat.wait), seat.latency()?);
        }
    }
    mounted.into_iter().try_for_each(|mounted| mounted.running.stop())?;
    Ok(latencies)
}

fn backend_turn(seat: &mut Seat, operation: Operation, turn: Duration, backend: &mut Mounted) -> Result<()> {
    let Mounted { running, session, works, .. } = backend;
    let work = works.get(&operation).context("no such operation")?;
    session.queue.set_wait(seat.wait);
    let messages = session.messages;
    seat.warm_up(work.requests.len(), |number| work.once(session, number))?;
    // What needs no message takes no time that could be measured.
    let turn = if session.messages == messages { Duration::ZERO } else { turn };
    let (cpu, messages) = (running.server.cpu()?, session.messages);
    seat.measure(turn, |number| work.once(session, number))?;
    seat.messages += session.messages - messages;
    seat.cpu += running.server.cpu()? - cpu;
    Ok(())
}

fn floor_turn(
    seat: &mut Seat,
    operation: Operation,
    turn: Duration,
    floor: Floor,
    floors: &Floors,
    loopbacks: &mut Loopbacks<'_>,
) -> Result<()> {
    let (_, requests) = floors.of(operation, seat.wait);
    let loopback = loopbacks.get_mut(&floor).context("no such device")?;
    let before = seat.done;
    loopback.run(|queue| {
        queue.set_wait(seat.wait);
        let mut once = |number: usize| queue.exchange(&requests[number % requests.len()]).map(drop);
        seat.warm_up(requests.len(), &mut once)?;
        seat.measure(turn, once)
    })?;
    seat.messages += seat.done - before;
    Ok(())
}
