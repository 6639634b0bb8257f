//! What goes wrong for an operator, and its exit status.

use crate::output::{harmless, harmless_json};
use lair_vmm::{
    api::{client::ClientError, types::ErrorKind},
    fleet::Problems,
};
use serde::Serialize;
use std::process::ExitCode;

/// The exit status of a refused fleet file.
pub(crate) const INVALID: u8 = 2;

/// An error with its exit status.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CommandError {
    #[serde(skip)]
    status: u8,
    /// What kind it is, in one word.
    kind: &'static str,
    message: String,
    /// What may help.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl CommandError {
    /// Exit status 1.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: 1, kind: "failed", message: message.into(), hint: None }
    }

    /// Exit status 5.
    pub(crate) fn timed_out(message: impl Into<String>) -> Self {
        Self { status: 5, kind: "timed_out", message: message.into(), hint: None }
    }

    /// The message on one line.
    pub(crate) fn line(&self) -> String {
        harmless(&self.message).replace(['\n', '\t'], " ")
    }

    /// Prints the error to standard error, as JSON if asked for.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        self.report_as(self.status, json)
    }

    /// Prints the error, for a verb with an exit status of its own.
    pub(crate) fn report_as(&self, status: u8, json: bool) -> ExitCode {
        if json {
            // It has no values that JSON has not.
            eprintln!("{}", harmless_json(&serde_json::to_string(self).unwrap_or_default()));
            return ExitCode::from(status);
        }
        // What is wrong with a fleet file begins with the file's name, line by line, as editors read it.
        let program = if self.status == INVALID { "" } else { "vmctl: " };
        eprintln!("{program}{}", harmless(&self.message));
        if let Some(hint) = &self.hint {
            eprintln!("  {}", harmless(hint));
        }
        ExitCode::from(status)
    }
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        let (status, kind) = match (&error, error.kind()) {
            (ClientError::Down(_), _) => (1, "daemon_down"),
            (_, ErrorKind::Failed) => (1, "failed"),
            (_, ErrorKind::Version) => (1, "version"),
            (_, ErrorKind::Busy) => (1, "busy"),
            (_, ErrorKind::Invalid) => (INVALID, "invalid"),
            (_, ErrorKind::NotPermitted) => (3, "not_permitted"),
            (_, ErrorKind::NotFound) => (4, "not_found"),
            (_, ErrorKind::TimedOut) => (5, "timed_out"),
        };
        Self { status, kind, message: lair_vmm::error::chain(&error), hint: error.hint() }
    }
}

impl From<Problems> for CommandError {
    fn from(problems: Problems) -> Self {
        Self { status: INVALID, kind: "invalid", message: problems.to_string(), hint: None }
    }
}

impl From<std::io::Error> for CommandError {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error.to_string())
    }
}
