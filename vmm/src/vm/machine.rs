//! The lifecycle of a VM: a pure state machine. Inputs in, a life and actions out, no I/O.
//!
//! ```text
//!             start                 last step            ready
//!  Stopped ----------> Starting(s) ------------> Booting ------> Ready
//!  Failed               | |  ^ step done          |  ^            | |
//!  Waiting <--.         | |  |                    |  '------------' |
//!     ^       | failure,| '--'                    |    agent lost   |
//!     |       | stop    v        failure          |                 |
//!     '------------- Cleaning <-------------------+                 |
//!                       ^                         | stop            | stop
//!                       |   hypervisor ended      v                 |
//!                       '--------------------- Stopping(stage) <----'
//! ```
//!
//! `Waiting` becomes `Starting` after a pause, as the restart policy says. `Quarantined` is entered by adoption, and by a clean-up
//! after which something still runs; an operator's stop leads out of it.
//!
//! The executor ([`super::actor`]) performs the actions in order and feeds back what came of them. An input that does
//! not fit the state is one that was overtaken: it changes nothing.

use super::restart::{self, History, Moment, Next, STARTS_MAX, WINDOW};
pub use super::{
    failure::Failure,
    part::{Part, Stage, Step},
};
use crate::{
    fleet::{limits::OverBudget, schema::Restart},
    host::tools::Missing,
};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

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

/// A life and what is to be done for it.
pub type Turn = (Life, Vec<Action>);

impl Life {
    /// The life of a VM of which nothing runs.
    pub fn stopped(wanted: Wanted) -> Self {
        Self {
            state: State::Stopped,
            wanted,
            history: History::default(),
            ready_since: None,
            stop: None,
            last_stop: None,
        }
    }

    /// Takes an operator's request, or says why not.
    pub fn request(&self, request: Request, moment: Moment) -> Result<Turn, Refusal> {
        use State::{Booting, Cleaning, Failed, Quarantined, Ready, Starting, Stopped, Stopping, Waiting};
        let life = self.clone();
        let restarts = self.stop.is_some_and(|stop| stop.why == Why::Restart);
        match (request, &self.state) {
            (Request::Start | Request::Restart, Quarantined(reason)) => {
                Err(Refusal::Quarantined(reason.clone()))
            }
            (Request::Start | Request::Restart, Stopped | Failed(_) | Waiting { .. }) => {
                Ok(life.begin_anew(moment))
            }
            (Request::Start, Starting(_) | Booting | Cleaning(Outcome::Again)) => {
                Err(Refusal::Already("starting"))
            }
            (Request::Start, Ready) => Err(Refusal::Already("running")),
            (Request::Start, Stopping(_)) if restarts => Err(Refusal::Already("restarting")),
            (Request::Start | Request::Restart, Stopping(_) | Cleaning(_)) => Err(Refusal::Stopping),
            (Request::Restart, Starting(_)) => Ok(life.wanted(Wanted::Running).clean(Outcome::Again)),
            (Request::Restart, Booting | Ready) => {
                Ok(life.wanted(Wanted::Running).end(Stage::Agent, Why::Restart, moment))
            }
            (Request::Stop | Request::Kill, Stopped) => Err(Refusal::Already("stopped")),
            (Request::Stop | Request::Kill, Failed(_) | Waiting { .. }) => {
                Ok((life.wanted(Wanted::Stopped).to(Stopped), vec![Action::Relax]))
            }
            (Request::Stop | Request::Kill, Starting(_) | Quarantined(_)) => {
                Ok(life.wanted(Wanted::Stopped).clean(Outcome::Stopped))
            }
            // A guest that is not ready may have no agent to ask; the stages find out.
            (Request::Stop, Booting | Ready) => {
                Ok(life.wanted(Wanted::Stopped).end(Stage::Agent, Why::Stop, moment))
            }
            (Request::Kill, Booting | Ready) => {
                Ok(life.wanted(Wanted::Stopped).end(Stage::Kill, Why::Stop, moment))
            }
            (Request::Stop, Stopping(_)) if self.wanted == Wanted::Stopped => {
                Err(Refusal::Already("stopping"))
            }
            // A restart becomes a stop.
            (Request::Stop, Stopping(_)) => Ok((life.wanted(Wanted::Stopped).because(Why::Stop), vec![])),
            (Request::Kill, Stopping(Stage::Kill)) => Err(Refusal::Already("being killed")),
            (Request::Kill, Stopping(_)) => {
                let life = life.wanted(Wanted::Stopped).because(Why::Stop);
                Ok((life.to(Stopping(Stage::Kill)), stage(Stage::Kill)))
            }
            (Request::Stop | Request::Kill, Cleaning(Outcome::Stopped)) if self.wanted == Wanted::Stopped => {
                Err(Refusal::Already("stopping"))
            }
            (Request::Stop | Request::Kill, Cleaning(_)) => {
                Ok((life.wanted(Wanted::Stopped).to(Cleaning(Outcome::Stopped)), vec![]))
            }
        }
    }

