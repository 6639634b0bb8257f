//! Recordings of operators' terminals: a file for each session, written by a thread of its own.
//!
//! What the terminal shows is recorded, not what is typed: a password that is not echoed is not in it. A disk that is slow or full holds up no
//! session: what finds the queue full is counted, and a recording that cannot be written says so in the audit log.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    asciicast::{self, Event, Text},
    limits,
    rate::Rate,
    retention,
    worker::{Work, Worker},
};
use lair_guest::wire::message::{Terminal, TerminalSize};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// The rights of a recording: its group may read it.
const MODE: u32 = 0o640;

/// The rights of the directory.
const DIRECTORY_MODE: u32 = 0o750;

/// What an entry of the queue counts, apart from its bytes.
const ENTRY: usize = 128;

/// Room for the last line of a recording that is full.
const LAST_LINE: u64 = 256;

/// What the thread is to do for one recording.
enum Entry {
    Start { name: String, header: String, failed: Arc<AtomicBool> },
    Output(Duration, Vec<u8>),
    Event(Duration, Event),
    End,
}

impl Entry {
    fn cost(&self) -> usize {
        let bytes = match self {
            // With the place of the end.
            Self::Start { name, header, .. } => name.len().saturating_add(header.len()).saturating_add(ENTRY),
            Self::Output(_, bytes) => bytes.len(),
            Self::Event(_, Event::Output(text) | Event::Note(text)) => text.len(),
            Self::Event(_, Event::Resize(_)) | Self::End => 0,
        };
        bytes.saturating_add(ENTRY)
    }
}

/// Entries with the number of their recording.
#[derive(Default)]
struct Queue {
    entries: VecDeque<(u64, Entry)>,
    cost: usize,
    /// What each recording has of that.
    shares: BTreeMap<u64, usize>,
    /// The number of the next recording.
    next: u64,
}

impl Queue {
    fn push(&mut self, recording: u64, entry: Entry) -> bool {
        let cost = self.cost.saturating_add(entry.cost());
        let share = self.shares.get(&recording).copied().unwrap_or_default().saturating_add(entry.cost());
        let full = cost > limits::RECORDING_QUEUE || share > limits::RECORDING_SHARE;
        // The end of a recording that has begun has its place.
        if full && !matches!(entry, Entry::End) {
            return false;
        }
        self.cost = cost;
        self.shares.insert(recording, share);
        self.entries.push_back((recording, entry));
        true
    }

    /// All that is there.
    fn take(&mut self) -> VecDeque<(u64, Entry)> {
        self.cost = 0;
        self.shares.clear();
        std::mem::take(&mut self.entries)
    }
}

type Shared = Arc<Mutex<Queue>>;

fn locked(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes recordings.
pub(super) struct Recorder {
    directory: PathBuf,
    queue: Shared,
    worker: OnceLock<Wake>,
}

/// The thread. Its own queue holds no more than the word that there is something.
type Wake = Arc<Worker<()>>;

impl Recorder {
    /// A recorder into `directory`. The directory is made with the first recording, and so is the thread: most VMs have none.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, queue: Shared::default(), worker: OnceLock::new() }
    }

    fn worker(&self) -> io::Result<Wake> {
        if let Some(worker) = self.worker.get() {
            return Ok(worker.clone());
        }
        let source = self.queue.clone();
        let mut writer = Writer::new(self.directory.clone());
        let worker = Worker::start("recorder", 1, move |_: Work<()>| {
            let entries = locked(&source).take();
            for (recording, entry) in entries {
                writer.take(recording, entry);
            }
            writer.flush();
        })?;
        Ok(self.worker.get_or_init(|| Arc::new(worker)).clone())
    }

    /// Begins a recording of `kind` (a word) by user `uid` in `vm`.
    pub(super) fn begin(&self, vm: &str, kind: &str, uid: u32, terminal: Option<&Terminal>) -> Recording {
        let now = jiff::Timestamp::now();
        let name = format!("{}-{uid}-{kind}.{}", now.strftime("%Y%m%dT%H%M%S%.6fZ"), retention::EXTENSION);
        let header = asciicast::header(&format!("{kind} on {vm} by uid {uid}"), terminal, now.as_second());
        let failed = Arc::new(AtomicBool::new(false));
        let mut queue = locked(&self.queue);
        let number = queue.next;
        queue.next = number.wrapping_add(1);
        let start = Entry::Start { name: name.clone(), header, failed: failed.clone() };
        // A system without threads, or a full queue: the session goes on, and its audit record says so.
        let worker = self.worker().ok().filter(|_| queue.push(number, start));
        failed.fetch_or(worker.is_none(), Relaxed);
        drop(queue);
        let (queue, lost) = (self.queue.clone(), AtomicU64::new(0));
        Recording { number, name, since: Instant::now(), queue, worker, failed, lost }
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        if let Some(worker) = self.worker.get() {
            worker.finish(limits::STOP);
        }
    }
}

