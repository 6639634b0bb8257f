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

pub use words::{
    Action, Ender, Found, Input, Life, Now, Outcome, Patience, Refusal, Request, State, Stop, StopReport,
    Wanted, Why,
};

use super::restart::{self, History, Moment, Next, STARTS_MAX, WINDOW};

mod words;
pub use super::{
    failure::Failure,
    part::{Part, Stage, Step},
};

#[cfg(test)]
mod tests;

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
            (Request::Start | Request::Restart, Cleaning(Outcome::Failed(failure))) => {
                Err(Refusal::Failing(failure.to_string()))
            }
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
            (Request::Kill, Stopping(Stage::Kill)) if self.wanted == Wanted::Stopped => {
                Err(Refusal::Already("being killed"))
            }
            (Request::Kill, Stopping(Stage::Kill)) => {
                Ok((life.wanted(Wanted::Stopped).because(Why::Stop), vec![]))
            }
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
            // Its kernel may well run, and its volumes be in use.
            (Booting, Input::Deadline) => life.end(Stage::Agent, Why::Overdue, now.moment),
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
            (Stopping(at), Input::EndFailed(stage)) if *at == stage => life.harder(false),
            (Stopping(_), Input::Deadline) => life.harder(true),
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
    fn harder(self, overdue: bool) -> Turn {
        let State::Stopping(at) = self.state else { return (self, vec![]) };
        match at.next() {
            Some(next) => (Self { state: State::Stopping(next), ..self }, stage(next)),
            None if overdue => self.over(),
            None => (self, vec![]),
        }
    }

    /// The hypervisor has ended.
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
        self.over()
    }

    /// What the guest ran in has ended, or is to be ended by the clean-up, which tells if it cannot.
    fn over(self) -> Turn {
        let why = self.stop.map_or(Why::Stop, |stop| stop.why);
        match (why, self.wanted) {
            (Why::Restart, _) => self.clean(Outcome::Again),
            (Why::Guest, Wanted::Running) => self.clean(Outcome::Failed(Failure::PoweredOff)),
            (Why::Overdue, Wanted::Running) => self.clean(Outcome::Failed(Failure::ReadyTimeout)),
            (Why::Guest | Why::Overdue | Why::Stop | Why::Withdrawn, _) => self.clean(Outcome::Stopped),
        }
    }

    /// Whether it is being ended though it is wanted to run: it is no longer in the fleet, or was not for a moment.
    pub fn is_withdrawn(&self) -> bool {
        self.stop.is_some_and(|stop| stop.why == Why::Withdrawn)
            || (self.wanted == Wanted::Running && self.state == State::Cleaning(Outcome::Stopped))
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
