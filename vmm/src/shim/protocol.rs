//! What is said on the shim's three sockets: [frames](lair_guest::wire::frame), messages first.

use crate::vm::trace::Times;
use lair_guest::wire::message::{Answer, Ask, DeviceReport, Exec, Statistics, Terminal};
use serde::{Deserialize, Serialize};

/// `laird` to shim, on the control socket. Every request has one [`ControlReply`]; [`Control::Watch`] has one after
/// each change until the connection ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "control", rename_all = "snake_case")]
pub enum Control {
    /// The shim's state, once.
    Status,
    /// The shim's state, now and after each change of the agent, the console, the set of links, or what the guest says of its devices. Counters
    /// and figures that move are no change.
    Watch,
    /// Allows one session.
    Grant(Grant),
    /// Asks the guest's agent.
    Ask {
        /// The request.
        ask: Ask,
    },
    /// Reads the configuration again and tells the agent.
    Reload,
    /// Ends the shim, with all its links and sessions.
    Stop,
}

/// Shim to `laird`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum ControlReply {
    /// The shim's state.
    Status(ShimStatus),
    /// Done.
    Done,
    /// What the guest's agent answered.
    Answer {
        /// Its answer.
        answer: Answer,
    },
    /// It could not be done, for this reason.
    Failed {
        /// For the operator.
        reason: String,
    },
}

/// The state of a VM as its shim sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimStatus {
    /// The VM's name.
    pub vm: String,
    /// The guest's agent.
    pub agent: AgentState,
    /// Whether the console is connected.
    pub console: bool,
    /// Console bytes since the shim's start.
    pub console_bytes: u64,
    /// Every link that starts in this VM, and every one from the host into it, in the order of its configuration.
    /// A link from another VM is counted there, by the shim that carries it.
    pub links: Vec<LinkCounters>,
    /// Since when the agent gives no sign of life though the way to it is open, milliseconds since 1970: the last time it was
    /// heard. Until it is heard again. vhost-device-vsock can lose its worker, and then only a new device helps.
    #[serde(default)]
    pub silent_since_unix_ms: Option<u64>,
    /// The guest's figures, as of the last sign of life in this boot.
    #[serde(default)]
    pub figures: Option<Box<Figures>>,
    /// When what happened in this boot.
    #[serde(default)]
    pub times: Times,
    /// What the guest says of the devices that were passed through to it, as of its last report in this boot.
    #[serde(default)]
    pub devices: Option<Box<GuestDevices>>,
}

/// A guest's report of its devices, in its own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDevices {
    /// The boot in which messages were counted.
    pub boot_id: String,
    /// The report.
    #[serde(flatten)]
    pub report: DeviceReport,
}

/// A guest's figures, in its own words, with what the host can tell of its clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// When they came, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The host's clock minus the guest's, in milliseconds.
    pub clock_skew_ms: i64,
    /// How long the answer took, in milliseconds; the skew is right to half of it.
    pub round_trip_ms: u64,
    /// The figures.
    #[serde(flatten)]
    pub statistics: Statistics,
}

/// The guest's agent, as the shim sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum AgentState {
    /// There is no control channel. Also while the first half of `lair-guest`, in the initramfs, holds it.
    Absent,
    /// The control channel is open, services are starting.
    Connected {
        /// The guest kernel's boot id.
        boot_id: String,
    },
    /// All services are up.
    Ready {
        /// The guest kernel's boot id.
        boot_id: String,
        /// From the guest kernel's start to ready, in milliseconds.
        uptime_ms: u64,
    },
}

/// What went over one link, in the direction in which it is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkCounters {
    /// The link's name.
    pub link: String,
    /// Who opens it: a VM or `host`.
    pub from: String,
    /// What it reaches: a VM, or a socket's path on the host.
    pub to: String,
    /// Connections opened.
    pub connections: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Connections refused.
    pub refused: u64,
    /// Bytes from the side that opened.
    pub bytes_out: u64,
    /// Bytes to the side that opened.
    pub bytes_in: u64,
}

/// Permission for one session, given by `laird` after it has authorised and audited it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Grant {
    /// 64 hexadecimal digits, good for one use.
    pub ticket: String,
    /// Until when, milliseconds since 1970.
    pub expires_unix_ms: u64,
    /// Who it was given to, for the audit log.
    pub uid: u32,
    /// What it is for.
    pub session: Session,
}

/// What a session does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Session {
    /// Runs a command in the guest, or with a terminal and no command a login shell. The client's frames and the agent's pass
    /// unchanged. What a terminal shows is recorded.
    Exec(Exec),
    /// Shows the guest's console, and types on it.
    Console(Console),
    /// Connects to a vsock port of the guest. [`lair_guest::wire::frame::Kind::Data`] both ways.
    Connect {
        /// The port.
        port: u32,
    },
}

/// A session with the guest's console. After the first message, a [`ConsoleEvent`], come frames of
/// [`lair_guest::wire::frame::Kind::Stdout`] with what it shows; the client sends
/// [`lair_guest::wire::frame::Kind::Data`] with what is typed, and [`lair_guest::wire::message::ExecInput`]s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// Only show it. What is typed is ignored, and nothing is recorded: it is all in the console log.
    pub read_only: bool,
    /// The client's terminal, for the recording.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Terminal>,
}

/// What the shim says about a console, among the frames of its output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "console", rename_all = "snake_case")]
pub enum ConsoleEvent {
    /// The session has begun; what the console has shown last comes first.
    Attached {
        /// Whether this session types. One does at a time.
        writable: bool,
        /// The user whose session types instead.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        writer: Option<u32>,
        /// Whether there is a console now. If not, it is shown once there is one.
        connected: bool,
    },
    /// This client read too slowly, and output is missing here.
    Lost {
        /// How much.
        bytes: u64,
    },
    /// The session ends, for this reason.
    Ended {
        /// For the operator.
        reason: String,
    },
}

/// What an operator's client says first on the session socket. The answer is a
/// [`lair_guest::wire::message::LinkReply`], then the session's frames.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionOpen {
    /// [`Grant::ticket`].
    pub ticket: String,
}

/// What another VM's shim says on the dial socket. The answer is a [`DialReply`], sent with the connected
/// descriptor (SCM_RIGHTS) if the link is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// The link.
    pub link: String,
    /// The VM that opens it.
    pub from: String,
}

/// The answer to [`Dial`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "dial", rename_all = "snake_case")]
pub enum DialReply {
    /// The descriptor is a connection to the guest's port.
    Connected {
        /// Whether the agent is behind it, and speaks frames.
        framed: bool,
    },
    /// The link is not open to that VM, or nothing answers.
    Refused {
        /// For the audit log and the guest that asked.
        reason: String,
    },
}
