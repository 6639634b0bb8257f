//! The store backend is killed again and again under a guest that keeps it busy. The guest sends no INIT and no request a
//! second time; every request gets one answer, the right one.

use anyhow::{Context, Result, anyhow, ensure};
use lair_harness::{
    frontend::{
        connection::{Base, Guest},
        layout::Shape,
        queue::{PATIENCE, Queue, Wait},
        request::Request,
        session::{ROOT, Session},
    },
    process::{Server, Socket},
    tree::{Kind, Random, Scale, Tree, check_content},
};
use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

const KILLS: u64 = 200;
const QUEUES: usize = 4;
const DEPTH: u16 = 32;

/// The longest READ, pages.
const PAGES: usize = 32;

/// A request and the only right answer to it.
struct Known {
    request: Request,
    error: i32,
    payload: Vec<u8>,
}

/// A store, and the backend's program.
struct Backend {
    directory: tempfile::TempDir,
    program: std::path::PathBuf,
}

impl Backend {
    /// `None`, with the reason on stderr, where there is no program.
    fn find(tree: &Tree) -> Result<Option<Self>> {
        let Some(programs) = std::env::var_os("LAIR_BIN") else {
            eprintln!("SKIPPED: LAIR_BIN is not set; tests/run builds the programs and sets it");
            return Ok(None);
        };
        let directory = tempfile::tempdir()?;
        tree.write(&directory.path().join("store"))?;
        fs::write(directory.path().join("view"), tree.view())?;
        Ok(Some(Self { directory, program: Path::new(&programs).join("lair-virtiofs") }))
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, socket: &Socket) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--source").arg(self.file("store")).arg("--view").arg(self.file("view"));
        command.args(["--fd", &socket.number().to_string(), "--queues", &QUEUES.to_string()]);
        command
    }
}

