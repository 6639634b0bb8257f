//! The executor of one VM's lifecycle: one task, one queue. It feeds the machine, performs what the machine says, and
//! publishes what it sees.

use super::{
    machine::{self, Action, Input, Part, Patience, Refusal, Request, Stage, State},
    plan::{self, Plan},
    record::Record,
    steps::{Context, Instance, reload_links},
};
use crate::{
    error::chain,
    fleet::{
        limits::Need,
        schema::{Fleet, Vm},
    },
    host::facts::Engine,
    hypervisor::Event,
    shim::{
        client,
        protocol::{AgentState, LinkCounters, ShimStatus},
    },
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// How long the last words of a hypervisor may be on their way.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What can be known of a VM without asking it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it is in its life.
    pub state: State,
    /// Since when.
    pub since: jiff::Timestamp,
    /// The fleet file's words with which it was started, while it runs.
    pub started: Option<Vm>,
    /// Its plan, while it runs.
    pub plan: Option<Arc<Plan>>,
    /// Its processes, while it runs.
    pub processes: Vec<(Part, i32)>,
    /// What its shim said last.
    pub shim: Option<ShimStatus>,
}

/// A VM's task, as the supervisor sees it.
#[derive(Debug, Clone)]
pub struct Handle {
    queue: mpsc::UnboundedSender<Mail>,
    snapshot: watch::Receiver<Snapshot>,
}

#[derive(Debug)]
enum Mail {
    Request(Request, oneshot::Sender<Result<(), Refusal>>),
    Input(Input),
    Deadline(u64),
    Shim(ShimStatus),
    FleetChanged,
}

impl Handle {
    /// Asks for a change; the answer comes as soon as it is taken or refused, not when it is done.
    pub async fn request(&self, request: Request) -> Result<(), Refusal> {
        let (sender, receiver) = oneshot::channel();
        let _ = self.queue.send(Mail::Request(request, sender));
        // The task ends only with the supervisor.
        receiver.await.unwrap_or(Ok(()))
    }

    /// Tells the VM that the fleet file has changed: its links follow at once, the rest with its next start.
    pub fn fleet_changed(&self) {
        let _ = self.queue.send(Mail::FleetChanged);
    }

    /// Tells the VM why it was not started by itself: it is failed then, unless it has been started meanwhile.
    pub fn not_started(&self, reason: String) {
        let _ = self.queue.send(Mail::Input(Input::NotStarted(reason)));
    }

    /// What is known of the VM now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// Changes of the VM.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.clone()
    }
}

/// What an actor begins with.
#[derive(Debug)]
pub struct Beginning {
    /// The state.
    pub state: State,
    /// Since when.
    pub since: jiff::Timestamp,
    /// What runs.
    pub instance: Instance,
}

/// Starts the task of one VM.
pub fn spawn(context: Context, fleet: watch::Receiver<Arc<Fleet>>, beginning: Beginning) -> Handle {
    let (queue, mailbox) = mpsc::unbounded_channel();
    let (events, hypervisor_events) = mpsc::unbounded_channel();
    let Beginning { state, since, instance } = beginning;
    if let Some(memory) = has(&context.name, &state, &instance, &fleet.borrow()) {
        context.budget.adopt(&context.name, memory);
    }
    let (snapshot, watcher) = watch::channel(Snapshot::of(&state, since, &instance, None));
    let actor = Actor {
        context,
        fleet,
        state,
        since,
        instance,
        queue: queue.clone(),
        events,
        deadline: None,
        epoch: 0,
        shim: None,
        shim_status: None,
        snapshot,
    };
    tokio::spawn(actor.run(mailbox, hypervisor_events));
    Handle { queue, snapshot: watcher }
}

/// The memory that a VM has from the beginning. Of one that is quarantined something may still run, as big as the fleet file says.
fn has(name: &str, state: &State, instance: &Instance, fleet: &Fleet) -> Option<Need> {
    if *state == State::Stopped {
        return None;
    }
    instance.plan.as_ref().map(|plan| Need::of(&plan.vm)).or_else(|| Some(Need::of(fleet.vms.get(name)?)))
}

struct Actor {
    context: Context,
    fleet: watch::Receiver<Arc<Fleet>>,
    state: State,
    since: jiff::Timestamp,
    instance: Instance,
    queue: mpsc::UnboundedSender<Mail>,
    events: mpsc::UnboundedSender<Event>,
    deadline: Option<JoinHandle<()>>,
    /// Counts deadlines, so that one that has passed already but no longer counts is told apart.
    epoch: u64,
    shim: Option<JoinHandle<()>>,
    shim_status: Option<ShimStatus>,
    snapshot: watch::Sender<Snapshot>,
}

