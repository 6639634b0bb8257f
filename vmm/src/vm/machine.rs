//! The lifecycle of a VM: a pure state machine. Inputs in, a state and actions out, no I/O.
//!
//! ```text
//!             start                 last step            ready
//!  Stopped ----------> Starting(s) ------------> Booting ------> Ready
//!  Failed               | |  ^ step done          |  ^            | |
//!     ^        failure, | '--'                    |  '------------' |
//!     |        stop     v        failure          |   agent lost    |
//!     '------------- Cleaning <-------------------+                 |
//!                       ^                         | stop            | stop
//!                       |   hypervisor ended      v                 |
//!                       '--------------------- Stopping(stage) <----'
//! ```
//!
//! The executor ([`super::actor`]) performs the actions in order and feeds back what came of them. An input that does
//! not fit the state is one that was overtaken: it changes nothing.

use crate::{fleet::limits::OverBudget, host::tools::Missing};
use serde::{Deserialize, Serialize};

/// The steps of a start, in order. Each is idempotent; [`Action::CleanUp`] undoes them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Computes the closure of the roots and writes the view and its registration.
    View,
    /// Makes the directories.
    Directories,
    /// Has the view's metadata indexed.
    Index,
    /// Makes and formats volumes that are missing.
    Volumes,
    /// Writes the initramfs.
    Initramfs,
    /// Starts `lair-virtiofs`.
    StoreBackend,
    /// Starts `vhost-device-vsock`.
    VsockDevice,
    /// Starts the hypervisor, paused.
    Hypervisor,
    /// Starts `lair-shim`.
    Shim,
    /// Lets the guest run, once its console is connected.
    Resume,
}

impl Step {
    /// The first step.
    pub const FIRST: Self = Self::View;

    /// The step after this one.
    pub fn next(self) -> Option<Self> {
        match self {
            Self::View => Some(Self::Directories),
            Self::Directories => Some(Self::Index),
            Self::Index => Some(Self::Volumes),
            Self::Volumes => Some(Self::Initramfs),
            Self::Initramfs => Some(Self::StoreBackend),
            Self::StoreBackend => Some(Self::VsockDevice),
            Self::VsockDevice => Some(Self::Hypervisor),
            Self::Hypervisor => Some(Self::Shim),
            Self::Shim => Some(Self::Resume),
            Self::Resume => None,
        }
    }
}

/// The processes of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// QEMU.
    Hypervisor,
    /// `lair-virtiofs`.
    StoreBackend,
    /// `vhost-device-vsock`.
    VsockDevice,
    /// `lair-shim`.
    Shim,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Hypervisor => "the hypervisor",
            Self::StoreBackend => "lair-virtiofs",
            Self::VsockDevice => "vhost-device-vsock",
            Self::Shim => "lair-shim",
        })
    }
}

/// How hard a guest is asked to end. Each stage has a deadline, after which the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The agent is asked to power off.
    Agent,
    /// The power button is pressed.
    PowerButton,
    /// The hypervisor is told to end (SIGTERM).
    Terminate,
    /// The hypervisor is killed (SIGKILL).
    Kill,
}

impl Stage {
    fn next(self) -> Self {
        match self {
            Self::Agent => Self::PowerButton,
            Self::PowerButton => Self::Terminate,
            Self::Terminate | Self::Kill => Self::Kill,
        }
    }
}

/// Where a VM is in its life.
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
    /// It is down and should not be, for this reason.
    Failed(String),
    /// Its runtime state is not to be trusted; an operator has to look.
    Quarantined(String),
}

/// What a VM becomes once it is cleaned up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// [`State::Stopped`].
    Stopped,
    /// [`State::Failed`].
    Failed(String),
}

/// What happens to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// It should have been started by itself and was not, for this reason.
    NotStarted(String),
    /// A step is done.
    StepDone(Step),
    /// A step failed, for this reason.
    StepFailed(Step, String),
    /// The agent says that all services are up.
    AgentReady,
    /// The control channel to the agent is closed.
    AgentLost,
    /// The guest powered itself off; the hypervisor is about to end.
    GuestPowerOff,
    /// A process ended, so.
    Ended(Part, String),
    /// The deadline that was set last has passed.
    Deadline,
    /// [`Action::CleanUp`] is done.
    Cleaned,
}