/// Requests of all kinds, with answers that a backend that nobody kills has given and that are what the tree says.
fn learn(tree: &Tree, queue: Queue) -> Result<(Vec<Known>, Queue)> {
    let mut session = Session::mount(queue)?;
    let mut requests = vec![Request::getattr(ROOT), Request::lookup(ROOT, b"missing")];
    for entry in tree.entries.iter().step_by(29) {
        let found = session.walk(&entry.path)?;
        let node = found.nodeid;
        requests.push(Request::getattr(node));
        match &entry.kind {
            Kind::Directory => {
                requests.push(Request::readdirplus(node, 0, 0));
                requests.push(Request::lookup(node, b"missing"));
            }
            Kind::Link { .. } => requests.push(Request::readlink(node)),
            Kind::File { size } => {
                for offset in (0..*size).step_by(PAGES * 4096) {
                    requests.push(Request::read(node, 0, offset, (PAGES * 4096) as u32));
                }
            }
        }
        if let Some((parent, name)) = entry.split() {
            let parent = session.walk(parent)?.nodeid;
            requests.push(Request::lookup(parent, name.as_bytes()));
        }
    }
    // Answers with whole contents, as the disk has them.
    for (file, size) in tree.files(1..=(PAGES * 4096) as u64).step_by(29) {
        let node = session.walk(&file.path)?;
        ensure!(node.attr.size == size, "{} has another size", file.path);
        let opened = session.open(node.nodeid)?;
        check_content(&file.path, 0, &session.read(opened, 0, (PAGES * 4096) as u32)?)?;
        requests.push(Request::read(node.nodeid, 0, 0, (PAGES * 4096) as u32));
    }
    let known = requests
        .into_iter()
        .map(|request| {
            let header = session.send(&request)?;
            let payload = session.queue.payload(0, &request, &header);
            Ok(Known { request, error: header.error, payload })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((known, session.queue))
}

/// Keeps a queue full until `stop`, then empties it. Checks that each request has one answer, in the order in which they were
/// sent, and that it is the right one.
fn drive(
    queue: &mut Queue,
    known: &[Known],
    seed: u64,
    stop: &AtomicBool,
    answers: &AtomicU64,
) -> Result<()> {
    let mut random = Random(seed);
    let mut flying: VecDeque<(u16, u64, &Known)> = VecDeque::new();
    let mut send = |queue: &mut Queue, slot, flying: &mut VecDeque<_>| {
        let known = &known[random.below(known.len() as u64) as usize];
        let unique = queue.put(slot, &known.request);
        queue.spoil(slot, &known.request);
        queue.offer(slot);
        flying.push_back((slot, unique, known));
    };
    (0..DEPTH).for_each(|slot| send(queue, slot, &mut flying));
    queue.publish()?;
    while !flying.is_empty() {
        queue.wait()?;
        while let Some(used) = queue.take() {
            let (slot, unique, known) = flying.pop_front().context("An answer without a request")?;
            ensure!(queue.slot(&used)? == slot, "Slot {} was answered before slot {slot}", used.head);
            let header = queue.header(&used, unique)?;
            ensure!(header.error == known.error, "{:?}: {header:?}", known.request);
            let payload = queue.payload(slot, &known.request, &header);
            ensure!(payload == known.payload, "Another answer to {:?}", known.request);
            answers.fetch_add(1, Ordering::Relaxed);
            if !stop.load(Ordering::Relaxed) {
                send(queue, slot, &mut flying);
            }
        }
        queue.publish()?;
    }
    thread::sleep(Duration::from_millis(100));
    ensure!(queue.take().is_none(), "An answer more than there were requests");
    Ok(())
}

#[test]
fn a_backend_that_is_killed_200_times_answers_every_request_once_and_rightly() -> Result<()> {
    let tree = Tree::new(Scale { store_paths: 40, large: 2 << 20 });
    let Some(backend) = Backend::find(&tree)? else { return Ok(()) };
    let socket = Socket::new(&backend.file("fs.sock"))?;
    let log = backend.file("log");

    let (guest, mut queues) = Guest::new(Shape { queues: QUEUES, depth: DEPTH, pages: PAGES })?;
    let mut first = socket.serve(&mut backend.command(&socket), &log)?;
    let connection = guest.connect(socket.path(), Base::Used)?;
    let (known, queue) = learn(&tree, queues.remove(0))?;
    queues.insert(0, queue);
    // Each queue has been used, by which the next backend knows that there was an INIT.
    for queue in &mut queues {
        ensure!(queue.exchange(&Request::getattr(ROOT))?.error == 0);
    }
    let kinds: BTreeSet<_> = known.iter().map(|known| known.request.opcode.name()).collect();
    ensure!(kinds.len() == 5 && known.len() > 400, "{} requests: {kinds:?}", known.len());
    first.kill()?;
    drop(connection);

    let (stop, answers) = (AtomicBool::new(false), Answers::default());
    let (stop, answers, known) = (&stop, &answers, known.as_slice());
    thread::scope(|scope| -> Result<()> {
        let drivers: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(number, queue)| {
                // One of them looks for answers all the time, the others need the interrupt.
                queue.set_wait(if number == 0 { Wait::Polling } else { Wait::Sleeping });
                scope.spawn(move || drive(queue, known, number as u64 + 1, stop, &answers[number]))
            })
            .collect();
        let result = kill_again_and_again(&backend, &socket, &guest, answers);
        // Whatever came of it, the guest is to come to its end.
        let last = socket.serve(&mut backend.command(&socket), &log);
        let connection = guest.connect(socket.path(), Base::Used);
        stop.store(true, Ordering::Relaxed);
        for driver in drivers {
            driver.join().map_err(|_| anyhow!("A driver panicked"))??;
        }
        drop(connection?);
        last?.stop()?;
        result
    })?;
    let count: u64 = answers.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    println!("{KILLS} kills, {count} answers");
    Ok(())
}

#[test]
fn a_queue_that_is_first_used_after_a_kill_is_served() -> Result<()> {
    let tree = Tree::new(Scale { store_paths: 3, large: 4096 });
    let Some(backend) = Backend::find(&tree)? else { return Ok(()) };
    let socket = Socket::new(&backend.file("fs.sock"))?;
    let (guest, queues) = Guest::new(Shape { queues: QUEUES, depth: 1, pages: 1 })?;
    let mut queues = queues.into_iter();
    let mut first = socket.serve(&mut backend.command(&socket), &backend.file("log"))?;
    let connection = guest.connect(socket.path(), Base::Used)?;
    let session = Session::mount(queues.next().context("no queue")?)?;
    first.kill()?;
    drop(connection);
    let second = socket.serve(&mut backend.command(&socket), &backend.file("log"))?;
    // Whichever the hypervisor, or the backend's epoll, has first.
    let mut connection = guest.attach(socket.path(), Base::Used)?;
    connection.enable(2)?;
    let header = queues.next().context("no queue")?.exchange(&Request::getattr(ROOT))?;
    ensure!(header.error == 0, "{header:?}");
    drop((connection, session));
    second.stop()
}

/// How many answers each queue has got.
type Answers = [AtomicU64; QUEUES];

fn kill_again_and_again(backend: &Backend, socket: &Socket, guest: &Guest, answers: &Answers) -> Result<()> {
    let mut random = Random(u64::from(std::process::id()));
    println!("seed {}", random.0);
    for number in 0..KILLS {
        let mut server = socket.serve(&mut backend.command(socket), &backend.file("log"))?;
        // Whatever base the hypervisor gives.
        let base = if number % 2 == 0 { Base::Used } else { Base::Available };
        // Every fifth dies young, perhaps in the middle of the handshake.
        let young = number % 5 == 4;
        let delay = Duration::from_micros(random.below(30_000));
        let connected = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let killer = scope.spawn(|| -> Result<()> {
                let served = if young { Ok(()) } else { wait_for_all(answers, &mut server) };
                thread::sleep(delay);
                server.kill()?;
                // A handshake that nobody has begun to answer would wait for the next life.
                while !connected.load(Ordering::Relaxed) {
                    socket.hang_up()?;
                    thread::sleep(Duration::from_millis(1));
                }
                served
            });
            let connection = guest.connect(socket.path(), base);
            connected.store(true, Ordering::Relaxed);
            killer.join().map_err(|_| anyhow!("The killer panicked"))??;
            match connection {
                Err(error) if !young => Err(error),
                _ => Ok(()),
            }
        })
        .with_context(|| format!("Life {number}, base {base:?}; the backend said: {}", server.log()))?;
    }
    Ok(())
}

/// Waits until each queue has got an answer more: no life but the last is to make up for what another one has lost.
fn wait_for_all(answers: &Answers, server: &mut Server) -> Result<()> {
    let count = || answers.each_ref().map(|count| count.load(Ordering::Relaxed));
    let (before, deadline) = (count(), Instant::now() + PATIENCE / 2);
    while count().iter().zip(before).any(|(now, before)| *now == before) {
        server.check()?;
        ensure!(Instant::now() < deadline, "Not every queue is served: {before:?}, then {:?}", count());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
