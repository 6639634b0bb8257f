//! The executor of one VM's lifecycle: one task. It feeds the machine, performs what the machine says, and publishes what it sees.
//!
//! It never waits for an effect: a step, a stage of an end and a clean-up are tasks, of which there is one at a time. So a request is
//! taken at any moment, and one that makes the present effect pointless cancels it.

mod disk;
mod effects;
mod follow;
mod plug;

pub(super) use self::plug::Fault;
use self::{follow::Told, plug::Plugging};
use super::{
    adopt::Verdict,
    handle::{Handle, MAILBOX, Mail, Snapshot},
    limits,
    machine::{Action, Input, Life, Now, Part, Refusal, Request, State, Step, Wanted},
    orphan,
    plan::Plan,
    restart::Moment,
    running::Running,
    steps::{Context, guest},
    trace::Stopwatch,
    watch as watching,
};
use crate::{
    error::chain,
    fleet::{
        limits::Need,
        schema::{Fleet, Restart},
    },
    host::memory,
    hypervisor::Heard,
    passthrough::window,
    shim::protocol::{AgentState, ShimStatus},
};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// How long a cancelled effect may take to let go of what it holds.
const LET_GO: Duration = Duration::from_secs(10);

/// What is said of an effect that panicked.
const LOST: &str = "Internal error: a task ended without a result";

/// What an actor begins with.
#[derive(Debug)]
pub struct Beginning {
    /// The life.
    pub life: Life,
    /// Since when it is in its state.
    pub since: jiff::Timestamp,
    /// What runs.
    pub running: Running,
    /// What is to be done first.
    pub actions: Vec<Action>,
    /// What came of looking for it.
    pub verdict: Option<Verdict>,
}

impl Beginning {
    /// Of a VM of which nothing is known to run.
    pub fn of(life: Life) -> Self {
        let since = jiff::Timestamp::now();
        Self { life, since, running: Running::default(), actions: vec![], verdict: None }
    }

    /// Of a VM that is stopped.
    pub fn stopped(wanted: Wanted) -> Self {
        Self::of(Life::stopped(wanted))
    }
}

/// How an actor ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The VM is no longer in the fleet, and nothing of it is left.
    Removed,
}

/// Milliseconds on the host's monotonic clock.
pub fn moment() -> Moment {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Starts the task of one VM. It ends by itself when the fleet no longer has the VM and nothing of it is left.
pub fn spawn(
    context: Context,
    fleet: watch::Receiver<Arc<Fleet>>,
    beginning: Beginning,
) -> (Handle, JoinHandle<()>) {
    let (queue, mailbox) = mpsc::channel(MAILBOX);
    let (exit, exited) = watch::channel(None);
    let Beginning { life, since, running, actions, verdict } = beginning;
    if life.state.holds_memory()
        && let Some(memory) = memory(&context.name, &running, &fleet.borrow())
    {
        context.budget.adopt(&context.name, memory);
    }
    let first = Snapshot { adoption: verdict, ..Snapshot::of(&life, since, &running) };
    let (snapshot, watcher) = watch::channel(first);
    // A withdrawal that an earlier `laird` had begun; it may be back in the fleet by now.
    let withdrawn = life.is_withdrawn();
    // What is on disk is as the life is, unless the record led to more.
    let kept = verdict.is_none().then(|| life.lasting());
    let plugging = Plugging::new(context.host.devices.subscribe());
    let actor = Actor {
        context,
        fleet,
        kept,
        life,
        since,
        running,
        verdict,
        mailbox,
        queue: queue.clone(),
        inputs: VecDeque::new(),
        work: None,
        deadline: None,
        heard: None,
        known: Heard::default(),
        reboots: watching::Reboots::default(),
        started: Arc::default(),
        shim: None,
        shim_status: None,
        reloading: None,
        plugging,
        withdrawn,
        closing: false,
        snapshot,
    };
    let task = tokio::spawn(async move {
        actor.run(actions).await;
        exit.send_replace(Some(Exit::Removed));
    });
    (Handle { queue, snapshot: watcher, exit: exited }, task)
}

/// The memory that a VM has from the beginning. Of one that is quarantined something may still run, as big as the fleet file says.
fn memory(name: &str, running: &Running, fleet: &Fleet) -> Option<Need> {
    running.plan().map(|plan| Need::of(&plan.vm)).or_else(|| Some(Need::of(fleet.vms.get(name)?)))
}

/// The effect that is being performed.
struct Work {
    cancel: watch::Sender<bool>,
    task: JoinHandle<Option<Input>>,
    /// What happens if the task panics.
    lost: Option<Input>,
}

struct Actor {
    context: Context,
    fleet: watch::Receiver<Arc<Fleet>>,
    life: Life,
    since: jiff::Timestamp,
    running: Running,
    verdict: Option<Verdict>,
    /// What of the life is on disk.
    kept: Option<Life>,
    mailbox: mpsc::Receiver<Mail>,
    queue: mpsc::Sender<Mail>,
    /// What follows at once from what was done.
    inputs: VecDeque<Input>,
    work: Option<Work>,
    deadline: Option<Instant>,
    heard: Option<watch::Receiver<Heard>>,
    /// As much of what the hypervisor said as was acted upon.
    known: Heard,
    reboots: watching::Reboots,
    started: Arc<Notify>,
    shim: Option<JoinHandle<()>>,
    shim_status: Option<ShimStatus>,
    /// The plan as it was before the links that the shim is being told, and the task that tells it.
    reloading: Option<(Arc<Plan>, JoinHandle<()>)>,
    plugging: Plugging,
    /// The fleet had it no more at some time since it was last down.
    withdrawn: bool,
    /// The host shuts down.
    closing: bool,
    snapshot: watch::Sender<Snapshot>,
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Another task will look after the VM, and nobody after this effect.
        if let Some(work) = &self.work {
            work.task.abort();
        }
        if let Some(shim) = &self.shim {
            shim.abort();
        }
        if let Some((_, reloading)) = &self.reloading {
            reloading.abort();
        }
    }
}

