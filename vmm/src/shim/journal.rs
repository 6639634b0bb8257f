//! The guest's journal on the host: in the host's, under the VM's name; or in a bounded file where the host has none.
//!
//! A guest has a say in what its entries tell, and in nothing else: the fields are these, whatever it sends.
//!
//! | field | |
//! |---|---|
//! | `LAIR_VM` | the VM |
//! | `MESSAGE`, `PRIORITY` | the guest's, cut |
//! | `SYSLOG_IDENTIFIER` | `VM/NAME`: no program that watches the host's `sshd` takes a guest's for it |
//! | `LAIR_UNIT`, `LAIR_REALTIME` | the unit in the guest; when, by the guest's clock, in microseconds since 1970 |

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    config::JournalTarget,
    limits,
    rate::Rate,
    ring::Ring,
    worker::{Work, Worker},
};
use lair_guest::wire::message::JournalEntry;
use std::{
    io::{self, ErrorKind, Write},
    os::unix::net::UnixDatagram,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Entries that wait for the journal or the disk.
const QUEUE: usize = 1024;

/// The longest message, in characters.
const MESSAGE: usize = 4096;

/// The longest name of a program or unit, in characters.
const NAME: usize = 256;

/// The guest's journal, and the thread that writes it.
pub(super) struct Journal {
    worker: Worker<JournalEntry>,
    rate: Mutex<Rate>,
    lost: Mutex<u64>,
}

impl Journal {
    /// The journal of the VM `vm`.
    pub(super) fn start(vm: &str, target: &JournalTarget) -> io::Result<Self> {
        let mut sink = Sink::new(vm, target)?;
        let worker = Worker::start("journal", QUEUE, move |work| {
            if let Work::Item(entry) = work {
                sink.write(&entry);
            }
        })?;
        Ok(Self { worker, rate: Mutex::new(Rate::new(limits::JOURNAL)), lost: Mutex::default() })
    }

    /// Takes entries. What comes too fast, in the guest or here, is told once it is over.
    pub(super) fn take(&self, entries: Vec<JournalEntry>) {
        let now = Instant::now();
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in entries {
            let suppressed = rate.suppressed(now).unwrap_or_default();
            *lost = lost.saturating_add(suppressed).saturating_add(entry.dropped_before);
            if !rate.admit(now) {
                continue;
            }
            if *lost > 0 && self.worker.send(left_out(*lost)) {
                *lost = 0;
            }
            if !self.worker.send(entry) {
                *lost = lost.saturating_add(1);
            }
        }
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        self.worker.finish(limits::STOP);
    }
}

/// What stands in the place of entries that are not there.
fn left_out(count: u64) -> JournalEntry {
    JournalEntry {
        message: format!("{count} entries of this guest's journal were left out: too many at once"),
        priority: 4,
        identifier: "lair".into(),
        unit: String::new(),
        realtime_us: 0,
        dropped_before: 0,
    }
}

/// Where entries go.
struct Sink {
    vm: String,
    socket: UnixDatagram,
    host: PathBuf,
    log: Ring,
    shown: String,
}

impl Sink {
    fn new(vm: &str, target: &JournalTarget) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        // A journal that hangs must not hang this thread for ever: its queue is the buffer.
        socket.set_write_timeout(Some(limits::STOP))?;
        Ok(Self {
            vm: vm.into(),
            socket,
            host: target.socket.clone(),
            log: Ring::new(target.log.clone(), target.limit),
            shown: target.log.display().to_string(),
        })
    }

    fn write(&mut self, entry: &JournalEntry) {
        match self.socket.send_to(&native(&self.vm, entry), &self.host) {
            Ok(_) => {}
            // There is none, or it does not listen now.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                if let Err(error) = self.log.append(line(jiff::Timestamp::now(), entry).as_bytes()) {
                    let _ = writeln!(io::stderr(), "Cannot write to journal {}: {error}", self.shown);
                }
            }
            Err(error) => {
                let path = self.host.display();
                let _ = self.log.append(line(jiff::Timestamp::now(), entry).as_bytes()).map_err(|_| {
                    let _ = writeln!(io::stderr(), "Cannot write to journal {path}: {error}");
                });
            }
        }
    }
}