/// The recording of one session; ended when it is dropped.
pub(super) struct Recording {
    number: u64,
    name: String,
    since: Instant,
    queue: Shared,
    /// `None` if it did not begin.
    worker: Option<Wake>,
    failed: Arc<AtomicBool>,
    lost: AtomicU64,
}

impl Recording {
    /// The file's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it could not be written, or not to the end, as far as is known yet.
    pub(super) fn failed(&self) -> bool {
        self.failed.load(Relaxed)
    }

    /// The terminal shows these bytes.
    pub(super) fn output(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.push(bytes.len(), |at| Entry::Output(at, bytes.to_vec()));
        }
    }

    /// The terminal has another size.
    pub(super) fn resize(&self, size: TerminalSize) {
        self.push(0, |at| Entry::Event(at, Event::Resize(size)));
    }

    /// A word about the session.
    pub(super) fn note(&self, text: String) {
        self.push(0, |at| Entry::Event(at, Event::Note(text)));
    }

    fn push(&self, bytes: usize, entry: impl FnOnce(Duration) -> Entry) {
        let Some(worker) = &self.worker else { return };
        let at = self.since.elapsed();
        let mut queue = locked(&self.queue);
        let lost = self.lost.swap(0, Relaxed);
        let told = lost == 0 || {
            let text = format!("{lost} bytes are missing here, the disk was too slow");
            queue.push(self.number, Entry::Event(at, Event::Note(text)))
        };
        if !told || !queue.push(self.number, entry(at)) {
            let again = if told { 0 } else { lost };
            let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
            self.failed.store(true, Relaxed);
            self.lost.fetch_add(bytes.saturating_add(again), Relaxed);
        }
        drop(queue);
        // A full queue has the word already.
        let _ = worker.send(());
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(worker) = &self.worker {
            locked(&self.queue).push(self.number, Entry::End);
            let _ = worker.send(());
        }
    }
}

/// The thread's half.
struct Writer {
    directory: PathBuf,
    open: BTreeMap<u64, Open>,
    errors: Rate,
}

/// A recording that is being written.
struct Open {
    name: String,
    file: BufWriter<File>,
    text: Text,
    /// How many bytes it may still get.
    left: u64,
    /// The time of the last event.
    at: Duration,
    failed: Arc<AtomicBool>,
}

impl Writer {
    fn new(directory: PathBuf) -> Self {
        Self { directory, open: BTreeMap::new(), errors: Rate::new(limits::NOTES) }
    }

    fn take(&mut self, recording: u64, entry: Entry) {
        let result = match entry {
            Entry::Start { name, header, failed } => {
                match create(&self.directory, &name, &self.open_names(), &header) {
                    Ok((file, left)) => {
                        let open =
                            Open { name, file, text: Text::default(), left, at: Duration::ZERO, failed };
                        self.open.insert(recording, open);
                        return;
                    }
                    Err(error) => {
                        failed.store(true, Relaxed);
                        return self.tell(&name, &error);
                    }
                }
            }
            // Of a recording that is full, or that failed, there is nothing here.
            entry => match self.open.get_mut(&recording) {
                Some(open) => open.write(entry),
                None => return,
            },
        };
        self.settle(recording, result);
    }

    /// Keeps a recording open or not, as a write to it has turned out.
    fn settle(&mut self, recording: u64, result: io::Result<More>) {
        match result {
            Ok(More::Yes) => {}
            Ok(More::No) => drop(self.open.remove(&recording)),
            Err(error) => {
                if let Some(open) = self.open.remove(&recording) {
                    open.failed.store(true, Relaxed);
                    // What is buffered would be tried again by the drop, and fail again.
                    let _ = open.file.into_parts();
                    self.tell(&open.name, &error);
                }
            }
        }
    }