impl Actor {
    async fn run(
        mut self,
        mut mailbox: mpsc::UnboundedReceiver<Mail>,
        mut hypervisor_events: mpsc::UnboundedReceiver<Event>,
    ) {
        self.adopt().await;
        loop {
            tokio::select! {
                mail = mailbox.recv() => match mail {
                    Some(mail) => {
                        if matches!(mail, Mail::Input(Input::Ended(Part::Hypervisor, _))) {
                            self.hear_out(&mut hypervisor_events).await;
                        }
                        self.receive(mail).await;
                    }
                    None => return,
                },
                Some(event) = hypervisor_events.recv() => self.hear(&event).await,
            }
        }
    }

    async fn hear(&mut self, event: &Event) {
        match event {
            Event::GuestPowerOff => self.step(Input::GuestPowerOff).await,
            Event::GuestReboot => tracing::info!(vm = self.context.name, "the guest reboots"),
            // The hypervisor's own end is seen by its pidfd; a lost connection says nothing more.
            Event::Lost => {}
        }
    }

    /// Takes what the hypervisor said before it ended: whether the guest powered off tells a stop from a failure, and its end
    /// may be seen before its words.
    async fn hear_out(&mut self, events: &mut mpsc::UnboundedReceiver<Event>) {
        while let Ok(Some(event)) = timeout(LAST_WORDS, events.recv()).await {
            if event == Event::Lost {
                return;
            }
            self.hear(&event).await;
        }
    }

    /// Watches what was running before this `laird`.
    async fn adopt(&mut self) {
        let parts: Vec<_> = self.instance.processes.keys().copied().collect();
        for part in parts {
            self.watch_process(part);
        }
        if let Some(plan) = self.instance.plan.clone() {
            if let Err(error) = self.instance.connect_qmp(&plan, &self.events).await {
                tracing::warn!(vm = plan.name, %error, "adopted, but its hypervisor does not answer");
            }
            if self.state == State::Booting {
                self.perform(vec![Action::Expect(Patience::Boot)]).await;
            }
            self.follow_links().await;
        }
        self.publish();
    }

    async fn receive(&mut self, mail: Mail) {
        match mail {
            Mail::Request(request, answer) => match self.admit(request) {
                Ok((state, actions)) => {
                    let _ = answer.send(Ok(()));
                    self.enter(state, actions).await;
                }
                Err(refusal) => {
                    let _ = answer.send(Err(refusal));
                }
            },
            Mail::Input(input) => self.step(input).await,
            Mail::Deadline(epoch) if epoch == self.epoch => self.step(Input::Deadline).await,
            Mail::Deadline(_) => {}
            Mail::Shim(status) => {
                let input = match status.agent {
                    AgentState::Ready { .. } => Input::AgentReady,
                    AgentState::Absent | AgentState::Connected { .. } => Input::AgentLost,
                };
                self.shim_status = Some(status);
                self.step(input).await;
                self.publish();
            }
            Mail::FleetChanged => self.follow_links().await,
        }
    }

    /// What a request leads to. One that starts the VM takes its memory; where that or a program is missing it is refused before
    /// anything is done.
    fn admit(&self, request: Request) -> Result<(State, Vec<Action>), Refusal> {
        let (state, actions) = machine::request(&self.state, request)?;
        if state.is_active()
            && !self.state.is_active()
            && let Some(vm) = self.fleet.borrow().vms.get(&self.context.name)
        {
            self.context.host.tools.suffice_for(vm)?;
            self.context.budget.admit(&self.context.name, Need::of(vm))?;
        }
        Ok((state, actions))
    }

    async fn step(&mut self, input: Input) {
        let (state, actions) = machine::step(&self.state, input);
        self.enter(state, actions).await;
    }