/// What an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// End it at once, without asking the guest.
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
    #[error("It is quarantined ({0}); remove its run directory once nothing of it runs")]
    Quarantined(String),
    /// The host has not enough memory.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The host has not all programs.
    #[error(transparent)]
    Missing(#[from] Missing),
}

/// How long something may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// A boot, from resume to ready.
    Boot,
    /// A stage of stopping.
    Stop(Stage),
}

/// What the executor has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Perform a step; answer with [`Input::StepDone`] or [`Input::StepFailed`].
    Perform(Step),
    /// Ask the guest to end, this hard.
    End(Stage),
    /// Send [`Input::Deadline`] after a while; an earlier deadline no longer counts.
    Expect(Patience),
    /// No deadline counts any more.
    Relax,
    /// End all processes and remove what ends with them; answer with [`Input::Cleaned`].
    CleanUp,
}

impl State {
    /// Whether anything of the VM may be running.
    pub fn is_active(&self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed(_) | Self::Quarantined(_))
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
            Self::Failed(_) => "failed",
            Self::Quarantined(_) => "quarantined",
        }
    }
}

/// Takes an operator's request, or says why not.
pub fn request(state: &State, request: Request) -> Result<(State, Vec<Action>), Refusal> {
    use State::{Booting, Cleaning, Failed, Quarantined, Ready, Starting, Stopped, Stopping};
    let start = || Ok((Starting(Step::FIRST), vec![Action::Perform(Step::FIRST)]));
    let clean = |outcome| Ok((Cleaning(outcome), vec![Action::Relax, Action::CleanUp]));
    match (request, state) {
        (_, Quarantined(reason)) => Err(Refusal::Quarantined(reason.clone())),
        (Request::Start, Stopped | Failed(_)) => start(),
        (Request::Start, Starting(_) | Booting) => Err(Refusal::Already("starting")),
        (Request::Start, Ready) => Err(Refusal::Already("running")),
        (Request::Start, Stopping(_) | Cleaning(_)) => Err(Refusal::Stopping),
        (Request::Stop, Stopped) => Err(Refusal::Already("stopped")),
        (Request::Stop, Stopping(_) | Cleaning(_)) => Err(Refusal::Already("stopping")),
        (Request::Stop, Failed(_)) => Ok((Stopped, vec![])),
        (Request::Stop, Starting(_)) => clean(Outcome::Stopped),
        (Request::Kill, Stopped | Failed(_)) => Err(Refusal::Already("down")),
        (Request::Kill, Cleaning(_) | Stopping(Stage::Kill)) => Err(Refusal::Already("being killed")),
        (Request::Kill, Starting(_)) => clean(Outcome::Stopped),
        (Request::Kill, Booting | Ready | Stopping(_)) => Ok((Stopping(Stage::Kill), stage(Stage::Kill))),
        // A guest that is not ready may have no agent to ask; the stages find out.
        (Request::Stop, Booting | Ready) => Ok((Stopping(Stage::Agent), stage(Stage::Agent))),
    }
}

