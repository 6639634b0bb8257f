//! A hypervisor and its guest, as far as a virtiofs device sees them: the real vhost-user protocol to the real program,
//! real virtqueues in shared memory, and requests of the test's choice.

use crate::driver::{OFFERED, init_request, parse};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, ErrorKind, Read},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Once,
    time::{Duration, Instant},
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long anything may take. A bound against hanging, not a promise.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The high-priority queue and one request queue.
pub(crate) const HIPRIO: usize = 0;
/// The request queue.
pub(crate) const REQUEST: usize = 1;
const QUEUES: usize = 2;
/// As many as a test may add by itself.
const QUEUES_MAX: usize = 4;

/// Descriptors in each queue.
pub(crate) const SIZE: u16 = 64;

/// Guest memory in bytes.
pub(crate) const MEMORY: usize = 16 << 20;

/// Where request bytes go, and replies.
pub(crate) const REQUEST_AT: u64 = 1 << 20;
pub(crate) const REPLY_AT: u64 = 4 << 20;

/// The program under test.
pub(crate) struct Program {
    child: Child,
    skips: Once,
    pub(crate) socket: PathBuf,
}

impl Program {
    /// Starts the program for a view of a store, and waits until it can be connected to.
    pub(crate) fn start(dir: &Path, store: &Path, view: &Path) -> Self {
        Self::start_with(dir, store, view, &[])
    }

    /// The same with more arguments.
    pub(crate) fn start_with(dir: &Path, store: &Path, view: &Path, more: &[&OsStr]) -> Self {
        let socket = dir.join("fs.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"))
            .args([
                "--socket".as_ref(),
                socket.as_os_str(),
                "--control".as_ref(),
                dir.join("control").as_os_str(),
            ])
            .args(["--source".as_ref(), store.as_os_str(), "--view".as_ref(), view.as_os_str()])
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let program = Self { child, skips: Once::new(), socket };
        wait_for("the socket", || program.socket.exists());
        program
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What lies in `/proc` about it for root only, or nothing.
    fn secret<T>(&self, name: &str, read: impl FnOnce(PathBuf) -> std::io::Result<T>) -> Option<T> {
        match read(format!("/proc/{}/{name}", self.pid()).into()) {
            Err(error)
                if error.kind() == ErrorKind::PermissionDenied && !nix::unistd::geteuid().is_root() =>
            {
                let say = || println!("SKIPPED: looking at its descriptors and mappings, as only root may");
                self.skips.call_once(say);
                None
            }
            result => Some(result.unwrap()),
        }
    }

    /// How many descriptors it has open, if that can be seen.
    pub(crate) fn descriptors(&self) -> Option<usize> {
        self.secret("fd", |path| Ok(std::fs::read_dir(path)?.count()))
    }

    /// How many descriptors it has open while nobody is connected, if that can be seen.
    pub(crate) fn descriptors_at_rest(&self) -> Option<usize> {
        wait_for("the memory to be unmapped", || self.has_no_guest());
        let (mut last, mut same) = (Some(0), 0);
        // An old connection's go, and those for the next one come.
        while same < 20 {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.descriptors();
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        last
    }

    /// Its mappings of files, if they can be seen.
    pub(crate) fn mappings(&self) -> Option<String> {
        self.secret("maps", std::fs::read_to_string)
    }

    /// How many mappings of our guest memory it has, as far as can be seen.
    pub(crate) fn guest_mappings(&self) -> usize {
        let maps = self.mappings().unwrap_or_default();
        maps.lines().filter(|line| line.contains("memfd:") || line.contains("(deleted)")).count()
    }

    /// Whether it has none.
    pub(crate) fn has_no_guest(&self) -> bool {
        self.guest_mappings() == 0
    }

    /// CPU time that it has used.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    /// A figure of `/proc/PID/status`.
    fn status(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()).unwrap().parse().unwrap()
    }

    /// How many threads it has.
    pub(crate) fn threads(&self) -> u64 {
        self.status("Threads")
    }

    /// Bytes of private memory that it uses.
    pub(crate) fn private_memory(&self) -> u64 {
        self.status("RssAnon") * 1024
    }

    pub(crate) fn stats(&self) -> String {
        self.control(b"stats\n")
    }

    pub(crate) fn control(&self, line: &[u8]) -> String {
        use std::io::Write;
        let mut client = connect(&self.socket.with_file_name("control"));
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(line).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    }

    /// The value of a counter or gauge without labels.
    pub(crate) fn stat(&self, name: &str) -> u64 {
        let text = self.stats();
        let line = text.lines().find_map(|l| l.strip_prefix(name).and_then(|l| l.strip_prefix(' ')));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it with SIGTERM. Its exit status and the lines that it logged.
    pub(crate) fn terminate(self) -> (Option<i32>, Vec<String>) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        let (status, lines) = self.ended();
        (status.code(), lines)
    }