    fn flush(&mut self) {
        let numbers: Vec<_> = self.open.keys().copied().collect();
        for number in numbers {
            let flushed = self.open.get_mut(&number).map_or(Ok(()), |open| open.file.flush());
            self.settle(number, flushed.map(|()| More::Yes));
        }
    }

    fn open_names(&self) -> BTreeSet<OsString> {
        self.open.values().map(|open| open.name.clone().into()).collect()
    }

    fn tell(&mut self, name: &str, error: &io::Error) {
        if self.errors.admit(Instant::now()) {
            let path = self.directory.join(name);
            let _ = writeln!(io::stderr(), "Cannot write recording {}: {error}", path.display());
        }
    }
}

fn create(
    directory: &Path,
    name: &str,
    open: &BTreeSet<OsString>,
    header: &str,
) -> io::Result<(BufWriter<File>, u64)> {
    match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    retention::make_room(directory, open)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(directory.join(name))?;
    let mut file = BufWriter::new(file);
    file.write_all(header.as_bytes())?;
    let header = u64::try_from(header.len()).unwrap_or(u64::MAX);
    Ok((file, limits::RECORDING_BYTES.saturating_sub(header).saturating_sub(LAST_LINE)))
}

/// Whether a recording goes on.
enum More {
    Yes,
    No,
}

impl Open {
    fn write(&mut self, entry: Entry) -> io::Result<More> {
        let (at, event) = match entry {
            Entry::Output(at, bytes) => (at, Event::Output(self.text.push(&bytes))),
            Entry::Event(at, event) => (at, event),
            Entry::End | Entry::Start { .. } => {
                let rest = self.text.end();
                if !rest.is_empty() {
                    self.line(self.at, &Event::Output(rest))?;
                }
                self.file.flush()?;
                return Ok(More::No);
            }
        };
        self.at = at;
        // A piece of a character only.
        if event == Event::Output(String::new()) {
            return Ok(More::Yes);
        }
        self.line(at, &event)
    }

