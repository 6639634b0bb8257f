//! What is said over the API. Field names are stable: scripts read them through `vmctl --json`.

use crate::{
    fleet::{
        Problem,
        schema::{Fleet, Limits, Role, Users},
        units::Size,
    },
    host::facts::Engine,
    shim::protocol::{AgentState, Figures, LinkCounters, Session},
    vm::{
        adopt::Verdict,
        failure::Failure,
        handle::Snapshot,
        machine::{Part, State, StopReport, Wanted},
        trace::{self, Point},
    },
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// The host and its VMs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The version of `laird`.
    pub version: String,
    /// The fleet file that it was started with.
    pub fleet_file: PathBuf,
    /// The name of another fleet file that was applied since; it holds until the next start.
    pub applied: Option<String>,
    /// What executes guests.
    pub engine: Engine,
    /// Whether `laird` is root.
    pub root: bool,
    /// Whom the processes of VMs run as.
    pub users: Users,
    /// What holds VMs to what they may take of the host.
    pub limits: Limits,
    /// The VMs, by name.
    pub vms: Vec<VmStatus>,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Where it is in its life, in one word.
    pub state: String,
    /// More about the state: the step, the stage, the reason of a failure.
    pub detail: Option<String>,
    /// Since when it is in that state.
    pub since: jiff::Timestamp,
    /// What is wanted of it, whatever it is.
    pub wanted: Wanted,
    /// Why it is down and should not be.
    pub failure: Option<Failure>,
    /// How often it was started by itself since an operator started it, or since it was last ready for ten minutes.
    pub restarts: u32,
    /// How often its guest rebooted since this `laird` watches it.
    pub reboots: u64,
    /// How its last stop went.
    pub last_stop: Option<StopReport>,
    /// What came of looking for it when this `laird` started, if an earlier one had recorded it.
    pub adoption: Option<Verdict>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: Size,
    /// Its view, while it runs.
    pub view: Option<ViewStatus>,
    /// From the guest kernel's start to ready, in milliseconds.
    pub boot_ms: Option<u64>,
    /// Whether the fleet file differs from what it was started with.
    pub pending_restart: bool,
    /// Its processes.
    pub processes: BTreeMap<Part, i32>,
    /// The names of its links, as `NAME>` where it connects and `>NAME` where it is reached.
    pub links: Vec<String>,
    /// What went over its links.
    pub counters: Vec<LinkCounters>,
    /// When what happened in this boot, in the order of time; in the first boot of a start also what `laird` did for it.
    #[serde(default)]
    pub trace: Vec<Point>,
    /// The guest's figures, as its agent told them last in this boot.
    #[serde(default)]
    pub guest: Option<Box<Figures>>,
    /// When the agent was heard last, if it has gone silent since.
    #[serde(default)]
    pub agent_silent_since: Option<jiff::Timestamp>,
}

/// A VM's view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewStatus {
    /// Its id.
    pub id: String,
    /// Store paths.
    pub paths: u64,
    /// The sum of their NAR sizes in bytes.
    pub bytes: u64,
}

impl VmStatus {
    /// What `snapshot` and the fleet file say of the VM `name`.
    pub fn new(name: &str, snapshot: &Snapshot, fleet: &Fleet) -> Self {
        let configured = fleet.vms.get(name);
        let vm = snapshot.started.as_ref().or(configured);
        let detail = match &snapshot.state {
            State::Starting(step) => {
                serde_json::to_value(step).ok().and_then(|v| Some(v.as_str()?.to_owned()))
            }
            State::Stopping(stage) => {
                serde_json::to_value(stage).ok().and_then(|v| Some(v.as_str()?.to_owned()))
            }
            State::Waiting { failure, seconds } => {
                Some(format!("{failure}; it is started again after {seconds} s"))
            }
            State::Failed(failure) => Some(failure.to_string()),
            State::Quarantined(reason) => Some(reason.clone()),
            State::Stopped | State::Booting | State::Ready | State::Cleaning(_) => None,
        };
        let shim = snapshot.shim.as_ref();
        let generation = snapshot.plan.as_ref().map(|plan| &plan.generation);
        Self {
            name: name.into(),
            role: vm.map(|vm| vm.role).unwrap_or_default(),
            state: snapshot.state.word().into(),
            detail,
            since: snapshot.since,
            wanted: snapshot.wanted,
            failure: snapshot.state.failure().cloned(),
            restarts: snapshot.restarts,
            reboots: snapshot.reboots,
            last_stop: snapshot.last_stop,
            adoption: snapshot.adoption,
            vcpus: vm.map_or(0, |vm| vm.vcpus),
            memory: vm.map_or(Size(0), |vm| vm.memory),
            view: generation.map(|generation| ViewStatus {
                id: generation.id.clone(),
                paths: generation.paths,
                bytes: generation.bytes,
            }),
            boot_ms: match shim.map(|shim| &shim.agent) {
                Some(AgentState::Ready { uptime_ms, .. }) => Some(*uptime_ms),
                _ => None,
            },
            pending_restart: snapshot.started.is_some() && snapshot.started.as_ref() != configured,
            processes: snapshot.processes.iter().copied().collect(),
            links: links(name, fleet),
            counters: snapshot.links().to_vec(),
            trace: trace::merge(&snapshot.start, shim.map(|shim| &shim.times)),
            guest: shim.and_then(|shim| shim.figures.clone()),
            agent_silent_since: shim
                .and_then(|shim| shim.silent_since_unix_ms)
                .and_then(|ms| jiff::Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()),
        }
    }
}

fn links(name: &str, fleet: &Fleet) -> Vec<String> {
    use crate::fleet::schema::Target;
    let mut links = Vec::new();
    for (link, rule) in &fleet.links {
        if rule.from.iter().any(|from| from == name) {
            links.push(format!("{link}>"));
        }
        if matches!(&rule.to, Target::Vm(target) if target.vm == name) {
            links.push(format!(">{link}"));
        }
    }
    links
}

/// Asks for a session with a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRequest {
    /// What it is for.
    pub session: Session,
}

/// Permission for one session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionReply {
    /// Good for one use, soon.
    pub ticket: String,
    /// The shim's socket.
    pub socket: PathBuf,
}

/// Makes a fleet the fleet.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// Another fleet file than the one that `laird` was started with: its name and its text. `None`: read that one again.
    pub file: Option<FleetText>,
}

/// A fleet file that travels.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetText {
    /// Its name, for messages; it tells the format.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// What an apply changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyReply {
    /// VMs that are new.
    pub added: Vec<String>,
    /// VMs that are being stopped and forgotten.
    pub removed: Vec<String>,
    /// VMs that run with what they were started with until they are stopped and started.
    pub pending_restart: Vec<String>,
    /// Whether links changed.
    pub links_changed: bool,
    /// What is better not so in the fleet file; it is the fleet nevertheless.
    pub warnings: Vec<Problem>,
    /// How many more warnings there are.
    pub omitted_warnings: usize,
}

/// What kind of error it is; each has one exit status of `vmctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// It was tried and failed.
    Failed,
    /// The request or the configuration in it is wrong.
    Invalid,
    /// The caller may not do that.
    NotPermitted,
    /// There is no such thing.
    NotFound,
}

/// An error as the API says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind it is.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
}