impl Actor {
    async fn run(mut self, actions: Vec<Action>) {
        self.begin(actions).await;
        loop {
            while let Some(input) = self.inputs.pop_front() {
                self.step(input).await;
            }
            if self.is_over().await {
                return;
            }
            tokio::select! {
                () = changed(&mut self.heard) => self.hear(),
                input = finished(&mut self.work) => {
                    self.attend();
                    self.inputs.extend(input);
                }
                () = passed(self.deadline) => {
                    self.deadline = None;
                    self.inputs.push_back(Input::Deadline);
                }
                // A clean-up removes the record.
                () = self.started.notified() => if !self.cleans() { self.record_or_warn().await },
                () = self.plugging.may_come_about() => self.follow_devices(),
                Ok(()) = self.fleet.changed() => self.follow_fleet(),
                Some(mail) = self.mailbox.recv() => self.receive(mail).await,
            }
        }
    }

    /// Watches what was running before this actor.
    async fn begin(&mut self, actions: Vec<Action>) {
        for part in self.running.processes().into_keys() {
            self.watch_process(part);
        }
        self.follow_fleet();
        if matches!(self.life.state, State::Booting | State::Ready) {
            self.follow_links(Told::Unknown);
        }
        if let (Some(cgroup), Some(plan)) = (self.context.cgroup(), self.running.plan())
            && !self.running.processes().is_empty()
        {
            limits::look(&cgroup, &plan);
            self.running.watch_cgroup(cgroup, &self.context.host.happened);
        }
        if matches!(self.life.state, State::Booting | State::Ready | State::Stopping(_)) {
            let job = self.job(watch::channel(false).1);
            let (state, queue) = (self.life.state.clone(), self.queue.clone());
            // Not the effect of the moment: a stage that is under way goes on beside it.
            tokio::spawn(async move {
                let connected = job.connect_qmp().await;
                if let Err(error) = &connected {
                    let name = &job.context.name;
                    tracing::warn!(
                        vm = name,
                        error = chain(error),
                        "adopted, but its hypervisor does not answer"
                    );
                }
                // The agent of a guest that is ready answers for both.
                let silent = connected.is_err() && state == State::Booting;
                let _ = queue.send(if silent { Mail::Input(Input::Silent) } else { Mail::Connected }).await;
            });
        }
        if !matches!(self.life.state, State::Quarantined(_)) {
            let life = self.life.clone();
            self.keep_or_warn(&life).await;
            self.record_or_warn().await;
        }
        self.publish();
        self.perform(actions).await;
    }

    fn cleans(&self) -> bool {
        matches!(self.life.state, State::Cleaning(_))
    }

    fn present(&self) -> bool {
        self.fleet.borrow().vms.contains_key(&self.context.name)
    }

