//! One connection of a hypervisor to the real device: messages, descriptors, kicks and what the guest writes, in any order.
//!
//! An input is steps until its end. Whatever they are, the connection ends when the hypervisor hangs up, with all that it gave
//! released.

use super::{input::Input, world::World};
use crate::{fuse::Opcode, vhost::fuzzing::serve_one};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, MsgFlags, sendmsg},
    },
    unistd::ftruncate,
};
use std::{
    fs::File,
    io::{IoSlice, Read},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::FileExt,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    sync::{Arc, OnceLock, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory.
pub(super) const MEMORY: u64 = 0x4_0000;

/// The most steps of one input.
const STEPS: usize = 64;

/// How long an answer may take that may also never come, in milliseconds.
const ANSWER: u8 = 20;

/// How long the end of a connection may take.
const END: Duration = Duration::from_secs(8);

/// The name by which our guest memory is known in the list of mappings.
const NAME: &str = "lair-fuzzed-guest";

/// What is done. On the wire a step is its number and what belongs to it.
pub(super) mod step {
    /// A message: request (8 bits), flags (8 bits), length of the body (8 bits), how many descriptors (8 bits), the kind of each (8
    /// bits), the body.
    pub(in super::super) const MESSAGE: u8 = 0;
    /// The guest writes: address (32 bits), length (8 bits), bytes.
    pub(in super::super) const WRITE: u8 = 1;
    /// A kick: which eventfd (8 bits).
    pub(in super::super) const KICK: u8 = 2;
    /// A little time passes.
    pub(in super::super) const WAIT: u8 = 3;
    /// Bytes that need not be a message: length (8 bits), bytes.
    pub(in super::super) const BYTES: u8 = 4;
    /// A file that was given becomes shorter: it is not the guest's memory (that would rightly end this process).
    pub(in super::super) const CUT: u8 = 5;
    /// How many there are.
    pub(super) const COUNT: u8 = 6;
}

/// Kinds of descriptors.
pub(super) mod kind {
    /// The guest's memory.
    pub(in super::super) const MEMORY: u8 = 0;
    /// A file that is shorter than it.
    pub(in super::super) const SHORT: u8 = 1;
    /// The two eventfds.
    pub(in super::super) const EVENT: [u8; 2] = [2, 3];
    /// The end of a pipe from which nothing comes.
    pub(in super::super) const PIPE: u8 = 4;
    /// Of a pair of sockets.
    pub(in super::super) const SOCKET: u8 = 5;
    /// `/dev/null`
    pub(in super::super) const NULL: u8 = 6;
    /// How many there are.
    pub(super) const COUNT: u8 = 7;
}

/// Does what an input says.
pub fn session(input: &[u8]) {
    let world = World::get();
    let listener = listener();
    // Threads and their descriptors that come with the first connection, and stay.
    static FIRST: OnceLock<()> = OnceLock::new();
    FIRST.get_or_init(|| {
        // As in a program whose main function is Rust's, which a fuzzer's is not: what is written to a pipe that nobody reads is an error.
        let ignored = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, ignored).expect("SIGPIPE may be caught");
        one(world, listener, &[]);
    });
    let before = held();
    one(world, listener, input);
    let begin = Instant::now();
    // Fewer are right: a thread of the connection before may have been about to end.
    let released = |now: (usize, usize)| now.0 <= before.0 && now.1 <= before.1;
    while !released(held()) || mappings() != 0 {
        let (now, maps) = (held(), mappings());
        assert!(
            begin.elapsed() < END,
            "{now:?} threads and descriptors where {before:?} were; {maps} mappings"
        );
        thread::sleep(Duration::from_micros(200));
    }
}

/// How many requests of guests all sessions of this process have brought, so that it can be seen that they bring any.
pub fn requests_served() -> u64 {
    let queues = World::get().service.requests.iter();
    queues
        .map(|queue| Opcode::ALL.iter().map(|&opcode| queue.of(Some(opcode)).requests.get()).sum::<u64>())
        .sum()
}

fn one(world: &'static World, listener: &'static UnixListener, input: &[u8]) {
    let server = thread::spawn(|| serve_one(listener, &world.service, &world.config).expect("it goes on"));
    let address = listener.local_addr().unwrap();
    let mut peer = Peer::new(UnixStream::connect_addr(&address).unwrap());
    let mut input = Input(input);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        peer.step(&mut input);
    }
    drop(peer);
    server.join().unwrap();
}

