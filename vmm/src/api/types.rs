//! What is said over the API. Field names are stable: scripts read them through `vmctl --json`.

use crate::{
    fleet::{
        Problem,
        diff::Change,
        schema::{Fleet, Limits, Role, Users},
        units::Size,
    },
    host::{facts::Engine, pci::Address},
    shim::protocol::{AgentState, Figures, GuestDevices, LinkCounters, Session},
    vm::{
        adopt::Verdict,
        failure::Failure,
        handle::Snapshot,
        machine::{Part, State, StopReport, Wanted},
        trace::{self, Point},
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// The version of this API. It changes when a client of the version before would misread an answer.
pub const API_VERSION: u32 = 1;

/// The header in which each side says its [`API_VERSION`]. A request without it is taken as one of this version.
pub const API_HEADER: &str = "lair-api-version";

/// The versions of `laird` and of its API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionReply {
    /// The version of `laird`.
    pub laird: String,
    /// [`API_VERSION`].
    pub api: u32,
}

/// The host and its VMs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostStatus {
    /// The version of `laird`.
    pub version: String,
    /// The fleet file that it was started with.
    pub fleet_file: PathBuf,
    /// The name of another fleet file that was applied since; it holds until the next start.
    pub applied: Option<String>,
    /// What executes guests.
    #[schemars(with = "String")]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    #[schemars(with = "String")]
    pub wanted: Wanted,
    /// Why it is down and should not be.
    #[schemars(with = "Option<BTreeMap<String, serde_json::Value>>")]
    pub failure: Option<Failure>,
    /// How often it was started by itself since an operator started it, or since it was last ready for ten minutes.
    pub restarts: u32,
    /// How often its guest rebooted since this `laird` watches it.
    pub reboots: u64,
    /// How its last stop went.
    #[schemars(with = "Option<BTreeMap<String, serde_json::Value>>")]
    pub last_stop: Option<StopReport>,
    /// What came of looking for it when this `laird` started, if an earlier one had recorded it.
    #[schemars(with = "Option<String>")]
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
    #[schemars(with = "BTreeMap<String, i32>")]
    pub processes: BTreeMap<Part, i32>,
    /// The names of its links, as `NAME>` where it connects and `>NAME` where it is reached.
    pub links: Vec<String>,
    /// What went over its links.
    #[schemars(with = "Vec<BTreeMap<String, serde_json::Value>>")]
    pub counters: Vec<LinkCounters>,
    /// When what happened in this boot, in the order of time; in the first boot of a start also what `laird` did for it.
    #[serde(default)]
    #[schemars(with = "Vec<BTreeMap<String, serde_json::Value>>")]
    pub trace: Vec<Point>,
    /// The guest's figures, as its agent told them last in this boot.
    #[serde(default)]
    #[schemars(with = "Option<BTreeMap<String, serde_json::Value>>")]
    pub guest: Option<Box<Figures>>,
    /// When the agent was heard last, if it has gone silent since.
    #[serde(default)]
    pub agent_silent_since: Option<jiff::Timestamp>,
    /// The devices that were passed through to it as the guest sees them, with what its kernel says against them, and its GPUs' figures.
    #[serde(default)]
    #[schemars(with = "Option<BTreeMap<String, serde_json::Value>>")]
    pub devices: Option<Box<GuestDevices>>,
    /// What it runs without and should not, one sentence each: limits that somebody removed, a control socket that was lost, a device that
    /// failed.
    #[serde(default)]
    pub degraded: Vec<String>,
}

/// A VM's view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
        let vm = snapshot.started().or(configured);
        let shim = snapshot.shim.as_ref();
        let generation = snapshot.plan.as_ref().map(|plan| &plan.generation);
        Self {
            name: name.into(),
            role: vm.map(|vm| vm.role).unwrap_or_default(),
            state: snapshot.state.word().into(),
            detail: detail(&snapshot.state),
            since: snapshot.since,
            wanted: snapshot.wanted,
            degraded: snapshot.degraded.clone(),
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
            pending_restart: snapshot.started().is_some() && snapshot.started() != configured,
            processes: snapshot.processes.iter().copied().collect(),
            links: links(name, fleet),
            counters: snapshot.links().to_vec(),
            trace: trace::merge(&snapshot.start, shim.map(|shim| &shim.times)),
            guest: shim.and_then(|shim| shim.figures.clone()),
            devices: shim.and_then(|shim| shim.devices.clone()),
            agent_silent_since: shim
                .and_then(|shim| shim.silent_since_unix_ms)
                .and_then(|ms| jiff::Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()),
        }
    }
}