    /// Waits for its end. How it ended, and the lines that it logged.
    pub(crate) fn ended(mut self) -> (ExitStatus, Vec<String>) {
        let stderr = BufReader::new(self.child.stderr.take().unwrap());
        let lines = stderr.lines().map(Result::unwrap).collect();
        (self.child.wait().unwrap(), lines)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a line of the log warns of, but for the user that all tests run as.
pub(crate) fn warning(line: &str) -> Option<&str> {
    let (_, warning) = line.split_once("WARN ")?;
    (!warning.contains(" is shared with ")).then_some(warning)
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A guest's memory and what its driver knows of its queues. It outlives connections.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    rings: [Ring; QUEUES_MAX],
}

#[derive(Default, Clone, Copy)]
struct Ring {
    available: u16,
    used: u16,
}

/// A buffer of a request: where, how long, and whether it is for the reply.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        Self { memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(), rings: Default::default() }
    }

    pub(crate) fn table(queue: usize) -> u64 {
        queue as u64 * 0x1_0000
    }

    pub(crate) fn available_ring(queue: usize) -> u64 {
        Self::table(queue) + 0x4000
    }

    fn used_ring(queue: usize) -> u64 {
        Self::table(queue) + 0x8000
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo::from_guest_region(self.memory.iter().next().unwrap()).unwrap()
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, desc: Descriptor) {
        self.put(RawDescriptor::from(desc), Self::table(queue) + 16 * u64::from(index));
    }

    /// Puts a chain into the table, from descriptor 0 on.
    pub(crate) fn chain(&self, queue: usize, parts: &[Part]) {
        for (i, part) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = (if last { 0 } else { VRING_DESC_F_NEXT })
                | (if part.write { VRING_DESC_F_WRITE } else { 0 });
            let next = if last { 0 } else { i as u16 + 1 };
            self.descriptor(queue, i as u16, Descriptor::new(part.at, part.len, flags as u16, next));
        }
    }

    /// Makes the chain that begins at `head` available, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.available % SIZE);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.put(head, Self::available_ring(queue) + 4 + 2 * slot);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put(index, Self::available_ring(queue) + 2);
    }

    /// The driver's available index.
    pub(crate) fn offered(&self, queue: usize) -> u16 {
        self.rings[queue].available
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.get(Self::used_ring(queue) + 2)
    }

    /// What was used since last asked: heads and lengths.
    pub(crate) fn take_used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let mut taken = Vec::new();
        loop {
            while self.used_index(queue) != self.rings[queue].used {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                let slot = u64::from(self.rings[queue].used % SIZE);
                self.rings[queue].used = self.rings[queue].used.wrapping_add(1);
                let at = Self::used_ring(queue) + 4 + 8 * slot;
                taken.push((self.get(at), self.get(at + 4)));
            }
            // With EVENT_IDX: tell me about the next one. Which may have come just before this was said.
            let used = self.rings[queue].used;
            self.put(used, Self::available_ring(queue) + 4 + 2 * u64::from(SIZE));
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if self.used_index(queue) == used {
                break;
            }
        }
        taken
    }

    /// The driver sets all up anew, as after a reboot.
    pub(crate) fn reset(&mut self) {
        self.write(0, &vec![0; 0x1_0000 * QUEUES_MAX]);
        self.rings = Default::default();
    }
}

/// A connection of the hypervisor.
pub(crate) struct Connection {
    pub(crate) vhost: Frontend,
    /// The socket under it, for messages that the library would not send.
    pub(crate) stream: UnixStream,
    kicks: BTreeMap<usize, EventFd>,
    calls: BTreeMap<usize, EventFd>,
}

impl Connection {
    /// The first part of the handshake, up to the memory table.
    pub(crate) fn bare(socket: &Path, guest: &Guest) -> Self {
        let stream = connect(socket);
        let mut vhost = Frontend::from_stream(stream.try_clone().unwrap(), QUEUES_MAX as u64);
        vhost.set_owner().unwrap();
        let features = vhost.get_features().unwrap();
        let protocol = vhost.get_protocol_features().unwrap();
        vhost.set_protocol_features(protocol & VhostUserProtocolFeatures::all()).unwrap();
        vhost.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
        assert!(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        vhost.set_features(features).unwrap();
        vhost.set_mem_table(&[guest.region()]).unwrap();
        Self { vhost, stream, kicks: BTreeMap::new(), calls: BTreeMap::new() }
    }

    /// Connects, sets all queues up and enables them. They start at `base`.
    pub(crate) fn with_base(socket: &Path, guest: &Guest, base: [u16; QUEUES]) -> Self {
        let mut connection = Self::bare(socket, guest);
        for (queue, base) in base.into_iter().enumerate() {
            connection.set_up(guest, queue, base);
        }
        for queue in 0..QUEUES {
            connection.vhost.set_vring_enable(queue, true).unwrap();
        }
        connection
    }

    /// Connects as a hypervisor does whose guest has just booted.
    pub(crate) fn new(socket: &Path, guest: &Guest) -> Self {
        Self::with_base(socket, guest, [0; QUEUES])
    }

    pub(crate) fn addresses(guest: &Guest, queue: usize) -> VringConfigData {
        let host = guest.region().userspace_addr;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host + Guest::table(queue),
            used_ring_addr: host + Guest::used_ring(queue),
            avail_ring_addr: host + Guest::available_ring(queue),
            log_addr: None,
        }
    }