    /// Whether the VM is down and no longer in the fleet. One that is back in the fleet starts with its new definition.
    async fn is_over(&mut self) -> bool {
        if self.life.state.holds_memory() || self.closing || !self.withdrawn {
            return false;
        }
        if !self.present() {
            if let Ok(dirs) = self.dirs() {
                let _ = std::fs::remove_file(dirs.lasting());
            }
            return true;
        }
        self.withdrawn = false;
        let autostart =
            self.fleet.borrow().vms.get(&self.context.name).is_some_and(|configured| configured.autostart);
        if autostart && let Err(refusal) = self.request(Request::Start).await {
            self.inputs.push_back(Input::NotAdmitted(refusal.to_string()));
            while let Some(input) = self.inputs.pop_front() {
                self.step(input).await;
            }
        }
        false
    }

    async fn receive(&mut self, mail: Mail) {
        match mail {
            Mail::Request(request, answer) => {
                let outcome = self.request(request).await;
                let _ = answer.send(outcome);
            }
            Mail::NotStarted(reason) => self.inputs.push_back(Input::NotAdmitted(reason)),
            Mail::Removed => self.withdraw(),
            Mail::Close(from) => {
                self.closing = true;
                self.inputs.push_back(Input::Withdraw(from));
            }
            Mail::Ended(part, id, how) => {
                // An earlier start's process says nothing about this one.
                if self.running.process(part).is_some_and(|process| process.id() == id) {
                    self.hear();
                    let out_of_memory = self.context.cgroup().is_some_and(|cgroup| limits::ran_out(&cgroup));
                    let how = if out_of_memory { format!("{how}, as the VM ran out of memory") } else { how };
                    self.inputs.push_back(Input::Ended(part, how));
                }
            }
            // The last word of an earlier start's shim.
            Mail::Shim(id, _) if self.running.process(Part::Shim).is_none_or(|shim| shim.id() != id) => {}
            Mail::Shim(_, status) => {
                let input = agent(&status);
                if input == Input::AgentReady && self.life.state == State::Booting {
                    // The guest was all that was missing.
                    self.running.note(Stopwatch::only_waited);
                }
                self.inputs.push_back(input);
                self.shim_status = Some(*status);
                self.publish();
            }
            Mail::Reloaded(plans, outcome) => self.reloaded(plans, outcome).await,
            Mail::Input(input) => self.inputs.push_back(input),
            Mail::Plugged(wants, outcome) => Box::pin(self.plugged(wants, outcome)).await,
            Mail::Connected => self.attend(),
            #[cfg(test)]
            Mail::Panic => panic!("asked for by a test"),
        }
    }

    /// Takes a request, or refuses it before anything is done: where memory or a program is missing, where what is wanted cannot be
    /// written down, or where the machine says so.
    async fn request(&mut self, request: Request) -> Result<(), Refusal> {
        let asked = std::time::Instant::now();
        let starts = matches!(request, Request::Start | Request::Restart);
        if starts && (self.closing || !self.present()) {
            return Err(Refusal::Withdrawn);
        }
        if request == Request::Stop && matches!(self.life.state, State::Quarantined(_)) {
            self.look_again().await?;
        }
        let (life, actions) = self.life.request(request, moment())?;
        if life.state.is_active() && !self.life.state.is_active() && starts {
            self.admit()?;
            if let Err(reason) = self.check_devices().await {
                self.context.budget.release(&self.context.name);
                return Err(Refusal::Devices(reason));
            }
        }
        match self.keep(&life).await {
            Err(error) if starts => {
                if !self.life.state.holds_memory() {
                    self.context.budget.release(&self.context.name);
                }
                return Err(Refusal::Storage(chain(&error)));
            }
            // What can be stopped is stopped, whatever a later laird will know of it.
            Err(error) => self.not_kept(&error),
            Ok(()) => {}
        }
        tracing::info!(vm = self.context.name, ?request, "asked for");
        self.enter(life, actions, asked).await;
        Ok(())
    }

    /// Whether nothing of a quarantined VM runs.
    async fn look_again(&self) -> Result<(), Refusal> {
        let Ok(dirs) = self.dirs() else { return Ok(()) };
        let found = orphan::look(dirs.run).await;
        if found.is_empty() {
            return Ok(());
        }
        let processes: Vec<_> = found.iter().map(ToString::to_string).collect();
        Err(Refusal::StillRuns(processes.join(", ")))
    }

    /// Takes the VM's memory from the host's budget, if there are its programs as well.
    fn admit(&self) -> Result<(), Refusal> {
        let fleet = self.fleet.borrow();
        let Some(vm) = fleet.vms.get(&self.context.name) else { return Err(Refusal::Withdrawn) };
        self.context.host.tools.suffice_for(vm)?;
        self.context.budget.admit(&self.context.name, Need::of(vm))?;
        Ok(())
    }