    /// Takes what happened.
    pub fn step(&self, input: Input, now: Now) -> Turn {
        use State::{Booting, Cleaning, Failed, Quarantined, Ready, Starting, Stopped, Stopping, Waiting};
        let life = self.clone();
        match (&self.state, input) {
            (Stopped, Input::NotAdmitted(message)) => {
                (life.to(Failed(Failure::NotAdmitted { message })), vec![])
            }
            (Starting(Step::FIRST), Input::NotAdmitted(message)) => {
                life.fail(Failure::NotAdmitted { message })
            }
            (Starting(at), Input::StepDone(done)) if *at == done => match done.next() {
                Some(next) => (life.to(Starting(next)), vec![Action::Perform(next)]),
                None => (life.to(Booting), vec![Action::Expect(Patience::Boot)]),
            },
            (Starting(at), Input::StepFailed(step, message)) if *at == step => {
                life.fail(Failure::StepFailed { step, message })
            }
            (Booting, Input::AgentReady) => {
                let life = Self { ready_since: Some(now.moment), ..life };
                (life.to(Ready), vec![Action::Relax])
            }
            (Ready, Input::AgentLost) => {
                let life = life.no_longer_ready(now.moment);
                (life.to(Booting), vec![Action::Expect(Patience::Boot), Action::Probe])
            }
            (Booting, Input::Silent) => life.fail(Failure::Unresponsive),
            (Booting, Input::Deadline) => life.fail(Failure::ReadyTimeout),
            (Booting | Ready, Input::GuestPanic) => {
                life.no_longer_ready(now.moment).fail(Failure::GuestPanic)
            }
            (Booting | Ready, Input::GuestPowerOff) => {
                let life = life.no_longer_ready(now.moment);
                let stays = !restart::provides(now.policy, true);
                let life = if stays { life.wanted(Wanted::Stopped) } else { life };
                life.end(Stage::Terminate, Why::Guest, now.moment)
            }
            (Starting(_) | Booting | Ready, Input::Ended(part, how)) => {
                life.no_longer_ready(now.moment).fail(Failure::ProcessEnded { part, how })
            }
            (Stopping(_), Input::Ended(Part::Hypervisor, _)) => life.ended(now.moment),
            (Stopping(at), Input::EndFailed(stage)) if *at == stage => life.harder(now.moment, false),
            (Stopping(_), Input::Deadline) => life.harder(now.moment, true),
            (Cleaning(outcome), Input::Cleaned) => match outcome {
                Outcome::Stopped => (life.to(Stopped), vec![]),
                Outcome::Again => life.begin(now.moment),
                Outcome::Failed(failure) => life.after(failure.clone(), now),
            },
            (Cleaning(_), Input::NotCleaned(reason)) => (life.to(Quarantined(reason)), vec![]),
            (Waiting { .. }, Input::Deadline) => life.begin(now.moment),
            (Waiting { .. }, Input::Withdraw(_)) => (life.to(Stopped), vec![Action::Relax]),
            (Starting(_), Input::Withdraw(_)) => life.clean(Outcome::Stopped),
            (Booting | Ready, Input::Withdraw(from)) => life.end(from, Why::Withdrawn, now.moment),
            (Stopping(at), Input::Withdraw(Stage::Kill)) if *at != Stage::Kill => {
                (life.because(Why::Withdrawn).to(Stopping(Stage::Kill)), stage(Stage::Kill))
            }
            (Stopping(_), Input::Withdraw(_)) => (life.because(Why::Withdrawn), vec![]),
            (Cleaning(_), Input::Withdraw(_)) => (life.to(Cleaning(Outcome::Stopped)), vec![]),
            (
                Stopped
                | Starting(_)
                | Booting
                | Ready
                | Stopping(_)
                | Cleaning(_)
                | Waiting { .. }
                | Failed(_)
                | Quarantined(_),
                _,
            ) => (life, vec![]),
        }
    }