/// Takes what happened.
pub fn step(state: &State, input: Input) -> (State, Vec<Action>) {
    use State::{Booting, Cleaning, Failed, Quarantined, Ready, Starting, Stopped, Stopping};
    let clean = |outcome| (Cleaning(outcome), vec![Action::Relax, Action::CleanUp]);
    let unchanged = || (state.clone(), vec![]);
    match (state, input) {
        (Stopped, Input::NotStarted(reason)) => (Failed(reason), vec![]),
        (Starting(at), Input::StepDone(done)) if *at == done => match done.next() {
            Some(next) => (Starting(next), vec![Action::Perform(next)]),
            None => (Booting, vec![Action::Expect(Patience::Boot)]),
        },
        (Starting(at), Input::StepFailed(step, reason)) if *at == step => clean(Outcome::Failed(reason)),
        (Booting, Input::AgentReady) => (Ready, vec![Action::Relax]),
        (Ready, Input::AgentLost) => (Booting, vec![Action::Expect(Patience::Boot)]),
        (Booting, Input::Deadline) => clean(Outcome::Failed("the guest did not become ready in time".into())),
        (Booting | Ready, Input::GuestPowerOff) => (Stopping(Stage::Terminate), stage(Stage::Terminate)),
        (Starting(_) | Booting | Ready, Input::Ended(part, how)) => {
            clean(Outcome::Failed(format!("{part} {how}")))
        }
        (Stopping(_), Input::Ended(Part::Hypervisor, _)) => clean(Outcome::Stopped),
        (Stopping(at), Input::Deadline) => {
            let next = at.next();
            (Stopping(next), stage(next))
        }
        (Cleaning(outcome), Input::Cleaned) => match outcome {
            Outcome::Stopped => (Stopped, vec![]),
            Outcome::Failed(reason) => (Failed(reason.clone()), vec![]),
        },
        (
            Stopped | Starting(_) | Booting | Ready | Stopping(_) | Cleaning(_) | Failed(_) | Quarantined(_),
            _,
        ) => unchanged(),
    }
}