    async fn enter(&mut self, state: State, actions: Vec<Action>) {
        if state != self.state {
            if state.word() != self.state.word() {
                self.since = jiff::Timestamp::now();
            }
            match &state {
                State::Failed(reason) => tracing::error!(vm = self.context.name, reason, "failed"),
                _ if state.word() != self.state.word() => {
                    tracing::info!(vm = self.context.name, state = state.word());
                }
                _ => {}
            }
            self.state = state;
            if !self.state.is_active() {
                self.context.budget.release(&self.context.name);
            }
            self.record();
            self.publish();
        }
        self.perform(actions).await;
    }

    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Perform(step) => {
                    let fleet = Arc::clone(&self.fleet.borrow());
                    let known: Vec<_> = self.instance.processes.keys().copied().collect();
                    let outcome = self.instance.perform(step, &self.context, &fleet, &self.events).await;
                    let started: Vec<_> = self
                        .instance
                        .processes
                        .keys()
                        .copied()
                        .filter(|part| !known.contains(part))
                        .collect();
                    for part in started {
                        self.watch_process(part);
                    }
                    self.record();
                    let input = match outcome {
                        Ok(()) => Input::StepDone(step),
                        Err(error) => Input::StepFailed(step, chain(&error)),
                    };
                    let _ = self.queue.send(Mail::Input(input));
                }
                Action::End(stage) => {
                    if let Err(error) = self.instance.end(stage).await {
                        tracing::warn!(
                            vm = self.context.name,
                            ?stage,
                            error = chain(&error),
                            "cannot ask the guest to end"
                        );
                        // The next stage need not wait for this one.
                        let _ = self.queue.send(Mail::Deadline(self.epoch.wrapping_add(1)));
                    }
                }
                Action::Expect(patience) => {
                    self.relax();
                    let (queue, epoch) = (self.queue.clone(), self.epoch);
                    let patience = duration(patience, self.context.host.engine);
                    self.deadline = Some(tokio::spawn(async move {
                        sleep(patience).await;
                        let _ = queue.send(Mail::Deadline(epoch));
                    }));
                }
                Action::Relax => self.relax(),
                Action::CleanUp => {
                    if let Some(task) = self.shim.take() {
                        task.abort();
                    }
                    self.instance.clean_up().await;
                    self.shim_status = None;
                    let _ = self.queue.send(Mail::Input(Input::Cleaned));
                }
            }
        }
    }

    fn relax(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if let Some(task) = self.deadline.take() {
            task.abort();
        }
    }

    fn watch_process(&mut self, part: Part) {
        let Some(process) = self.instance.processes.get(&part).cloned() else { return };
        let queue = self.queue.clone();
        tokio::spawn(async move {
            let how = process.ended().await;
            let _ = queue.send(Mail::Input(Input::Ended(part, how)));
        });
        if part == Part::Shim
            && let Some(plan) = &self.instance.plan
        {
            let task = tokio::spawn(watch_shim(plan.shim.sockets.control.clone(), self.queue.clone()));
            if let Some(earlier) = self.shim.replace(task) {
                earlier.abort();
            }
        }
    }

    /// Brings the shim's links to what the fleet file says now.
    async fn follow_links(&mut self) {
        let Some(plan) = self.instance.plan.clone() else { return };
        let fleet = Arc::clone(&self.fleet.borrow());
        let shim = match plan::shim(&plan.name, &plan.vm, &fleet, &self.context.dirs, &plan.dirs) {
            Ok(shim) => shim,
            Err(error) => return tracing::warn!(vm = plan.name, %error, "its links stay as they are"),
        };
        if shim == plan.shim {
            return;
        }
        let plan = Arc::new(Plan { shim, ..(*plan).clone() });
        self.instance.plan = Some(Arc::clone(&plan));
        if self.instance.processes.contains_key(&Part::Shim)
            && let Err(error) = reload_links(&plan).await
        {
            tracing::warn!(vm = plan.name, error = chain(&error), "its shim did not take the new links");
        }
        self.publish();
    }

    /// Writes down what a later `laird` needs. A write that fails is reported and does not end the VM.
    fn record(&self) {
        let Some(plan) = &self.instance.plan else { return };
        if !plan.dirs.run.exists() {
            return;
        }
        let host = &self.context.host;
        let mut record = Record::new(&host.boot_id, &plan.name, &plan.vm, &plan.generation, host.engine);
        record.state = self.state.clone();
        record.since = self.since;
        record.processes =
            self.instance.processes.iter().map(|(part, process)| (*part, process.id())).collect();
        if let Err(error) = record.write(&plan.dirs.record()) {
            tracing::error!(vm = plan.name, error = chain(&error), "cannot record the runtime state");
        }
    }

    fn publish(&self) {
        let shim = self.shim_status.clone();
        self.snapshot.send_replace(Snapshot::of(&self.state, self.since, &self.instance, shim));
    }
}

impl Snapshot {
    fn of(state: &State, since: jiff::Timestamp, instance: &Instance, shim: Option<ShimStatus>) -> Self {
        Self {
            state: state.clone(),
            since,
            started: instance.plan.as_ref().map(|plan| plan.vm.clone()),
            plan: instance.plan.clone(),
            processes: instance.processes.iter().map(|(part, process)| (*part, process.id().pid)).collect(),
            shim,
        }
    }

    /// The counters of the VM's links.
    pub fn links(&self) -> &[LinkCounters] {
        self.shim.as_ref().map_or(&[], |shim| &shim.links)
    }
}

async fn watch_shim(control: PathBuf, queue: mpsc::UnboundedSender<Mail>) {
    loop {
        if let Ok(mut changes) = client::watch(&control).await {
            while let Ok(Some(status)) = changes.next().await {
                if queue.send(Mail::Shim(status)).is_err() {
                    return;
                }
            }
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// How long something may take. Emulation is many times slower, and this host may be busy with other guests.
fn duration(patience: Patience, engine: Engine) -> Duration {
    let seconds = match patience {
        Patience::Boot => 60,
        Patience::Stop(Stage::Agent) => 20,
        Patience::Stop(Stage::PowerButton) => 5,
        Patience::Stop(Stage::Terminate | Stage::Kill) => 10,
    };
    let factor = match (engine, patience) {
        (Engine::Tcg, Patience::Boot) => 5,
        _ => 1,
    };
    Duration::from_secs(seconds * factor)
}
