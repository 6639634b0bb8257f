//! Who asked for what: one JSON line per attempt, refusals included.
//!
//! Above a rate, the attempts of a uid share one line that counts them, refusals and others apart: a flood of refusals hides nothing
//! that was done. A record is on disk before its attempt is answered, where the disk is not too slow for that. A log that cannot be
//! written is said once and counted, and stops nothing.

mod file;
mod rates;
pub(super) mod read;
mod writer;

use super::{access::Role, limits};
use file::LogFile;
use rates::Rates;
use schemars::JsonSchema;
use serde::Serialize;
use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, time::timeout};
use writer::{Line, Writer};

/// Whether it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was.
    Allowed,
    /// It was not: the caller may not, or it could not be done.
    Refused,
}

/// One attempt.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Attempt {
    /// When it ended.
    pub time: jiff::Timestamp,
    /// Who, by the peer's credentials.
    pub uid: u32,
    /// The peer's group.
    pub gid: u32,
    /// The role that the peer has.
    pub role: Option<Role>,
    /// What, such as `start`.
    pub verb: &'static str,
    /// To which VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// More about what, such as the command of an exec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Whether it was done.
    pub verdict: Verdict,
    /// Why it was refused or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long it took to answer.
    pub duration_ms: u64,
}

/// What `laird` did with a device, by itself or for a VM, and what was said against it.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct DeviceRecord {
    /// When.
    pub time: jiff::Timestamp,
    /// `device`: its state has changed. `fault`: a guest has said something against it. `lease`: one is over.
    pub kind: &'static str,
    /// The lowest address of the devices that go together.
    pub device: String,
    /// The VM that has it, or is to have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Its state, and more about it; what was said; what came of the lease.
    pub detail: String,
}

/// Attempts that share a record.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Counted {
    /// When they were counted.
    time: jiff::Timestamp,
    /// Whose; none for those of uids beyond the number that is kept apart.
    uid: Option<u32>,
    /// What was attempted; none likewise.
    verb: Option<&'static str>,
    /// What came of them.
    verdict: Verdict,
    /// How many.
    suppressed: u64,
}

/// Records that found the queue to the disk full.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Lost {
    /// When that was written.
    time: jiff::Timestamp,
    /// How many.
    lost: u64,
}

/// The log of attempts, only ever appended to, and the thread that writes it.
pub struct AuditLog {
    writer: Writer,
    rates: Arc<Mutex<Rates>>,
    lost: Arc<AtomicU64>,
}

impl std::fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuditLog").finish_non_exhaustive()
    }
}

impl AuditLog {
    /// A log at `path`, which is made with its first record. `unwritten` counts the records that no disk has.
    pub fn start(path: &Path, unwritten: Arc<AtomicU64>) -> io::Result<Self> {
        let rates = Arc::new(Mutex::new(Rates::default()));
        let lost = Arc::new(AtomicU64::new(0));
        let log = LogFile::new(path.into(), limits::AUDIT_FILE, unwritten);
        let writer = Writer::start(log, Arc::clone(&rates), Arc::clone(&lost))?;
        Ok(Self { writer, rates, lost })
    }

    /// Records an attempt, or counts it; `true` if it has a line of its own. It returns when that is on disk, or after
    /// two seconds.
    pub async fn record(&self, mut attempt: Attempt) -> bool {
        let admitted = {
            let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
            rates.admit(attempt.uid, attempt.verb, attempt.verdict, Instant::now())
        };
        if !admitted {
            return false;
        }
        // A path may name what no VM can be called.
        shorten(&mut attempt.vm, limits::AUDIT_NAME);
        shorten(&mut attempt.detail, limits::AUDIT_TEXT);
        shorten(&mut attempt.reason, limits::AUDIT_TEXT);
        let (written, on_disk) = oneshot::channel();
        if self.writer.send(Line { bytes: line(&attempt), written }) {
            let _ = timeout(limits::AUDIT_PATIENCE, on_disk).await;
        } else {
            self.lost.fetch_add(1, Relaxed);
        }
        true
    }

    /// Records what became of a device.
    pub fn record_device(&self, record: &DeviceRecord) {
        let (written, _) = oneshot::channel();
        if !self.writer.send(Line { bytes: line(record), written }) {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Writes what is left, `limit` long at most.
    pub fn finish(&self, limit: Duration) {
        self.writer.finish(limit);
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        self.finish(Duration::from_secs(1));
    }
}

/// Now, with no more digits than people read.
pub(super) fn now() -> jiff::Timestamp {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Millisecond).unwrap_or(now)
}

fn line(record: &impl Serialize) -> Vec<u8> {
    // These types have no values that JSON has not.
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

fn shorten(text: &mut Option<String>, length: usize) {
    if let Some(text) = text
        && text.len() > length
    {
        text.truncate(text.floor_char_boundary(length));
        text.push_str("...");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(uid: u32, verdict: Verdict) -> Attempt {
        Attempt {
            time: now(),
            uid,
            gid: 4000,
            role: None,
            verb: "start",
            vm: Some("a".into()),
            detail: None,
            verdict,
            reason: None,
            duration_ms: 0,
        }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn cl3_a_flood_of_refusals_is_a_few_lines_and_a_count_and_hides_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let log = AuditLog::start(&path, Arc::default()).unwrap();
        for _ in 0..5000 {
            log.record(attempt(4000, Verdict::Refused)).await;
        }
        assert!(log.record(attempt(4000, Verdict::Allowed)).await);
        assert!(log.record(attempt(4001, Verdict::Refused)).await);
        assert!(log.record(Attempt { verb: "kill", ..attempt(4000, Verdict::Refused) }).await);
        log.finish(Duration::from_secs(10));
        let lines = lines(&path);
        let told = |uid: u32, verdict: &str| {
            lines
                .iter()
                .filter(|l| {
                    l["uid"] == uid
                        && l["verdict"] == verdict
                        && l["verb"] == "start"
                        && l["suppressed"].is_null()
                })
                .count()
        };
        let counted: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
        assert_eq!((told(4000, "allowed"), told(4001, "refused")), (1, 1));
        assert_eq!(counted + u64::try_from(told(4000, "refused")).unwrap(), 5000);
        assert!(told(4000, "refused") >= 20 && lines.len() < 1000, "{}", lines.len());
    }

    #[tokio::test]
    async fn a_record_is_on_disk_when_it_is_told_so_and_is_not_longer_than_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let log = AuditLog::start(&path, Arc::default()).unwrap();
        let long = Some("\u{e9}".repeat(1 << 20));
        let attempt = attempt(1, Verdict::Allowed);
        log.record(Attempt { vm: long.clone(), detail: long.clone(), reason: long, ..attempt }).await;
        let record = &lines(&path)[0];
        for (key, limit) in
            [("vm", limits::AUDIT_NAME), ("detail", limits::AUDIT_TEXT), ("reason", limits::AUDIT_TEXT)]
        {
            let text = record[key].as_str().unwrap();
            assert!(text.ends_with("\u{e9}...") && text.len() <= limit + 3, "{key}");
        }
    }
}