/// An entry in the host's native format (systemd's "Native Journal Protocol"): each field with its length, so that no value can hold
/// another field.
fn native(vm: &str, entry: &JournalEntry) -> Vec<u8> {
    let identifier = format!("{vm}/{}", name(&entry.identifier));
    let mut fields = vec![
        ("LAIR_VM", vm.to_owned()),
        ("SYSLOG_IDENTIFIER", identifier),
        ("PRIORITY", priority(entry).to_string()),
        ("MESSAGE", message(&entry.message)),
    ];
    if !entry.unit.is_empty() {
        fields.push(("LAIR_UNIT", name(&entry.unit)));
    }
    if entry.realtime_us > 0 {
        fields.push(("LAIR_REALTIME", entry.realtime_us.to_string()));
    }
    let mut datagram = Vec::new();
    for (field, value) in fields {
        datagram.extend_from_slice(field.as_bytes());
        datagram.push(b'\n');
        datagram.extend_from_slice(&u64::try_from(value.len()).unwrap_or(u64::MAX).to_le_bytes());
        datagram.extend_from_slice(value.as_bytes());
        datagram.push(b'\n');
    }
    datagram
}

/// An entry as lines of the file, by the host's clock. Only its first line begins at the margin: a guest cannot make up another entry.
fn line(time: jiff::Timestamp, entry: &JournalEntry) -> String {
    let unit = if entry.unit.is_empty() { String::new() } else { format!("[{}]", name(&entry.unit)) };
    format!(
        "{time:.3} <{}> {}{unit}: {}\n",
        priority(entry),
        name(&entry.identifier),
        message(&entry.message).replace('\n', "\n    ")
    )
}

/// How urgent it is: at most 1. With 0 the host's journald would write it on every terminal there.
fn priority(entry: &JournalEntry) -> u8 {
    entry.priority.clamp(1, 7)
}

/// A message without anything that a terminal would obey; it may have several lines.
fn message(text: &str) -> String {
    harmless(text, MESSAGE, |c| c == '\n' || c == '\t')
}

/// A name in one word.
fn name(text: &str) -> String {
    let name = harmless(text, NAME, |_| false).replace(char::is_whitespace, "_");
    if name.is_empty() { "-".into() } else { name }
}