    pub(crate) fn set_up(&mut self, guest: &Guest, queue: usize, base: u16) {
        let (kick, call) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        self.vhost.set_vring_num(queue, SIZE).unwrap();
        self.vhost.set_vring_base(queue, base).unwrap();
        self.vhost.set_vring_addr(queue, &Self::addresses(guest, queue)).unwrap();
        self.vhost.set_vring_call(queue, &call).unwrap();
        self.vhost.set_vring_kick(queue, &kick).unwrap();
        self.kicks.insert(queue, kick);
        self.calls.insert(queue, call);
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.kicks[&queue].write(1).unwrap();
    }

    /// The same eventfd, to be kicked from elsewhere.
    pub(crate) fn kick_of(&self, queue: usize) -> EventFd {
        self.kicks[&queue].try_clone().unwrap()
    }

    /// Waits for an interrupt.
    pub(crate) fn wait(&self, queue: usize) {
        assert!(self.interrupted(queue, PATIENCE), "no interrupt");
    }

    /// Whether an interrupt comes within this time.
    pub(crate) fn interrupted(&self, queue: usize, within: Duration) -> bool {
        // SAFETY: the eventfd lives as long as `self`.
        #[allow(unsafe_code)]
        let fd = unsafe { BorrowedFd::borrow_raw(self.calls[&queue].as_raw_fd()) };
        let timeout = PollTimeout::try_from(within).unwrap();
        let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap() > 0;
        if ready {
            self.calls[&queue].read().unwrap();
        }
        ready
    }

    /// Offers the chain at descriptor 0, kicks, and waits until it was used. The used length.
    pub(crate) fn submit(&self, guest: &mut Guest, queue: usize) -> u32 {
        guest.offer(queue, 0);
        self.kick(queue);
        loop {
            let used = guest.take_used(queue);
            match used.as_slice() {
                [] => self.wait(queue),
                [(0, length)] => return *length,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends a request in pages, as Linux does. The reply's bytes.
    pub(crate) fn raw(&self, guest: &mut Guest, request: &[u8], room: u32) -> Vec<u8> {
        guest.write(REQUEST_AT, request);
        let mut parts = vec![
            Part { at: REQUEST_AT, len: 40.min(request.len() as u32), write: false },
            Part { at: REQUEST_AT + 40, len: (request.len() as u32).saturating_sub(40), write: false },
            Part { at: REPLY_AT, len: 16.min(room), write: true },
        ];
        let mut left = room.saturating_sub(16);
        let mut at = REPLY_AT + 16;
        while left > 0 {
            // As large as it takes to get by with the queue's descriptors.
            let len = left.min(64 << 10);
            parts.push(Part { at, len, write: true });
            (at, left) = (at + u64::from(len), left - len);
        }
        guest.chain(REQUEST, &parts);
        let used = self.submit(guest, REQUEST);
        guest.bytes(REPLY_AT, used as usize)
    }

    pub(crate) fn send(&self, guest: &mut Guest, request: &[u8]) -> Result<Vec<u8>, Errno> {
        parse(request, &self.raw(guest, request, 2 << 20))
    }

    pub(crate) fn init(&self, guest: &mut Guest) {
        self.send(guest, &init_request(7, 41, OFFERED)).unwrap();
    }
}

/// A connection without any protocol, for messages against it.
pub(crate) fn raw_connection(socket: &Path) -> UnixStream {
    let stream = connect(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A vhost-user message.
pub(crate) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&request.to_le_bytes()[..], &flags.to_le_bytes(), &size.to_le_bytes(), body].concat()
}

/// Whether the peer hung up, after reading whatever it said.
pub(crate) fn hung_up(mut stream: UnixStream) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// Connects. A socket's file is there a moment before it can be connected to, and one that was left behind goes first.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = None;
    wait_for("a connection", || match UnixStream::connect(socket) {
        Ok(connected) => stream.replace(connected).is_none(),
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound), "{error}");
            false
        }
    });
    stream.unwrap()
}

pub(crate) fn null() -> File {
    File::open("/dev/null").unwrap()
}