    /// Goes on with a life that an earlier `laird` wrote down in this boot of the host. `wanted` is what was asked for last, which may
    /// be later than the rest.
    pub fn resume(self, found: &Found, wanted: Wanted, moment: Moment) -> Turn {
        let life = self.wanted(wanted);
        let runs = wanted == Wanted::Running;
        match life.state.clone() {
            // What the guest has become meanwhile, its shim will say.
            State::Booting if runs && found.missing.is_empty() => {
                (life, vec![Action::Expect(Patience::Boot)])
            }
            State::Ready if runs && found.missing.is_empty() => (life, vec![]),
            State::Booting | State::Ready if found.missing.is_empty() => {
                life.end(Stage::Agent, Why::Stop, moment)
            }
            State::Booting | State::Ready if runs => {
                let part = found.missing.first().copied().unwrap_or(Part::Hypervisor);
                let how = "ended while laird was not running".into();
                life.no_longer_ready(moment).fail(Failure::ProcessEnded { part, how })
            }
            State::Stopping(at) if !found.missing.contains(&Part::Hypervisor) => (life, stage(at)),
            State::Stopping(_) => life.ended(moment),
            // A start that was cut short is undone and begins anew.
            State::Starting(_) | State::Cleaning(Outcome::Again) if runs => life.clean(Outcome::Again),
            State::Cleaning(outcome @ Outcome::Failed(_)) if runs => life.clean(outcome),
            State::Booting | State::Ready | State::Starting(_) | State::Cleaning(_) => {
                life.clean(Outcome::Stopped)
            }
            State::Waiting { seconds, .. } if runs => (life, vec![Action::Expect(Patience::Pause(seconds))]),
            State::Failed(_) if runs => (life, vec![]),
            State::Waiting { .. } | State::Failed(_) => (life.to(State::Stopped), vec![]),
            State::Stopped | State::Quarantined(_) => (life, vec![]),
        }
    }

    /// As much of the life as outlives the VM: what a later `laird` needs where nothing of the VM runs. It changes rarely.
    pub fn lasting(&self) -> Self {
        let state = match &self.state {
            State::Starting(_) | State::Booting | State::Ready | State::Stopping(_) => {
                State::Starting(Step::FIRST)
            }
            // A later laird tries again.
            State::Failed(Failure::NotAdmitted { .. }) => State::Stopped,
            other => other.clone(),
        };
        Self { state, ready_since: None, stop: None, ..self.clone() }
    }

    fn to(self, state: State) -> Self {
        let stop = self.stop.filter(|_| matches!(state, State::Stopping(_)));
        let ready_since = self.ready_since.filter(|_| state == State::Ready);
        Self { state, stop, ready_since, ..self }
    }

    fn wanted(self, wanted: Wanted) -> Self {
        Self { wanted, ..self }
    }