fn harmless(text: &str, longest: usize, allowed: impl Fn(char) -> bool) -> String {
    let kept = text.chars().take(longest);
    kept.map(|c| if c.is_control() && !allowed(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeMap, fs, time::Duration};

    fn entry(message: &str) -> JournalEntry {
        JournalEntry {
            message: message.into(),
            priority: 3,
            identifier: "sshd".into(),
            unit: "sshd.service".into(),
            realtime_us: 1_700_000_000_000_001,
            dropped_before: 0,
        }
    }

    /// The fields of a datagram, as journald reads them.
    fn fields(mut datagram: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while let Some(end) = datagram.iter().position(|byte| *byte == b'\n') {
            let (name, rest) = datagram.split_at(end);
            let (length, rest) = rest[1..].split_at(8);
            let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap();
            let (value, rest) = rest.split_at(length);
            assert_eq!(rest[0], b'\n');
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            assert!(fields.insert(text(name), text(value)).is_none());
            datagram = &rest[1..];
        }
        assert!(datagram.is_empty());
        fields
    }

    fn target(dir: &std::path::Path) -> JournalTarget {
        JournalTarget { socket: dir.join("socket"), log: dir.join("journal.log"), limit: 1 << 20 }
    }

    #[test]
    fn vs3_a_guest_speaks_in_its_own_fields_only() {
        let evil = JournalEntry {
            message: "a\nLAIR_VM=other\n_UID=0\n\u{1b}[2J".into(),
            priority: 200,
            identifier: "x\nPRIORITY=0 y".into(),
            unit: "u\u{7}".into(),
            ..entry("")
        };
        let fields = fields(&native("hydra", &evil));
        let expected = [
            ("LAIR_REALTIME", "1700000000000001"),
            ("LAIR_UNIT", "u\u{fffd}"),
            ("LAIR_VM", "hydra"),
            ("MESSAGE", "a\nLAIR_VM=other\n_UID=0\n\u{fffd}[2J"),
            ("PRIORITY", "7"),
            ("SYSLOG_IDENTIFIER", "hydra/x\u{fffd}PRIORITY=0_y"),
        ];
        assert_eq!(fields, expected.map(|(field, value)| (field.to_string(), value.to_string())).into());
        let lines = line(jiff::Timestamp::UNIX_EPOCH, &evil);
        assert_eq!(
            lines,
            "1970-01-01T00:00:00.000Z <7> x\u{fffd}PRIORITY=0_y[u\u{fffd}]: a\n    LAIR_VM=other\n    _UID=0\n    \u{fffd}[2J\n"
        );
    }

    #[test]
    fn vs3_a_guest_writes_on_no_terminal_of_the_host() {
        for (theirs, ours) in [(0, "1"), (1, "1"), (7, "7"), (8, "7")] {
            let entry = JournalEntry { priority: theirs, ..entry("") };
            assert_eq!(fields(&native("hydra", &entry))["PRIORITY"], ours);
            assert!(line(jiff::Timestamp::UNIX_EPOCH, &entry).contains(&format!("<{ours}>")));
        }
    }

    #[test]
    fn entries_go_to_the_hosts_journal_if_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = target(dir.path());
        let host = UnixDatagram::bind(&target.socket).unwrap();
        let journal = Journal::start("hydra", &target).unwrap();
        journal.take(vec![entry("one"), entry("two")]);
        journal.finish();
        let mut datagram = vec![0; 1 << 16];
        for message in ["one", "two"] {
            let length = host.recv(&mut datagram).unwrap();
            assert_eq!(fields(&datagram[..length])["MESSAGE"], message);
        }
        assert!(!target.log.exists());
    }

    #[test]
    fn without_one_they_go_to_a_bounded_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = JournalTarget { limit: 1000, ..target(dir.path()) };
        let mut sink = Sink::new("hydra", &target).unwrap();
        for n in 0..100 {
            sink.write(&entry(&format!("entry {n}")));
        }
        let text = fs::read_to_string(&target.log).unwrap();
        assert!(text.ends_with("<3> sshd[sshd.service]: entry 99\n"), "{text}");
        let size: u64 =
            fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(size <= 2000, "{size}");
        // A journal that was not there for a while.
        let host = UnixDatagram::bind(&target.socket).unwrap();
        sink.write(&entry("later"));
        let mut datagram = vec![0; 1 << 16];
        let length = host.recv(&mut datagram).unwrap();
        assert_eq!(fields(&datagram[..length])["MESSAGE"], "later");
    }

    #[test]
    fn vs5_a_flood_is_a_bounded_number_of_entries_and_a_count() {
        let dir = tempfile::tempdir().unwrap();
        let target = target(dir.path());
        let journal = Journal::start("hydra", &target).unwrap();
        for _ in 0..1000 {
            journal.take(vec![entry("flood"); 10]);
        }
        std::thread::sleep(Duration::from_millis(1100));
        journal.take(vec![JournalEntry { dropped_before: 5, ..entry("after") }]);
        journal.finish();
        let text = fs::read_to_string(&target.log).unwrap();
        let passed = u64::try_from(text.matches("flood").count()).unwrap();
        let words: Vec<_> = text.lines().filter(|line| line.contains("left out")).collect();
        let left_out: u64 = words
            .iter()
            .map(|line| line.split_once(": ").unwrap().1.split(' ').next().unwrap().parse::<u64>().unwrap())
            .sum();
        assert_eq!(passed + left_out, 10_005, "{words:?}");
        assert!(passed < 10_000 && text.ends_with("after\n"), "{passed}");
    }
}