/// More about a state than its word: the step, the stage, the reason of a failure.
pub fn detail(state: &State) -> Option<String> {
    let word = |value: Result<serde_json::Value, _>| Some(value.ok()?.as_str()?.to_owned());
    match state {
        State::Starting(step) => word(serde_json::to_value(step)),
        State::Stopping(stage) => word(serde_json::to_value(stage)),
        State::Waiting { failure, seconds } => {
            Some(format!("{failure}; it is started again after {seconds} s"))
        }
        State::Failed(failure) => Some(failure.to_string()),
        State::Quarantined(reason) => Some(reason.clone()),
        State::Stopped | State::Booting | State::Ready | State::Cleaning(_) => None,
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
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SessionRequest {
    /// What it is for.
    #[schemars(with = "BTreeMap<String, serde_json::Value>")]
    pub session: Session,
}

/// Permission for one session.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SessionReply {
    /// Good for one use, soon.
    pub ticket: String,
    /// The shim's socket.
    pub socket: PathBuf,
}

/// Makes a fleet the fleet.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// Another fleet file than the one that `laird` was started with: its name and its text. `None`: read that one again.
    #[serde(default)]
    pub file: Option<FleetText>,
    /// Say what would change, and change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// A fleet file that travels.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FleetText {
    /// Its name, for messages; it tells the format.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// What an apply changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApplyReply {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// What differs, VM by VM and link by link.
    pub changes: Vec<Change>,
    /// VMs that are new.
    pub added: Vec<String>,
    /// VMs that are being stopped and forgotten.
    pub removed: Vec<String>,
    /// VMs that run with what they were started with until they are stopped and started.
    pub pending_restart: Vec<String>,
    /// Whether links changed.
    pub links_changed: bool,
    /// What is better not so in the fleet file; it is the fleet nevertheless.
    #[schemars(with = "Vec<BTreeMap<String, serde_json::Value>>")]
    pub warnings: Vec<Problem>,
    /// How many more warnings there are.
    pub omitted_warnings: usize,
}

/// What kind of error it is; each has one exit status of `vmctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request or the configuration in it is wrong.
    Invalid,
    /// The caller may not do that.
    NotPermitted,
    /// There is no such thing.
    NotFound,
    /// It took longer than it may.
    TimedOut,
    /// The caller speaks another version of the API.
    Version,
    /// The caller has too many connections, or all together have.
    Busy,
    /// It was tried and failed. Also what a later `laird` has its own word for.
    #[serde(other)]
    Failed,
}

/// An error as the API says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind it is.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// What may help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same with a hint.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// What to wait for, when a VM is asked for a change.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WaitQuery {
    /// Go on telling what the VM does until it is where it was asked to be, has failed, or the time is over. Otherwise there is one
    /// line, when the request is taken.
    pub wait: bool,
    /// How long to wait, in seconds.
    pub timeout: Option<u64>,
}

/// What came of waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The request is taken; nobody waits.
    Accepted,
    /// The VM is where it was asked to be.
    Done,
    /// It failed on its way there.
    Failed,
    /// It is not there yet, and nobody waits any longer. It goes on.
    TimedOut,
}

/// How far a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// The VM.
    pub vm: String,
    /// Where it is in its life, in one word.
    pub state: String,
    /// More about the state: the step, the stage, the reason of a failure.
    pub detail: Option<String>,
    /// Since the request was taken.
    pub elapsed_ms: u64,
    /// What came of it: in the last line only.
    pub outcome: Option<Outcome>,
}

/// How to read a console log.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogQuery {
    /// Go on with what comes.
    pub follow: bool,
}