    fn because(self, why: Why) -> Self {
        Self { stop: self.stop.map(|stop| Stop { why, ..stop }), ..self }
    }

    /// Starts at an operator's word, which makes the earlier starts count no more.
    fn begin_anew(self, moment: Moment) -> Turn {
        Self { history: History::default(), ..self.wanted(Wanted::Running) }.begin(moment)
    }

    fn begin(self, moment: Moment) -> Turn {
        let mut life = self.to(State::Starting(Step::FIRST));
        life.history.started(moment);
        (life, vec![Action::Relax, Action::Perform(Step::FIRST)])
    }

    fn end(self, at: Stage, why: Why, began: Moment) -> Turn {
        let mut life = self.no_longer_ready(began).to(State::Stopping(at));
        life.stop = Some(Stop { why, began });
        (life, stage(at))
    }

    /// The next stage, if there is one. After the last there is only the clean-up, which tells if something cannot be ended.
    fn harder(self, moment: Moment, overdue: bool) -> Turn {
        let State::Stopping(at) = self.state else { return (self, vec![]) };
        match at.next() {
            Some(next) => (Self { state: State::Stopping(next), ..self }, stage(next)),
            None if overdue => self.ended(moment),
            None => (self, vec![]),
        }
    }

    /// The hypervisor has ended, or is to be ended by the clean-up.
    fn ended(mut self, moment: Moment) -> Turn {
        let (Some(stop), State::Stopping(at)) = (self.stop, &self.state) else {
            return self.clean(Outcome::Stopped);
        };
        let by = match (stop.why, at) {
            (Why::Guest, Stage::Agent | Stage::PowerButton | Stage::Terminate) => Ender::Guest,
            (_, Stage::Agent) => Ender::Agent,
            (_, Stage::PowerButton) => Ender::PowerButton,
            (_, Stage::Terminate) => Ender::Terminate,
            (_, Stage::Kill) => Ender::Kill,
        };
        self.last_stop = Some(StopReport { by, took_ms: moment.saturating_sub(stop.began) });
        match (stop.why, self.wanted) {
            (Why::Restart, _) => self.clean(Outcome::Again),
            (Why::Guest, Wanted::Running) => self.clean(Outcome::Failed(Failure::PoweredOff)),
            (Why::Guest | Why::Stop | Why::Withdrawn, _) => self.clean(Outcome::Stopped),
        }
    }

    fn fail(self, failure: Failure) -> Turn {
        self.clean(Outcome::Failed(failure))
    }

    fn clean(self, outcome: Outcome) -> Turn {
        (self.to(State::Cleaning(outcome)), vec![Action::Relax, Action::CleanUp])
    }

    /// What comes after a failure, once nothing is left.
    fn after(self, failure: Failure, now: Now) -> Turn {
        let powered_off = failure == Failure::PoweredOff;
        if !failure.may_pass() || !restart::provides(now.policy, powered_off) {
            let state = if powered_off { State::Stopped } else { State::Failed(failure) };
            return (self.to(state), vec![]);
        }
        match self.history.next(now.moment) {
            Next::Wait(seconds) => {
                let life = self.to(State::Waiting { failure, seconds });
                (life, vec![Action::Expect(Patience::Pause(seconds))])
            }
            Next::GiveUp => {
                let last = Box::new(failure);
                let failure = Failure::TooManyStarts { starts: STARTS_MAX, minutes: WINDOW / 60_000, last };
                (self.to(State::Failed(failure)), vec![])
            }
        }
    }

    /// A VM that was ready for long has made up for its earlier failures.
    fn no_longer_ready(mut self, moment: Moment) -> Self {
        if self.ready_since.take().is_some_and(|since| moment.saturating_sub(since) >= WINDOW) {
            self.history = History::default();
        }
        self
    }
}

fn stage(stage: Stage) -> Vec<Action> {
    vec![Action::End(stage), Action::Expect(Patience::Stop(stage))]
}