fn stage(stage: Stage) -> Vec<Action> {
    vec![Action::End(stage), Action::Expect(Patience::Stop(stage))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Starts a VM whose steps all succeed.
    fn booting() -> State {
        let (mut state, mut actions) = request(&State::Stopped, Request::Start).unwrap();
        let mut steps = 0;
        while let [Action::Perform(at)] = actions.as_slice() {
            (state, actions) = step(&state, Input::StepDone(*at));
            steps += 1;
        }
        assert_eq!((&state, actions), (&State::Booting, vec![Action::Expect(Patience::Boot)]));
        assert_eq!(steps, 10);
        state
    }

    #[test]
    fn a_start_performs_every_step_in_order_and_then_waits_for_the_agent() {
        assert_eq!(step(&booting(), Input::AgentReady), (State::Ready, vec![Action::Relax]));
    }

    #[test]
    fn a_kill_asks_nobody() {
        for state in
            [State::Booting, State::Ready, State::Stopping(Stage::Agent), State::Stopping(Stage::Terminate)]
        {
            let killed = request(&state, Request::Kill).unwrap();
            assert_eq!(killed, (State::Stopping(Stage::Kill), stage(Stage::Kill)), "{state:?}");
        }
        let starting = request(&State::Starting(Step::Hypervisor), Request::Kill).unwrap();
        assert_eq!(starting.0, State::Cleaning(Outcome::Stopped));
    }

    #[test]
    fn a_failed_step_cleans_up_and_keeps_its_reason() {
        let (state, _) = request(&State::Stopped, Request::Start).unwrap();
        let (state, actions) = step(&state, Input::StepFailed(Step::View, "no such path".into()));
        assert_eq!(actions, vec![Action::Relax, Action::CleanUp]);
        let (state, actions) = step(&state, Input::Cleaned);
        assert_eq!((state, actions), (State::Failed("no such path".into()), vec![]));
    }

    #[test]
    fn cf5_a_vm_that_was_not_started_by_itself_is_failed_and_can_be_started() {
        let (state, actions) = step(&State::Stopped, Input::NotStarted("no memory".into()));
        assert_eq!((&state, actions), (&State::Failed("no memory".into()), vec![]));
        assert!(request(&state, Request::Start).is_ok());
        // It was overtaken by an operator's start.
        assert_eq!(step(&State::Ready, Input::NotStarted("no memory".into())), (State::Ready, vec![]));
    }

    #[test]
    fn a_stop_gets_harder_until_the_hypervisor_ends() {
        let (mut state, mut actions) = request(&State::Ready, Request::Stop).unwrap();
        for expected in [Stage::Agent, Stage::PowerButton, Stage::Terminate, Stage::Kill, Stage::Kill] {
            assert_eq!(state, State::Stopping(expected));
            assert_eq!(actions, stage(expected));
            (state, actions) = step(&state, Input::Deadline);
        }
        let (state, _) = step(&state, Input::Ended(Part::Hypervisor, "killed by SIGKILL".into()));
        assert_eq!(step(&state, Input::Cleaned).0, State::Stopped);
    }

    #[test]
    fn a_step_that_was_overtaken_by_a_stop_changes_nothing() {
        let (state, _) = request(&State::Stopped, Request::Start).unwrap();
        let (state, actions) = request(&state, Request::Stop).unwrap();
        assert!(actions.contains(&Action::CleanUp));
        assert_eq!(step(&state, Input::StepDone(Step::View)), (state.clone(), vec![]));
    }

    #[test]
    fn cl8_requests_that_do_not_fit_are_refused_with_the_reason() {
        let cases = [
            (State::Ready, Request::Start, "It is already running"),
            (State::Booting, Request::Start, "It is already starting"),
            (State::Stopped, Request::Stop, "It is already stopped"),
            (State::Stopping(Stage::Agent), Request::Stop, "It is already stopping"),
            (State::Stopped, Request::Kill, "It is already down"),
            (State::Stopping(Stage::Kill), Request::Kill, "It is already being killed"),
            (
                State::Stopping(Stage::Agent),
                Request::Start,
                "It is being stopped; start it when it has stopped",
            ),
        ];
        for (state, asked, reason) in cases {
            assert_eq!(request(&state, asked).unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn the_death_of_any_part_is_a_failure_that_names_it() {
        for part in [Part::Hypervisor, Part::StoreBackend, Part::VsockDevice, Part::Shim] {
            let (state, _) = step(&State::Ready, Input::Ended(part, "killed by SIGSEGV".into()));
            assert_eq!(state, State::Cleaning(Outcome::Failed(format!("{part} killed by SIGSEGV"))));
        }
    }

    fn any_input() -> impl Strategy<Value = Result<Input, Request>> {
        let at = prop::sample::select(vec![Step::View, Step::Volumes, Step::Hypervisor, Step::Resume]);
        let part = prop::sample::select(vec![Part::Hypervisor, Part::StoreBackend, Part::Shim]);
        prop_oneof![
            prop::sample::select(vec![Request::Start, Request::Stop, Request::Kill]).prop_map(Err),
            at.clone().prop_map(|s| Ok(Input::StepDone(s))),
            at.prop_map(|s| Ok(Input::StepFailed(s, "x".into()))),
            part.prop_map(|p| Ok(Input::Ended(p, "x".into()))),
            prop::sample::select(vec![
                Input::NotStarted("x".into()),
                Input::AgentReady,
                Input::AgentLost,
                Input::GuestPowerOff,
                Input::Deadline,
                Input::Cleaned
            ])
            .prop_map(Ok),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order: a VM is called stopped or failed only after a clean-up, unless nothing was started;
        /// a state that waits for a deadline has one; only [`State::Starting`] performs steps.
        #[test]
        fn invariants(inputs in prop::collection::vec(any_input(), 0..60)) {
            let (mut state, mut deadline, mut dirty) = (State::Stopped, false, false);
            for input in inputs {
                let cleaned = matches!(input, Ok(Input::Cleaned));
                let (next, actions) = match input {
                    Ok(input) => step(&state, input),
                    Err(asked) => request(&state, asked).unwrap_or((state.clone(), vec![])),
                };
                for action in &actions {
                    match action {
                        Action::Expect(_) => deadline = true,
                        Action::Relax => deadline = false,
                        Action::Perform(at) => {
                            dirty = true;
                            prop_assert_eq!(&next, &State::Starting(*at));
                        }
                        Action::CleanUp => prop_assert!(matches!(next, State::Cleaning(_))),
                        Action::End(at) => prop_assert_eq!(&next, &State::Stopping(*at)),
                    }
                }
                if cleaned && matches!(state, State::Cleaning(_)) && !matches!(next, State::Starting(_)) {
                    dirty = false;
                }
                if !next.is_active() {
                    prop_assert!(!dirty, "{next:?} without clean-up");
                }
                if matches!(next, State::Booting | State::Stopping(_)) {
                    prop_assert!(deadline, "{next:?} could last for ever");
                }
                state = next;
            }
        }
    }
}
