//! Why a VM is down that should not be.

use super::part::{Part, Step};
use serde::{Deserialize, Serialize};

/// Why a VM is down that should not be: a closed list, one word each for JSON and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Failure {
    /// It was to start by itself, and the host has no room or no program for it.
    #[error("{message}")]
    NotAdmitted {
        /// Why.
        message: String,
    },
    /// A step of its start failed.
    #[error("in the step {}: {message}", step.word())]
    StepFailed {
        /// The step.
        step: Step,
        /// Why.
        message: String,
    },
    /// Its services were not up in time.
    #[error("the guest did not become ready in time")]
    ReadyTimeout,
    /// One of its processes ended.
    #[error("{part} {how}")]
    ProcessEnded {
        /// Which.
        part: Part,
        /// How, in words.
        how: String,
    },
    /// The guest's kernel panicked.
    #[error("the guest's kernel panicked")]
    GuestPanic,
    /// Neither the guest nor its hypervisor answers.
    #[error("neither the guest's agent nor the hypervisor answers")]
    Unresponsive,
    /// The guest powered itself off, and is to run always.
    #[error("the guest powered itself off")]
    PoweredOff,
    /// It was started again and again.
    #[error(
        "it was started {starts} times in {minutes} minutes and is not started again by itself; the last time {last}"
    )]
    TooManyStarts {
        /// How often.
        starts: usize,
        /// In how many minutes.
        minutes: u64,
        /// Why it was down the last time.
        last: Box<Failure>,
    },
}

impl Failure {
    /// One word, also the value of `kind` in JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NotAdmitted { .. } => "not_admitted",
            Self::StepFailed { .. } => "step_failed",
            Self::ReadyTimeout => "ready_timeout",
            Self::ProcessEnded { .. } => "process_ended",
            Self::GuestPanic => "guest_panic",
            Self::Unresponsive => "unresponsive",
            Self::PoweredOff => "powered_off",
            Self::TooManyStarts { .. } => "too_many_starts",
        }
    }

    /// Whether another start may go better. One that failed before anything of the VM ran would fail again.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NotAdmitted { .. } | Self::TooManyStarts { .. } => false,
            Self::StepFailed { step, .. } => step.runs_processes(),
            Self::ReadyTimeout
            | Self::ProcessEnded { .. }
            | Self::GuestPanic
            | Self::Unresponsive
            | Self::PoweredOff => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_is_named_in_json_by_its_word() {
        let ended = Failure::ProcessEnded { part: Part::Shim, how: "killed by SIGSEGV".into() };
        let all = [
            Failure::NotAdmitted { message: "x".into() },
            Failure::StepFailed { step: Step::Index, message: "x".into() },
            Failure::ReadyTimeout,
            Failure::GuestPanic,
            Failure::Unresponsive,
            Failure::PoweredOff,
            Failure::TooManyStarts { starts: 5, minutes: 10, last: Box::new(ended.clone()) },
            ended,
        ];
        for failure in all {
            let json = serde_json::to_value(&failure).unwrap();
            assert_eq!(json["kind"], failure.word());
            assert_eq!(serde_json::from_value::<Failure>(json).unwrap(), failure);
        }
    }
}