    /// Whether there are the devices that the VM asks for, and room for them in its guest.
    async fn check_devices(&self) -> Result<(), String> {
        let Some(vm) = self.fleet.borrow().vms.get(&self.context.name).cloned() else { return Ok(()) };
        let host = &self.context.host;
        let windows =
            host.devices.check(&self.context.name, &vm.gpus).await.map_err(|error| chain(&error))?;
        window::hole(&windows, &guest(host, &vm)).map(drop).map_err(|error| chain(&error))
    }

    async fn step(&mut self, input: Input) {
        let happened = std::time::Instant::now();
        let policy = self.fleet.borrow().vms.get(&self.context.name).map_or(Restart::Never, |vm| vm.restart);
        let resumed = input == Input::StepDone(Step::Resume);
        if let Input::StepDone(step) = input {
            self.step_done(step);
        }
        let (life, actions) = self.life.step(input, Now { moment: moment(), policy });
        self.enter(life, actions, happened).await;
        // An agent that was faster than the step is not announced again.
        if resumed && let Some(status) = &self.shim_status {
            self.inputs.push_back(agent(status));
        }
    }

    /// Watches what a step has started.
    fn step_done(&mut self, step: Step) {
        if let Some(part) = step.part() {
            self.watch_process(part);
        }
        if step == Step::Devices
            && let Some(plan) = self.running.plan()
        {
            self.plugging.given(&plan.vm.gpus);
        }
        // What both were made from may have changed meanwhile.
        if matches!(step, Step::View | Step::Shim) {
            self.follow_links(Told::AsPlanned);
        }
    }

    /// Goes over to another life, for what happened at `happened`. What is wanted and where it is are on disk before anything is done
    /// that follows from it.
    async fn enter(&mut self, life: Life, actions: Vec<Action>, happened: std::time::Instant) {
        if life.state == State::Starting(Step::FIRST) && life.state != self.life.state {
            self.running.starts(happened);
        }
        // A clean-up that is under way removes the record; what else becomes of the VM is in the lasting state.
        let goes_on_cleaning = self.cleans() && matches!(life.state, State::Cleaning(_));
        let to_record = life != self.life && !goes_on_cleaning;
        let changed = life != self.life;
        let moved = life.state.word() != self.life.state.word();
        if changed {
            if moved {
                self.since = jiff::Timestamp::now();
                tell(&self.context.name, &life);
            }
            self.keep_or_warn(&life).await;
            if moved && life.state == State::Ready {
                self.running.note(Stopwatch::ready);
            }
            self.life = life;
            if !self.life.state.holds_memory() {
                self.context.budget.release(&self.context.name);
            }
        }
        let recorded = if to_record { self.record().await } else { Ok(()) };
        if to_record {
            memory::used();
        }
        // Only now: who is told of it finds the same in the next `laird`.
        if changed {
            self.publish();
        }
        if moved {
            self.follow_devices();
        }
        match recorded {
            Ok(()) => self.perform(actions).await,
            Err(error) => {
                tracing::error!(
                    vm = self.context.name,
                    error = chain(&error),
                    "cannot record the runtime state"
                );
                // A step whose traces might be lost is not taken; what runs, runs on, and what ends, ends.
                match self.life.state {
                    State::Starting(step) if actions.contains(&Action::Perform(step)) => {
                        self.inputs.push_back(Input::StepFailed(step, chain(&error)));
                    }
                    _ => self.perform(actions).await,
                }
            }
        }
    }
}

fn tell(vm: &str, life: &Life) {
    match &life.state {
        State::Failed(failure) => {
            tracing::error!(vm, kind = failure.word(), reason = %failure, "failed");
        }
        State::Waiting { failure, seconds } => {
            tracing::warn!(vm, kind = failure.word(), reason = %failure, seconds, "failed; it is started again");
        }
        State::Quarantined(reason) => tracing::error!(vm, reason, "quarantined"),
        state => tracing::info!(vm, state = state.word()),
    }
}

fn agent(status: &ShimStatus) -> Input {
    match status.agent {
        AgentState::Ready { .. } => Input::AgentReady,
        AgentState::Absent | AgentState::Connected { .. } => Input::AgentLost,
    }
}

async fn changed(heard: &mut Option<watch::Receiver<Heard>>) {
    if let Some(receiver) = heard
        && receiver.changed().await.is_ok()
    {
        return;
    }
    // There is no connection, or its last word has been heard.
    std::future::pending().await
}

async fn finished(work: &mut Option<Work>) -> Option<Input> {
    let Some(current) = work else { return std::future::pending().await };
    let outcome = (&mut current.task).await;
    let lost = current.lost.take();
    *work = None;
    match outcome {
        Ok(input) => input,
        Err(_) => lost,
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