/// Which events to tell.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EventsQuery {
    /// Go on with what happens.
    pub follow: bool,
    /// Only events with larger ids.
    pub after: Option<u64>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Its number. Numbers rise, also over restarts of `laird`.
    pub id: u64,
    /// When.
    pub time: jiff::Timestamp,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A VM is known: it is new in the fleet, or `laird` has just started and found it so.
    Known {
        /// The VM.
        vm: String,
        /// Its state.
        state: String,
        /// More about the state.
        detail: Option<String>,
        /// Whether processes of it ran already, under an earlier `laird`.
        adopted: bool,
    },
    /// A VM's state changed.
    State {
        /// The VM.
        vm: String,
        /// The state before.
        from: String,
        /// The state now.
        state: String,
        /// More about the state: the step, the stage, the reason of a failure.
        detail: Option<String>,
    },
    /// A VM is no longer known: the fleet file no longer has it, and it has stopped.
    Forgotten {
        /// The VM.
        vm: String,
    },
    /// A fleet became the fleet.
    Applied {
        /// Another file than `laird` was started with.
        file: Option<String>,
        /// VMs that are new.
        added: Vec<String>,
        /// VMs that are gone.
        removed: Vec<String>,
        /// VMs that follow with their next start.
        pending_restart: Vec<String>,
        /// Whether links changed.
        links_changed: bool,
    },
    /// A VM ran out of memory, and processes of it were killed.
    Oom {
        /// The VM.
        vm: String,
        /// How many processes.
        killed: u64,
    },
    /// All of a VM waits for memory.
    Pressure {
        /// The VM.
        vm: String,
        /// The share of the last ten seconds, in percent.
        percent: u64,
    },
    /// A VM runs, and is not limited as it should be.
    Unlimited {
        /// The VM.
        vm: String,
        /// Why.
        reason: String,
    },
    /// The state of a device that VMs are given has changed.
    Device {
        /// The lowest address of the devices that go together.
        device: Address,
        /// The VM that has it, or is to have it.
        vm: Option<String>,
        /// Its state.
        state: String,
        /// More about the state: who had it before, how long its reset took, why it is quarantined, its driver.
        detail: Option<String>,
    },
    /// A guest has said something against a device of its VM, for the first time in this lease.
    DeviceFault {
        /// The device, or the function of it.
        device: Address,
        /// The VM.
        vm: String,
        /// What, in words.
        fault: String,
    },
    /// A VM's lease of a device is over.
    LeaseEnded {
        /// The lowest address of the devices that go together.
        device: Address,
        /// The VM.
        vm: String,
        /// What came of it; all of it is in the device's `lease`.
        summary: String,
    },
    /// Events are missing here, because this reader was too slow or came too late.
    Dropped {
        /// How many.
        count: u64,
    },
    /// What a later `laird` has to say.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// Which records of the audit logs to tell.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuditQuery {
    /// Only those of this time and later.
    pub since: Option<jiff::Timestamp>,
    /// Only those that are about this VM.
    pub vm: Option<String>,
    /// How many at most, the newest ones: 1000 unless told otherwise, at most 10000.
    pub limit: Option<usize>,
    /// Go on with what is recorded.
    pub follow: bool,
}

/// A record of an audit log: of an attempt (`verb`), of a link or a session (`kind`), or of a number of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRecord {
    /// When.
    pub time: jiff::Timestamp,
    /// Whose record it is: `laird` or `shim`.
    pub source: String,
    /// What the record says.
    #[serde(flatten)]
    pub fields: serde_json::Map<String, serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passthrough::certificate::FaultCount;

    #[test]
    fn cl11_what_a_later_laird_has_words_for_is_read_as_what_is_not_known() {
        let error = r#"{ "kind": "overheated", "message": "The host is too hot", "hint": "wait" }"#;
        let error: ApiError = serde_json::from_str(error).unwrap();
        assert_eq!(error, ApiError::new(ErrorKind::Failed, "The host is too hot").hint("wait"));
        let fault =
            r#"{ "address": "0000:01:00.0", "kind": "row_remap", "rows": 3, "count": 2, "text": "x" }"#;
        let fault: FaultCount = serde_json::from_str(fault).unwrap();
        assert_eq!(fault.fault.to_string(), "something that this release does not know");
        assert!(!fault.fault.is_fatal() && fault.count == 2);
        let event =
            r#"{ "id": 7, "time": "1970-01-01T00:00:00Z", "event": "migrated", "vm": { "name": "a" } }"#;
        assert_eq!(serde_json::from_str::<Event>(event).unwrap().kind, EventKind::Unknown);
        assert!(serde_json::from_str::<Event>(&event.replace("migrated", "state")).is_err());
    }
}