/// The socket on which the device listens.
fn listener() -> &'static UnixListener {
    static LISTENER: OnceLock<UnixListener> = OnceLock::new();
    LISTENER.get_or_init(|| {
        let name = format!("lair-virtiofs-fuzzing-{}", std::process::id());
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
    })
}

/// How many threads and descriptors there are.
fn held() -> (usize, usize) {
    let count = |directory: &str| std::fs::read_dir(directory).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(NAME)).count()
}

/// A hypervisor, and its guest's memory.
struct Peer {
    stream: UnixStream,
    memory: File,
    short: File,
    events: [EventFd; 2],
    pipe: (std::io::PipeReader, std::io::PipeWriter),
    sockets: (UnixStream, UnixStream),
    null: File,
    /// The device was told that it may be asked for an answer to anything.
    acks: bool,
    /// How many more answers may not come before none is waited for any more.
    patience: u8,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        let file = |name: &str, len: u64| {
            let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap();
            ftruncate(&file, i64::try_from(len).unwrap()).unwrap();
            File::from(file)
        };
        Self {
            stream,
            memory: file(NAME, MEMORY),
            short: file("short", 4096),
            events: [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()),
            pipe: std::io::pipe().unwrap(),
            sockets: UnixStream::pair().unwrap(),
            null: File::open("/dev/null").unwrap(),
            acks: false,
            patience: 3,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % step::COUNT {
            step::MESSAGE => self.message(input),
            step::WRITE => {
                let at = u64::from(input.u32()) % MEMORY;
                let count = usize::from(input.u8());
                let bytes = input.bytes(count.min((MEMORY - at) as usize));
                self.memory.write_all_at(bytes, at).unwrap();
            }
            step::KICK => drop(self.events[usize::from(input.u8() & 1)].write(1)),
            step::WAIT => thread::sleep(Duration::from_micros(300)),
            step::BYTES => {
                let count = usize::from(input.u8());
                self.send(input.bytes(count), &[]);
            }
            _ => self.short.set_len(100).unwrap(),
        }
    }

    fn message(&mut self, input: &mut Input<'_>) {
        let (request, flags) = (u32::from(input.u8()), u32::from(input.u8()));
        let length = usize::from(input.u8());
        let count = usize::from(input.u8()).min(40);
        let fds: Vec<RawFd> = input.bytes(count).iter().map(|kind| self.descriptor(*kind)).collect();
        let body = input.bytes(length);
        let header = [request, flags, body.len() as u32];
        let header: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
        self.send(&[&header, body].concat(), &fds);
        // GET_ requests are answered, and those that ask for it.
        let answered = matches!(request, 1 | 11 | 15 | 17 | 24 | 31 | 36) || flags & 8 != 0 && self.acks;
        if answered && self.patience > 0 {
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            let came = poll(&mut fds, PollTimeout::from(ANSWER)).is_ok_and(|ready| ready > 0);
            self.patience -= u8::from(!came);
        }
        self.acks |= request == 16 && body.first().is_some_and(|features| features & 8 != 0);
        self.drain();
    }

    fn descriptor(&self, kind: u8) -> RawFd {
        match kind % kind::COUNT {
            kind::MEMORY => self.memory.as_raw_fd(),
            kind::SHORT => self.short.as_raw_fd(),
            kind::PIPE => self.pipe.0.as_raw_fd(),
            kind::SOCKET => self.sockets.0.as_raw_fd(),
            kind::NULL => self.null.as_raw_fd(),
            event => self.events[usize::from(event == kind::EVENT[1])].as_raw_fd(),
        }
    }

    fn send(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        // The device may have hung up.
        let _ = sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, flags, None);
    }

    /// Takes what the device has said.
    fn drain(&mut self) {
        let _ = self.stream.set_nonblocking(true);
        let mut bytes = [0; 4096];
        while self.stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
        let _ = self.stream.set_nonblocking(false);
    }
}
