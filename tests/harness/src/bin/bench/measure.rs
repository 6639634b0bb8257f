//! Measuring one backend in one round: what is not one request at a time.

use crate::{
    backends::{Backend, Running},
    operation::{Nodes, Operation, Work, walk},
    statistics::quantile,
};
use anyhow::{Context, Result, anyhow, ensure};
use lair_harness::{
    frontend::{
        echo::{Device, Loopback},
        layout::{PAGE, Shape},
        queue::{Queue, Wait},
        request::Request,
        session::{ROOT, Session},
    },
    process::{MemoryUse, Server},
    tree::Tree,
};
use lair_virtiofs::fuse::wire::OutHeader;
use std::{
    collections::BTreeMap,
    fs::File,
    path::Path,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

/// How much is measured.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Effort {
    /// Times that each backend has its turn.
    pub(crate) rounds: usize,
    /// Seconds for each figure, in each round.
    pub(crate) seconds: f64,
    /// Starts that are timed, in each round.
    pub(crate) starts: usize,
}

impl Effort {
    pub(crate) fn budget(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// Requests in flight in a queue.
pub(crate) const DEPTHS: [u16; 3] = [1, 8, 32];
/// Request queues, each with a thread of the guest.
pub(crate) const QUEUES: [usize; 3] = [1, 2, 4];
/// Requests in flight in each of several queues.
pub(crate) const DEPTH_OF_MANY: u16 = 8;
/// What is sent in numbers.
pub(crate) const IN_NUMBERS: [Operation; 2] = [Operation::Lookup, Operation::Read4K];
/// Requests each second of a guest that is not busy.
pub(crate) const PACE: u32 = 1000;

const WAITS: [Wait; 2] = [Wait::Polling, Wait::Sleeping];

/// What one backend did in one round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    /// Requests each second, by operation, wait and depth.
    pub(crate) depth: BTreeMap<(Operation, Wait, u16), u64>,
    /// Requests each second, by operation and number of queues.
    pub(crate) queues: BTreeMap<(Operation, usize), u64>,
    /// Nanoseconds of the backend's CPU time for a LOOKUP at a thousand a second.
    pub(crate) paced_cpu: u64,
    pub(crate) sequential: BTreeMap<Wait, Rates>,
}

/// Bytes each second of a large file, from its beginning to its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub(crate) backend: u64,
    /// Of a device of no use that has the kernel copy the file and does nothing else.
    pub(crate) device: u64,
    /// Of this thread, by itself.
    pub(crate) pread: u64,
}

