//! What goes wrong for an operator, and its exit status.

use crate::output::harmless;
use lair_vmm::{
    api::{client::ClientError, types::ErrorKind},
    fleet::Problems,
};
use std::process::ExitCode;

/// The exit status of a refused fleet file.
pub(crate) const INVALID: u8 = 2;

/// An error with its exit status.
#[derive(Debug)]
pub(crate) struct CommandError {
    status: u8,
    message: String,
}

impl CommandError {
    /// Exit status 1.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: 1, message: message.into() }
    }

    /// Exit status 5.
    pub(crate) fn timed_out(message: impl Into<String>) -> Self {
        Self { status: 5, message: message.into() }
    }

    /// Prints the message.
    pub(crate) fn report(self) -> ExitCode {
        self.report_as(self.status)
    }

    /// Prints the message, for a verb with an exit status of its own.
    pub(crate) fn report_as(&self, status: u8) -> ExitCode {
        // What is wrong with a fleet file begins with the file's name, line by line, as editors read it.
        let program = if self.status == INVALID { "" } else { "vmctl: " };
        eprintln!("{program}{}", harmless(&self.message));
        ExitCode::from(status)
    }
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        let status = match error.kind() {
            ErrorKind::Failed => 1,
            ErrorKind::Invalid => INVALID,
            ErrorKind::NotPermitted => 3,
            ErrorKind::NotFound => 4,
        };
        Self { status, message: lair_vmm::error::chain(&error) }
    }
}

impl From<Problems> for CommandError {
    fn from(problems: Problems) -> Self {
        Self { status: INVALID, message: problems.to_string() }
    }
}

impl From<std::io::Error> for CommandError {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error.to_string())
    }
}
