//! What the machine takes and gives, as data.

use crate::{
    fleet::{limits::OverBudget, schema::Restart},
    host::tools::Missing,
    vm::{
        failure::Failure,
        part::{Part, Stage, Step},
        restart::{History, Moment},
    },
};
use serde::{Deserialize, Serialize};

/// Where a VM is in its life, as it is observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "detail", rename_all = "snake_case")]
pub enum State {
    /// Nothing of it runs.
    Stopped,
    /// A step of the start is being done.
    Starting(Step),
    /// The guest runs and is not ready yet, or no longer (it reboots, or its agent is silent).
    Booting,
    /// The guest's services are up.
    Ready,
    /// The guest has been asked to end.
    Stopping(Stage),
    /// What is left of it is being removed, to become this.
    Cleaning(Outcome),
    /// It failed and is started again after a pause.
    Waiting {
        /// Why it is down.
        failure: Failure,
        /// The pause.
        seconds: u64,
    },
    /// It is down and should not be, for this reason.
    Failed(Failure),
    /// Its runtime state is not to be trusted, for this reason; an operator has to look.
    Quarantined(String),
}

/// What a VM becomes once it is cleaned up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// [`State::Stopped`].
    Stopped,
    /// [`State::Starting`]: it is being restarted.
    Again,
    /// [`State::Failed`] or [`State::Waiting`].
    Failed(Failure),
}

/// What is wanted of a VM, apart from what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// It is to run.
    Running,
    /// It is to be down.
    Stopped,
}

/// Why a guest was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// An operator stops it.
    Stop,
    /// An operator restarts it.
    Restart,
    /// It powers itself off.
    Guest,
    /// It did not become ready in time, or was ready and did not become it again.
    Overdue,
    /// It is no longer in the fleet, or the host shuts down.
    Withdrawn,
}

/// A stop that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Why.
    pub why: Why,
    /// Since when.
    pub began: Moment,
}

/// What ended a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ender {
    /// The guest, by itself.
    Guest,
    /// The agent, when asked.
    Agent,
    /// The power button.
    PowerButton,
    /// SIGTERM to the hypervisor.
    Terminate,
    /// SIGKILL to the hypervisor.
    Kill,
}

/// How the last stop went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopReport {
    /// What ended the guest.
    pub by: Ender,
    /// From the request to the end of the hypervisor, in milliseconds.
    pub took_ms: u64,
}

/// A VM's life: where it is, what is wanted of it, and as much of its past as decides its future.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Life {
    /// Where it is.
    pub state: State,
    /// What is wanted.
    pub wanted: Wanted,
    /// Its starts.
    pub history: History,
    /// Since when it is ready.
    pub ready_since: Option<Moment>,
    /// The stop that is under way.
    pub stop: Option<Stop>,
    /// How the last stop went.
    pub last_stop: Option<StopReport>,
}

/// What happens to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// It should start by itself and may not, for this reason.
    NotAdmitted(String),
    /// A step is done.
    StepDone(Step),
    /// A step failed, for this reason.
    StepFailed(Step, String),
    /// The agent says that all services are up.
    AgentReady,
    /// The control channel to the agent is closed.
    AgentLost,
    /// The hypervisor does not answer either.
    Silent,
    /// The guest powered itself off; the hypervisor is about to end.
    GuestPowerOff,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A process ended, so.
    Ended(Part, String),
    /// The guest could not be asked to end in this way.
    EndFailed(Stage),
    /// The deadline that was set last has passed.
    Deadline,
    /// [`Action::CleanUp`] is done.
    Cleaned,
    /// Something of it still runs after [`Action::CleanUp`].
    NotCleaned(String),
    /// It is to end, beginning with this stage, though no operator asked for that: it is no longer in the fleet, or the host shuts
    /// down.
    Withdraw(Stage),
}

/// What an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Start it.
    Start,
    /// Stop it. One that is quarantined is looked at again, and is stopped if nothing of it runs.
    Stop,
    /// Stop it, then start it.
    Restart,
    /// End it without asking the guest. Of one that is quarantined, whatever runs is ended.
    Kill,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is where the request would bring it, or on the way there.
    #[error("It is already {0}")]
    Already(&'static str),
    /// It is being stopped.
    #[error("It is being stopped; start it when it has stopped")]
    Stopping,
    /// It has failed, and what is left of it is being ended.
    #[error("It has failed ({0}) and is being cleaned up; start it when that is done")]
    Failing(String),
    /// It is quarantined.
    #[error(
        "It is quarantined ({0}); stop it, which looks at it again, or kill it, which ends what is left of it"
    )]
    Quarantined(String),
    /// It is quarantined, and something of it runs.
    #[error("It is quarantined and processes of it run ({0}); kill it to end them")]
    StillRuns(String),
    /// The host has not enough memory.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The host has not all programs.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The host has not the devices that it asks for.
    #[error("{0}")]
    Devices(String),
    /// What is wanted of it cannot be written down, so a later `laird` would not know.
    #[error("{0}")]
    Storage(String),
    /// `laird` is ending VMs, because the host shuts down or the VM is no longer in the fleet.
    #[error("It is being withdrawn: the host shuts down, or it is no longer in the fleet")]
    Withdrawn,
    /// Its task ended before it answered.
    #[error("Its task ended before it answered; see its status")]
    Lost,
}

/// How long something may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// A boot, from resume to ready.
    Boot,
    /// A stage of stopping.
    Stop(Stage),
    /// The pause before it is started again, in seconds.
    Pause(u64),
}

/// What the executor has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Perform a step; answer with [`Input::StepDone`], [`Input::StepFailed`] or, for the first, [`Input::NotAdmitted`].
    Perform(Step),
    /// Ask the guest to end, this hard; [`Input::EndFailed`] if that is not possible.
    End(Stage),
    /// Send [`Input::Deadline`] after a while; an earlier deadline no longer counts.
    Expect(Patience),
    /// No deadline counts any more.
    Relax,
    /// Ask the hypervisor whether it lives; [`Input::Silent`] if it does not answer.
    Probe,
    /// End what is being done and all processes, and remove what ends with them; answer with [`Input::Cleaned`] or
    /// [`Input::NotCleaned`].
    CleanUp,
}

/// What was found of a VM that an earlier `laird` left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The parts that do not run.
    pub missing: Vec<Part>,
}

/// The outside world, as far as a decision depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// The time.
    pub moment: Moment,
    /// The restart policy.
    pub policy: Restart,
}

impl State {
    /// Whether anything of the VM may be running, by `laird`'s doing.
    pub fn is_active(&self) -> bool {
        match self {
            Self::Stopped | Self::Waiting { .. } | Self::Failed(_) | Self::Quarantined(_) => false,
            Self::Starting(_) | Self::Booting | Self::Ready | Self::Stopping(_) | Self::Cleaning(_) => true,
        }
    }

    /// Whether memory is kept for it. Of one that is quarantined something may run.
    pub fn holds_memory(&self) -> bool {
        self.is_active() || matches!(self, Self::Quarantined(_))
    }

    /// One word for tables.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting(_) => "starting",
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Stopping(_) => "stopping",
            Self::Cleaning(_) => "cleaning",
            Self::Waiting { .. } => "waiting",
            Self::Failed(_) => "failed",
            Self::Quarantined(_) => "quarantined",
        }
    }

    /// Why it is down, or was.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed(failure)
            | Self::Waiting { failure, .. }
            | Self::Cleaning(Outcome::Failed(failure)) => Some(failure),
            _ => None,
        }
    }
}