    fn line(&mut self, at: Duration, event: &Event) -> io::Result<More> {
        let line = asciicast::line(at, event);
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if let Some(left) = self.left.checked_sub(length) {
            self.left = left;
            self.file.write_all(line.as_bytes())?;
            return Ok(More::Yes);
        }
        self.failed.store(true, Relaxed);
        let words = format!("The recording ends here, at its limit of {} bytes", limits::RECORDING_BYTES);
        self.file.write_all(asciicast::line(at, &Event::Note(words)).as_bytes())?;
        self.file.flush()?;
        Ok(More::No)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn lines(directory: &Path) -> Vec<serde_json::Value> {
        let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let path = files.remove(0);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_session_is_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("sessions");
        let recorder = Recorder::new(directory.clone());
        let recording = recorder.begin("builder", "shell", 1000, None);
        let name = recording.name().to_owned();
        assert!(name.ends_with("Z-1000-shell.cast"), "{name}");
        recording.output(b"gr\xc3");
        recording.output(b"\xbc\xc3\x9f dich\r\n");
        recording.resize(TerminalSize { rows: 1, columns: 2 });
        recording.output(b"\xe2");
        recording.note("left".into());
        drop(recording);
        recorder.finish();
        let lines = lines(&directory);
        assert_eq!((&lines[0]["version"], &lines[0]["width"]), (&2.into(), &80.into()));
        assert_eq!(lines[0]["title"], "shell on builder by uid 1000");
        let events: Vec<_> = lines[1..].iter().map(|line| format!("{}{}", line[1], line[2])).collect();
        assert_eq!(
            events,
            ["\"o\"\"gr\"", "\"o\"\"üß dich\\r\\n\"", "\"r\"\"2x1\"", "\"m\"\"left\"", "\"o\"\"\u{fffd}\""]
        );
        assert_eq!(
            fs::read_dir(&directory).unwrap().next().unwrap().unwrap().file_name(),
            OsString::from(name)
        );
    }

    #[test]
    fn vs8_output_without_end_is_capped_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::new(directory.path().into());
        let recording = recorder.begin("builder", "shell", 1000, None);
        let block = [0x1b; 64 << 10];
        let mut rounds = 0;
        // Each of these bytes is six in the file.
        while fs::read_dir(directory.path()).unwrap().next().is_none_or(|entry| {
            entry.unwrap().metadata().unwrap().len() < limits::RECORDING_BYTES - 6 * 65536 - 1024
        }) {
            recording.output(&block);
            rounds += 1;
            assert!(rounds < 1_000_000);
            std::thread::sleep(Duration::from_micros(200));
        }
        for _ in 0..20 {
            recording.output(&block);
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(recording);
        recorder.finish();
        let lines = lines(directory.path());
        let last = lines.last().unwrap();
        assert_eq!(
            (&last[1], &last[2]),
            (&"m".into(), &"The recording ends here, at its limit of 8388608 bytes".into())
        );
        let length =
            fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap().metadata().unwrap().len();
        assert!(length <= limits::RECORDING_BYTES);
    }

    #[test]
    fn a_disk_that_hangs_loses_and_counts() {
        let mut queue = Queue::default();
        assert!(queue.push(0, Entry::Start { name: "x".into(), header: "y".into(), failed: Arc::default() }));
        let mut taken = 0;
        while queue.push(0, Entry::Output(Duration::ZERO, vec![0; 1])) {
            taken += 1;
        }
        assert!(taken < limits::RECORDING_QUEUE / ENTRY, "Small pieces count as what they take");
        assert!(queue.push(0, Entry::End), "An end always has its place");
        let worker = Arc::new(Worker::start("test", 1, |_: Work<()>| {}).unwrap());
        let recording = Recording {
            number: 0,
            name: "x".into(),
            since: Instant::now(),
            queue: Arc::new(Mutex::new(queue)),
            worker: Some(worker),
            failed: Arc::default(),
            lost: AtomicU64::new(0),
        };
        recording.output(b"12345");
        recording.output(b"678");
        assert!(recording.failed());
        assert_eq!(recording.lost.load(Relaxed), 8);
        *locked(&recording.queue) = Queue::default();
        recording.output(b"9");
        let queue = locked(&recording.queue);
        let words = "8 bytes are missing here, the disk was too slow";
        assert!(matches!(&queue.entries[0].1, Entry::Event(_, Event::Note(text)) if text == words));
        assert!(matches!(&queue.entries[1].1, Entry::Output(_, bytes) if bytes == b"9"));
    }

    #[test]
    fn vs8_a_session_that_floods_loses_of_its_own_recording_only() {
        let mut queue = Queue::default();
        let flood = |queue: &mut Queue| {
            let before = queue.cost;
            while queue.push(1, Entry::Output(Duration::ZERO, vec![0; 5000])) {}
            queue.cost - before
        };
        let taken = flood(&mut queue);
        assert!(taken <= limits::RECORDING_SHARE && taken > limits::RECORDING_SHARE / 2, "{taken}");
        for other in 2..5 {
            assert!(queue.push(other, Entry::Output(Duration::ZERO, vec![0; limits::RECORDING_SHARE / 2])));
        }
        assert!(queue.push(1, Entry::End), "An end always has its place");
        assert_eq!(queue.take().len(), taken.div_ceil(5000 + ENTRY) + 4);
        assert_eq!(flood(&mut queue), taken, "The thread has made room");
    }

    #[test]
    fn a_new_recording_makes_the_oldest_go_but_none_that_is_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let recorder = Recorder::new(directory.path().into());
        let open = recorder.begin("builder", "shell", 0, None);
        open.output(b"x");
        let started = Instant::now();
        while !path(open.name()).exists() {
            assert!(started.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        // Later by their names than the one that is open.
        for n in 1..limits::RECORDINGS {
            fs::write(path(&format!("9{n:04}.cast")), "").unwrap();
        }
        let new = recorder.begin("builder", "exec", 0, None);
        let names = (open.name().to_owned(), new.name().to_owned());
        drop((open, new));
        recorder.finish();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), limits::RECORDINGS);
        assert!(path(&names.0).exists() && path(&names.1).exists());
        assert!(!path("90001.cast").exists() && path("90002.cast").exists());
    }

    #[test]
    fn a_directory_that_cannot_be_made_fails_the_recording_only() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::new(directory.path().join("missing/sessions"));
        let recording = recorder.begin("builder", "exec", 1, None);
        recording.output(b"x");
        let failed = recording.failed.clone();
        drop(recording);
        recorder.finish();
        assert!(failed.load(Relaxed));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