/// Has one backend do everything but what is in [`crate::turns`].
pub(crate) fn round(
    backend: &Backend,
    tree: &Tree,
    store: &Path,
    directory: &Path,
    effort: &Effort,
) -> Result<Round> {
    let mut round = Round::default();
    let depth = DEPTHS.into_iter().max().unwrap_or(1);
    let (running, queues) = backend.start(directory, Shape { queues: 1, depth, pages: (1 << 20) / PAGE })?;
    let mut session = Session::mount(queues.into_iter().next().context("no queue")?)?;
    let mut nodes = Nodes::default();
    let works = IN_NUMBERS
        .into_iter()
        .map(|operation| Ok((operation, Work::prepare(operation, tree, &mut session, &mut nodes)?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    for wait in WAITS {
        session.queue.set_wait(wait);
        for operation in IN_NUMBERS {
            for depth in DEPTHS {
                let until = Instant::now() + effort.budget();
                let rate = stream(&mut session.queue, &works[&operation], depth, until)?;
                round.depth.insert((operation, wait, depth), rate);
            }
        }
        let rates = sequential(&mut session, wait, tree, store, effort)?;
        round.sequential.insert(wait, rates);
    }
    round.paced_cpu = paced(&mut session, &works[&Operation::Lookup], &running.server, effort)?;
    running.stop()?;
    if backend.multiqueue {
        round.queues = many_queues(backend, tree, directory, effort)?;
    }
    Ok(round)
}

/// Keeps `depth` requests in flight. Requests each second.
fn stream(queue: &mut Queue, work: &Work, depth: u16, until: Instant) -> Result<u64> {
    let begin = Instant::now();
    let (mut sent, mut done, mut flying) = (0, 0_u64, 0_u16);
    // Each slot's request, and its unique number.
    let mut slots = vec![(&work.requests[0], 0); usize::from(depth)];
    let mut send = |queue: &mut Queue, slot: &mut (_, u64), number| {
        let request = &work.requests[sent % work.requests.len()];
        *slot = (request, queue.put(number, request));
        queue.offer(number);
        sent += 1;
    };
    for (slot, number) in slots.iter_mut().zip(0..) {
        send(queue, slot, number);
        flying += 1;
    }
    queue.publish()?;
    while flying > 0 {
        queue.wait()?;
        let go_on = Instant::now() < until;
        while let Some(used) = queue.take() {
            let number = queue.slot(&used)?;
            let slot = slots.get_mut(usize::from(number)).context("An unknown slot was answered")?;
            let header = queue.header(&used, slot.1)?;
            work.check(slot.0, &header, || queue.body(number))?;
            flying -= 1;
            done += 1;
            if go_on {
                send(queue, slot, number);
                flying += 1;
            }
        }
        queue.publish()?;
    }
    Ok((done as f64 / begin.elapsed().as_secs_f64()) as u64)
}

/// Reads the large file from its beginning to its end, again and again: by the backend, by a device of no use, and with pread.
fn sequential(
    session: &mut Session,
    wait: Wait,
    tree: &Tree,
    store: &Path,
    effort: &Effort,
) -> Result<Rates> {
    const PIECE: u32 = 1 << 20;
    let node = session.walk(&tree.large.0)?.nodeid;
    let opened = session.open(node)?;
    let file = File::open(store.join(&tree.large.0))?;
    let mut device = Loopback::new(Device::Reading(&file))?;
    let requests: Vec<_> = (0..tree.large.1)
        .step_by(PIECE as usize)
        .map(|offset| Request::read(node, opened.handle, offset, PIECE))
        .collect();
    let whole = |header: OutHeader| {
        ensure!(header.len > PIECE, "A READ of {PIECE} bytes was cut short");
        Ok(())
    };
    session.queue.set_wait(wait);
    let (mut by_backend, mut by_device, mut by_pread) = (Vec::new(), Vec::new(), Vec::new());
    let until = Instant::now() + effort.budget();
    // The first pass of each only makes sure that all is in memory.
    while by_pread.len() < 3 || Instant::now() < until {
        let begin = Instant::now();
        for request in &requests {
            whole(session.must(request)?)?;
        }
        by_backend.push(begin.elapsed().as_nanos() as u64);
        by_device.push(device.run(|queue| {
            queue.set_wait(wait);
            // Its thread has to come first.
            whole(queue.exchange(&requests[0])?)?;
            let begin = Instant::now();
            requests.iter().try_for_each(|request| whole(queue.exchange(request)?))?;
            Ok(begin.elapsed().as_nanos() as u64)
        })?);
        let begin = Instant::now();
        for offset in (0..tree.large.1).step_by(PIECE as usize) {
            let count = session.queue.pread(0, &file, offset, PIECE as usize)?;
            ensure!(count == PIECE as usize, "A pread was cut short");
        }
        by_pread.push(begin.elapsed().as_nanos() as u64);
    }
    session.close(opened)?;
    let rate = |times: &mut [u64]| tree.large.1 * 1_000_000_000 / quantile(&mut times[1..], 0.5).max(1);
    Ok(Rates { backend: rate(&mut by_backend), device: rate(&mut by_device), pread: rate(&mut by_pread) })
}

/// CPU time of the backend for a LOOKUP where the guest sends one only now and then, nanoseconds.
fn paced(session: &mut Session, work: &Work, server: &Server, effort: &Effort) -> Result<u64> {
    session.queue.set_wait(Wait::Sleeping);
    thread::sleep(Duration::from_millis(50));
    let cpu = server.cpu()?;
    let mut count = 0;
    let until = Instant::now() + effort.budget().max(Duration::from_millis(100));
    while Instant::now() < until {
        thread::sleep(Duration::from_secs(1) / PACE);
        work.once(session, count)?;
        count += 1;
    }
    ensure!(count > 0, "no time to measure in");
    Ok((server.cpu()? - cpu).as_nanos() as u64 / count as u64)
}

/// Requests each second through several queues at once.
fn many_queues(
    backend: &Backend,
    tree: &Tree,
    directory: &Path,
    effort: &Effort,
) -> Result<BTreeMap<(Operation, usize), u64>> {
    let most = QUEUES.into_iter().max().unwrap_or(1);
    let (running, mut queues) =
        backend.start(directory, Shape { queues: most, depth: DEPTH_OF_MANY, pages: 4 })?;
    let mut session = Session::mount(queues.remove(0))?;
    let mut nodes = Nodes::default();
    let works = IN_NUMBERS
        .into_iter()
        .map(|operation| Ok((operation, Work::prepare(operation, tree, &mut session, &mut nodes)?)))
        .collect::<Result<Vec<_>>>()?;
    let mut all = vec![session.queue];
    all.extend(queues);
    let mut rates = BTreeMap::new();
    for (operation, work) in &works {
        for count in QUEUES {
            let barrier = Barrier::new(count);
            let rate = thread::scope(|scope| {
                let threads: Vec<_> = all
                    .iter_mut()
                    .take(count)
                    .map(|queue| {
                        scope.spawn(|| {
                            barrier.wait();
                            stream(queue, work, DEPTH_OF_MANY, Instant::now() + effort.budget())
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().map_err(|_| anyhow!("A thread panicked"))?)
                    .sum::<Result<u64>>()
            })?;
            rates.insert((*operation, count), rate);
        }
    }
    running.stop()?;
    Ok(rates)
}

/// A guest that does little: for what is measured of the backend as a whole.
const SMALL: Shape = Shape { queues: 1, depth: 1, pages: 1 };

fn small(backend: &Backend, directory: &Path) -> Result<(Running, Session)> {
    let (running, mut queues) = backend.start(directory, SMALL)?;
    let session = Session::mount(queues.remove(0))?;
    Ok((running, session))
}

/// What a backend has in memory for one VM after it has shown it every inode, and how many inodes it showed. A second VM
/// does the same beside it, so that what the two share counts for neither.
pub(crate) fn memory(backend: &Backend, directory: &Path) -> Result<(u64, MemoryUse)> {
    let (one, mut first) = small(backend, directory)?;
    let (other, mut second) = small(backend, directory)?;
    for session in [&mut first, &mut second] {
        session.queue.set_wait(Wait::Sleeping);
    }
    let inodes = walk(&mut first)?;
    walk(&mut second)?;
    let used = one.server.memory()?;
    one.stop()?;
    other.stop()?;
    Ok((inodes, used))
}

/// Nanoseconds from starting the program to the reply to the first request after INIT.
pub(crate) fn start(backend: &Backend, directory: &Path) -> Result<u64> {
    let (running, mut session) = small(backend, directory)?;
    session.must(&Request::getattr(ROOT))?;
    let took = running.server.began().elapsed();
    running.stop()?;
    Ok(took.as_nanos() as u64)
}

/// How long an idle backend is watched.
pub(crate) const IDLE: Duration = Duration::from_secs(2);

/// Nanoseconds of CPU time that a connected backend uses in [`IDLE`] while its guest sends nothing.
pub(crate) fn idle(backend: &Backend, directory: &Path) -> Result<u64> {
    let (running, mut session) = small(backend, directory)?;
    for _ in 0..1000 {
        session.must(&Request::getattr(ROOT))?;
    }
    thread::sleep(Duration::from_millis(200));
    let before = running.server.cpu()?;
    thread::sleep(IDLE);
    let used = running.server.cpu()? - before;
    running.stop()?;
    Ok(used.as_nanos() as u64)
}
