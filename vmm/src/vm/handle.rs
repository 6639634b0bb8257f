//! A VM as the rest of `laird` sees it: what is known of it, and how to ask for a change.

use super::{
    actor::{Exit, Fault},
    adopt::Verdict,
    machine::{Input, Life, Part, Refusal, Request, Stage, State, StopReport, Wanted},
    plan::Plan,
    running::Running,
    trace::Start,
};
use crate::{
    fleet::{gpus::Gpu, schema::Vm},
    host::process::ProcessId,
    shim::protocol::{LinkCounters, ShimStatus},
};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// How many things may wait for a VM's task. Whoever has more waits.
pub(super) const MAILBOX: usize = 64;

/// What can be known of a VM without asking it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it is in its life.
    pub state: State,
    /// Since when.
    pub since: jiff::Timestamp,
    /// What is wanted of it.
    pub wanted: Wanted,
    /// How often it was started by itself since an operator started it, or since it was last ready for long.
    pub restarts: u32,
    /// How its last stop went.
    pub last_stop: Option<StopReport>,
    /// What came of looking for it when this `laird` started, if an earlier one had recorded it.
    pub adoption: Option<Verdict>,
    /// How often its guest rebooted since this `laird` watches it.
    pub reboots: u64,
    /// Its plan, while it runs.
    pub plan: Option<Arc<Plan>>,
    /// Its processes, while it runs.
    pub processes: Vec<(Part, i32)>,
    /// How its start went so far, while it runs.
    pub start: Arc<Start>,
    /// What its shim said last.
    pub shim: Option<ShimStatus>,
    /// What it runs without, in words.
    pub degraded: Vec<String>,
}

/// What is lost with the hypervisor's control socket.
const DEAF: &str = "its hypervisor's control socket is not connected: neither a panic nor a power-off of the guest is noticed";

impl Snapshot {
    pub(super) fn of(life: &Life, since: jiff::Timestamp, running: &Running) -> Self {
        let deaf = matches!(life.state, State::Booting | State::Ready) && running.qmp().is_none();
        Self {
            degraded: deaf.then(|| DEAF.into()).into_iter().collect(),
            state: life.state.clone(),
            since,
            wanted: life.wanted,
            restarts: life.history.restarts(),
            last_stop: life.last_stop,
            adoption: None,
            reboots: 0,
            plan: running.plan(),
            processes: running.processes().iter().map(|(part, process)| (*part, process.id().pid)).collect(),
            start: running.start(),
            shim: None,
        }
    }

    /// The fleet file's words with which it was started, while it runs.
    pub fn started(&self) -> Option<&Vm> {
        self.plan.as_ref().map(|plan| &plan.vm)
    }

    /// The counters of the VM's links.
    pub fn links(&self) -> &[LinkCounters] {
        self.shim.as_ref().map_or(&[], |shim| &shim.links)
    }
}

/// A VM's task, as the supervisor sees it.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) queue: mpsc::Sender<Mail>,
    pub(super) snapshot: watch::Receiver<Snapshot>,
    pub(super) exit: watch::Receiver<Option<Exit>>,
}

#[derive(Debug)]
pub(super) enum Mail {
    Request(Request, oneshot::Sender<Result<(), Refusal>>),
    /// It should have started by itself.
    NotStarted(String),
    /// It was taken out of the fleet, of which a look at the fleet may come too late.
    Removed,
    /// The host shuts down: it is to end and stays down.
    Close(Stage),
    Ended(Part, ProcessId, String),
    Shim(ProcessId, Box<ShimStatus>),
    /// The shim was told the links of the second plan, in place of those of the first.
    Reloaded([Arc<Plan>; 2], Result<(), String>),
    Input(Input),
    /// It has the devices of this entry of the fleet file and runs with this plan, or does not have them.
    Plugged(Vec<Gpu>, Result<Box<Plan>, Fault>),
    /// The hypervisor is connected again.
    Connected,
    #[cfg(test)]
    Panic,
}

impl Handle {
    /// Asks for a change; the answer comes as soon as it is taken or refused, not when it is done.
    pub async fn request(&self, request: Request) -> Result<(), Refusal> {
        let (sender, receiver) = oneshot::channel();
        self.queue.send(Mail::Request(request, sender)).await.map_err(|_| Refusal::Lost)?;
        receiver.await.unwrap_or(Err(Refusal::Lost))
    }

    /// Tells the VM why it was not started by itself: it is failed then, unless it has been started meanwhile.
    pub async fn not_started(&self, reason: String) {
        let _ = self.queue.send(Mail::NotStarted(reason)).await;
    }

    /// Tells the VM that it was taken out of the fleet. Should it be back already, it starts anew.
    pub fn removed(&self) {
        self.post(Mail::Removed);
    }

    /// Ends the VM, beginning with this stage, without a change of what is wanted of it: the host shuts down.
    pub fn close(&self, from: Stage) {
        self.post(Mail::Close(from));
    }

    /// Never waits: a task whose disk hangs must not hold up what concerns other VMs.
    fn post(&self, mail: Mail) {
        if let Err(mpsc::error::TrySendError::Full(mail)) = self.queue.try_send(mail) {
            let queue = self.queue.clone();
            tokio::spawn(async move { queue.send(mail).await });
        }
    }

    /// Has the VM's task panic.
    #[cfg(test)]
    pub(crate) async fn panic(&self) {
        let _ = self.queue.send(Mail::Panic).await;
    }

    /// What is known of the VM now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// Changes of the VM.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.clone()
    }

    /// Waits until nothing of the VM runs, as far as `laird` knows, or its task has ended.
    pub async fn down(&self) {
        let mut changes = self.watch();
        let _ = changes.wait_for(|snapshot| !snapshot.state.is_active()).await;
    }

    /// Waits until the task has ended; says how. `None` if it was lost.
    pub async fn exit(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit)
    }
}
