//! The audit log: one JSON line for each connection and session, at its end; refusals at once.
//!
//! Above [`limits::REFUSALS`] a second, refusals share one line that counts them. A log that cannot be written is
//! said once on standard error and counted; it stops no link.

use super::{
    limits,
    rate::Rate,
    worker::{Work, Worker},
};
use serde::Serialize;
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Records that wait for the disk.
const QUEUE: usize = 8192;

/// The rights of the log: its group may read it.
const MODE: u32 = 0o640;

/// What a record is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Subject {
    /// A connection over a link.
    Link { link: String },
    /// A command in the guest.
    Exec { command: Vec<String> },
    /// Root's login shell in the guest.
    Shell,
    /// The guest's console.
    Console { read_only: bool },
    /// An operator's connection to a port of the guest.
    Connect { port: u32 },
    /// Credentials for the guest.
    Credentials {
        given: Vec<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        revoked: Vec<String>,
    },
    /// A client of the session socket that did not come as far as one of the two.
    Session,
    /// Refusals above the rate, without a line of their own.
    Refusals { suppressed: u64 },
    /// Records that found the queue to the disk full.
    Lost { lost: u64 },
}

/// Whether it was allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Allowed,
    Refused,
}

/// One line of the log.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Record {
    /// RFC 3339, UTC.
    time: jiff::Timestamp,
    #[serde(flatten)]
    subject: Subject,
    from: String,
    to: String,
    /// The local user who opened it, where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    verdict: Verdict,
    /// Why it was refused, or why an allowed one ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// How the command ended: its exit status.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<i32>,
    /// How the command ended: the signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
    /// The file with the recording of its terminal, in the VM's directory of recordings.
    #[serde(skip_serializing_if = "Option::is_none")]
    recording: Option<String>,
    /// Its recording could not be written, or not to its end.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    recording_failed: bool,
    bytes_out: u64,
    bytes_in: u64,
    duration_ms: u64,
}

/// How an allowed connection or session went.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) reason: Option<String>,
    pub(super) status: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) recording: Option<String>,
    pub(super) recording_failed: bool,
    pub(super) bytes_out: u64,
    pub(super) bytes_in: u64,
    pub(super) duration: Duration,
}

/// Who wants what from whom: the part of a record that is known at its start.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    pub(super) subject: Subject,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) uid: Option<u32>,
}

impl Attempt {
    fn record(self, verdict: Verdict, outcome: Outcome) -> Record {
        let now = jiff::Timestamp::now();
        Record {
            time: now.round(jiff::Unit::Millisecond).unwrap_or(now),
            subject: self.subject,
            from: self.from,
            to: self.to,
            uid: self.uid,
            verdict,
            reason: outcome.reason,
            status: outcome.status,
            signal: outcome.signal,
            recording: outcome.recording,
            recording_failed: outcome.recording_failed,
            bytes_out: outcome.bytes_out,
            bytes_in: outcome.bytes_in,
            duration_ms: u64::try_from(outcome.duration.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// The log, and the thread that writes it.
pub(super) struct Audit {
    worker: Worker<Record>,
    refusals: Arc<Mutex<Rate>>,
    lost: Arc<AtomicU64>,
}

impl Audit {
    /// Opens the log at `path` for the VM `vm`.
    pub(super) fn start(path: PathBuf, vm: String) -> io::Result<Self> {
        let refusals = Arc::new(Mutex::new(Rate::new(limits::REFUSALS)));
        let lost = Arc::new(AtomicU64::new(0));
        let (rate, missed) = (refusals.clone(), lost.clone());
        let mut log = Log::new(path);
        let worker = Worker::start("audit", QUEUE, move |work| {
            let ended = matches!(work, Work::End);
            if let Work::Item(record) = work {
                log.append(&record);
            }
            let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
            let suppressed = if ended { rate.rest() } else { rate.suppressed(Instant::now()) };
            drop(rate);
            let lost = Some(missed.swap(0, Relaxed)).filter(|lost| *lost > 0);
            let counts = [
                suppressed.map(|suppressed| (Subject::Refusals { suppressed }, Verdict::Refused)),
                lost.map(|lost| (Subject::Lost { lost }, Verdict::Allowed)),
            ];
            for (subject, verdict) in counts.into_iter().flatten() {
                let attempt = Attempt { subject, from: vm.clone(), to: String::new(), uid: None };
                log.append(&attempt.record(verdict, Outcome::default()));
            }
        })?;
        Ok(Self { worker, refusals, lost })
    }

    fn send(&self, record: Record) {
        if !self.worker.send(record) {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Records the end of an allowed connection or session.
    pub(super) fn ended(&self, attempt: Attempt, outcome: Outcome) {
        self.send(attempt.record(Verdict::Allowed, outcome));
    }

    /// Records a refusal, or counts it.
    pub(super) fn refused(&self, attempt: Attempt, reason: String) {
        let admitted = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        if admitted {
            let outcome = Outcome { reason: Some(reason), ..Outcome::default() };
            self.send(attempt.record(Verdict::Refused, outcome));
        }
    }

    /// Writes what is left.
    pub(super) fn finish(&self, limit: Duration) {
        self.worker.finish(limit);
    }
}

/// The file, opened when it is first needed and again after an error.
struct Log {
    path: PathBuf,
    file: Option<File>,
    lost: u64,
}

impl Log {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, lost: 0 }
    }

    fn append(&mut self, record: &Record) {
        match self.try_append(record) {
            Ok(()) if self.lost > 0 => {
                let _ = writeln!(
                    io::stderr(),
                    "Audit log {} works again, {} records are lost",
                    self.path.display(),
                    self.lost
                );
                self.lost = 0;
            }
            Ok(()) => {}
            Err(error) => {
                if self.lost == 0 {
                    let _ =
                        writeln!(io::stderr(), "Cannot write to audit log {}: {error}", self.path.display());
                }
                self.lost = self.lost.saturating_add(1);
                self.file = None;
            }
        }
    }

    fn try_append(&mut self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(open(&self.path)?),
        };
        // One write: lines of two processes do not mix.
        file.write_all(&line)
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(MODE).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> Attempt {
        let subject = Subject::Link { link: "store".into() };
        Attempt { subject, from: "builder".into(), to: "hydra".into(), uid: None }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn vs5_a_flood_of_refusals_is_a_few_lines_and_a_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = Audit::start(path.clone(), "builder".into()).unwrap();
        for _ in 0..5000 {
            audit.refused(attempt(), "no".into());
        }
        let outcome = Outcome { bytes_out: 5, bytes_in: 7, ..Outcome::default() };
        audit.ended(attempt(), outcome);
        audit.finish(Duration::from_secs(10));
        let lines = lines(&path);
        let suppressed: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
        let told = lines.iter().filter(|line| line["reason"] == "no").count();
        assert_eq!(suppressed + u64::try_from(told).unwrap(), 5000);
        assert!(told <= 30 && lines.len() <= 40, "{} lines", lines.len());
        let ended = lines.iter().find(|line| line["verdict"] == "allowed").unwrap();
        assert_eq!((&ended["bytes_out"], &ended["bytes_in"]), (&5.into(), &7.into()));
        assert!(ended["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nothing_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing").join("audit");
        let mut log = Log::new(path.clone());
        let record = attempt().record(Verdict::Allowed, Outcome::default());
        log.append(&record);
        log.append(&record);
        assert_eq!(log.lost, 2);
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        log.append(&record);
        assert_eq!((log.lost, lines(&path).len()), (0, 1));
    }
}
