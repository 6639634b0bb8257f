//! The messages: JSON documents in frames. A field that a peer does not know is ignored, so that a shim or an
//! agent of the previous release keeps working; a change that cannot be ignored raises [`super::VERSION`].

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the host says first on a connection to the agent's port.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "open", rename_all = "snake_case")]
pub enum HostOpen {
    /// The control channel. The agent keeps the newest one and drops the one before.
    Control(Hello),
    /// Runs a command in the guest; the connection carries its streams.
    Exec(Exec),
}

/// The host's greeting on the control channel, with all that this boot needs and no disk should hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// [`super::VERSION`] of the host side.
    pub version: u32,
    /// The ticket of this boot: 64 hexadecimal digits that every [`LinkOpen`] of the guest repeats.
    pub ticket: String,
    /// Links that this VM may open.
    pub links_out: Vec<OutgoingLink>,
    /// Links that end in this VM and have something behind them for the agent to dial.
    pub links_in: Vec<IncomingLink>,
    /// Named secrets, base64.
    pub credentials: BTreeMap<String, String>,
    /// The host's clock, milliseconds since 1970.
    pub unix_ms: u64,
}

/// A link that starts in this VM: `/run/lair/links/NAME`, and a loopback port if it has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutgoingLink {
    /// The link's name in the fleet file.
    pub name: String,
    /// A loopback address and port in the guest, such as `127.0.0.1:5000`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

/// A link that ends in this VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingLink {
    /// The link's name in the fleet file.
    pub name: String,
    /// The vsock port on which the agent listens for the host.
    pub port: u32,
    /// What the agent dials for each connection: the absolute path of a unix socket, or `ADDRESS:PORT`.
    pub connect: String,
}

/// The agent's answer to [`Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "hello", rename_all = "snake_case")]
pub enum HelloReply {
    /// The channel is open.
    Welcome {
        /// [`super::VERSION`] of the agent.
        version: u32,
        /// The guest kernel's boot id: it tells a reboot from a lost connection.
        boot_id: String,
        /// Who answers.
        phase: Phase,
    },
    /// The channel is closed, for this reason.
    Refused {
        /// For the log and the operator.
        reason: String,
    },
}

/// Which half of `lair-guest` is at the other end of the control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// PID 1 of the initramfs, which takes credentials and then ends the channel.
    Init,
    /// The agent.
    Agent,
}

/// What the host asks on an open control channel. Each gets one [`Event::Reply`] with its id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host, repeated in the reply.
    pub id: u64,
    /// What is asked.
    pub ask: Ask,
}

/// The requests of the control channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Nothing: an in-band sign of life.
    Ping,
    /// The guest's figures.
    Statistics,
    /// End services, sync, power off.
    PowerOff,
    /// End services, sync, reboot.
    Reboot,
}

/// What the agent says on an open control channel.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// All services of the guest are up. Said once for each control channel, at once if it is so already.
    Ready {
        /// Milliseconds from the guest kernel's start to this state.
        uptime_ms: u64,
    },
    /// A service ended, with how, and whether it is started again.
    ServiceEnded {
        /// The service's name in the fleet file.
        service: String,
        /// Its exit status or signal in words.
        how: String,
    },
    /// The answer to a [`Request`].
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it.
        answer: Answer,
    },
}

/// Answers of the control channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done, or under way where the guest ends with it.
    Done,
    /// The guest's figures.
    Statistics(Statistics),
    /// It could not be done, for this reason.
    Failed(String),
}

/// The guest's figures; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// All memory that the guest's kernel manages.
    pub memory_total: u64,
    /// Memory that new programs could have without swapping.
    pub memory_available: u64,
    /// Load averages over 1, 5 and 15 minutes, in thousandths.
    pub load_thousandths: [u64; 3],
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// The guest's clock, milliseconds since 1970.
    pub unix_ms: u64,
}

/// A command to run in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked up in the guest's PATH, and its arguments. None with a terminal: root's login shell.
    pub command: Vec<String>,
    /// Added to the agent's environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// A terminal for the command: then its output is all [`super::frame::Kind::Stdout`]. Whether it has one says
    /// [`ExecEvent::Started`], because an agent or a shim of an earlier release ignores this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Terminal>,
}

impl Exec {
    /// Whether it is root's login shell.
    pub fn is_shell(&self) -> bool {
        self.command.is_empty() && self.terminal.is_some()
    }
}

/// The terminal in front of the operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its type, for `TERM`.
    pub term: String,
    /// Its size.
    pub size: TerminalSize,
}

/// The size of a terminal in characters; 0 where it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What the host says about a command that has a terminal, among the frames of its input. Not before
/// [`ExecEvent::Started`] has said that it has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "input", rename_all = "snake_case")]
pub enum ExecInput {
    /// The terminal's size has changed.
    Resize(TerminalSize),
}

/// What the agent says about a command, among the frames of its output.
///
/// `Started` comes before any output, `Exited` or `Killed` after all of it. `Failed` comes in place of all, and from the
/// shim in place of the end where the session is cut off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "exec", rename_all = "snake_case")]
pub enum ExecEvent {
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
        /// Whether it has a terminal.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        terminal: bool,
    },
    /// The command exited with this status.
    Exited {
        /// 0 to 255.
        status: i32,
    },
    /// A signal ended the command.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// The command did not start, or its end will not be known, for this reason.
    Failed {
        /// For the operator.
        reason: String,
    },
}

/// What the guest says first on a connection to [`super::LINK_PORT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkOpen {
    /// [`super::VERSION`] of the agent.
    pub version: u32,
    /// [`Hello::ticket`].
    pub ticket: String,
    /// The name of the link.
    pub link: String,
}

/// Whether a link's connection is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "link", rename_all = "snake_case")]
pub enum LinkReply {
    /// Data may flow.
    Opened,
    /// The connection ends here, for this reason.
    Refused {
        /// For the log and for whoever opened the link.
        reason: String,
    },
}
