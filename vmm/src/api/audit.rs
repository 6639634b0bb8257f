//! Who asked for what: one JSON line per attempt, refusals included.

use serde::Serialize;
use std::{
    fs::OpenOptions,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// One attempt.
#[derive(Debug, Clone, Serialize)]
pub struct Attempt<'a> {
    /// When.
    pub time: jiff::Timestamp,
    /// Who, by the peer's credentials.
    pub uid: u32,
    /// What, such as `start`.
    pub verb: &'a str,
    /// To which VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<&'a str>,
    /// More about what, such as the command of an exec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// `allowed` or `refused`.
    pub verdict: &'a str,
    /// Why it was refused or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The log of attempts, only ever appended to.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    failing: Mutex<bool>,
}

impl AuditLog {
    /// A log at `path`, which is made with its first record.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), failing: Mutex::new(false) }
    }

    /// Appends a record. A failure is reported once, until a record is written again.
    pub fn record(&self, attempt: &Attempt<'_>) {
        let mut failing = self.failing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match self.append(attempt) {
            Ok(()) => *failing = false,
            Err(error) if !*failing => {
                tracing::error!(path = %self.path.display(), %error, "cannot write the audit log");
                *failing = true;
            }
            Err(_) => {}
        }
    }

    fn append(&self, attempt: &Attempt<'_>) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(attempt)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)?;
        // One write: records of several threads do not mix.
        file.write_all(&line)
    }
}
