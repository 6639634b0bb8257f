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

/// The host's greeting on the control channel. Credentials come later, once the host knows who is there: see [`Ask::Credentials`].
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
    /// Empty: an agent of the first release takes no greeting without this field. What a host of that release has in it is not used.
    #[serde(default)]
    pub credentials: BTreeMap<String, String>,
    /// The host's clock, milliseconds since 1970.
    pub unix_ms: u64,
    /// What this host understands beyond the first release.
    #[serde(default)]
    pub features: Features,
}

/// What a peer understands beyond the first release of this version of the protocol. It says so in its greeting, and is asked
/// and told nothing else: a message that it does not know would end the channel. What is missing is not understood.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Features {
    /// Of an agent: [`Ask::SetClock`].
    pub set_clock: bool,
    /// Of an agent: [`Ask::Credentials`]. The first half of `lair-guest` is of the release that starts the VM, and always takes them.
    pub credentials: bool,
    /// Of a host: [`Event::Journal`].
    pub journal: bool,
    /// Of a host: [`Event::Devices`].
    pub devices: bool,
}

impl Features {
    /// What this release understands.
    pub const OURS: Self = Self { set_clock: true, credentials: true, journal: true, devices: true };
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
        /// What it understands beyond the first release.
        #[serde(default)]
        features: Features,
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
    /// Set the clock to the host's, unless it is right already. Only where [`Features::set_clock`] is said.
    SetClock {
        /// The host's clock, milliseconds since 1970.
        unix_ms: u64,
    },
    /// Keep these secrets, and restart what uses those that are not as they were. Sent to the first half of `lair-guest` with all that there
    /// are, to the agent with those that have changed on the host.
    Credentials(Credentials),
}

/// Secrets for the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Those to keep, by name.
    pub keep: BTreeMap<String, Credential>,
    /// Names of those that the guest may not have any longer.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// One secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// It, in base64.
    pub value: Secret,
    /// What is restarted when it changes: units of a system with its own init, otherwise services of the agent.
    #[serde(default)]
    pub restart: Vec<String>,
}

/// Text that appears in no log: only its length is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// What the agent says on an open control channel.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// All services of the guest are up. Said once for each control channel, at once if it is so already.
    Ready {
        /// Milliseconds from the guest kernel's start to this state.
        uptime_ms: u64,
        /// What happened on the way, in the order of time. Empty from an agent that keeps no trace.
        #[serde(default)]
        trace: Vec<Moment>,
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
    /// What the guest's journal has got. Only where [`Features::journal`] is said.
    Journal {
        /// In its order.
        entries: Vec<JournalEntry>,
    },
    /// What the guest knows of the devices that were passed through to it, all of it each time: once on each channel where there are any, and
    /// when it has changed. Only where [`Features::devices`] is said.
    Devices {
        /// What it knows.
        report: DeviceReport,
    },
    /// What a later release has to say.
    #[serde(other)]
    Unknown,
}

/// An entry of the guest's journal: all that a guest can say in the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// The text.
    pub message: String,
    /// As syslog numbers them: 0 (emergency) to 7 (debug).
    pub priority: u8,
    /// Who says it, in its own words.
    #[serde(default)]
    pub identifier: String,
    /// The unit that it belongs to; empty if none.
    #[serde(default)]
    pub unit: String,
    /// When, by the guest's clock: microseconds since 1970.
    pub realtime_us: u64,
    /// How many entries before it were left out, because there were too many at once.
    #[serde(default)]
    pub dropped_before: u64,
}

/// What a guest knows of the devices that were passed through to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The devices, by address.
    pub devices: Vec<GuestDevice>,
    /// NVIDIA's driver.
    #[serde(default)]
    pub nvidia: NvidiaDriver,
    /// What the guest's kernel has said against them since it started, in the order in which it was said first.
    #[serde(default)]
    pub faults: Vec<DeviceFault>,
    /// How many more messages there were, of which there is nothing in `faults` because that is full.
    #[serde(default)]
    pub faults_left_out: u64,
    /// What NVIDIA's tool tells of GPUs, where the guest has it.
    #[serde(default)]
    pub gpus: Vec<GpuFigures>,
}

/// A device, or one function of it, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDevice {
    /// Where it is in the guest: `0000:01:00.0`.
    pub address: String,
    /// Who made it.
    pub vendor: u16,
    /// What it is, in the vendor's numbers.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// The driver that has it.
    #[serde(default)]
    pub driver: Option<String>,
    /// The port that it is in, by the port's address in the guest: `0000:00:1a.0`. None of one on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
}

/// NVIDIA's driver in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum NvidiaDriver {
    /// It is not loaded.
    #[default]
    Absent,
    /// It is loaded.
    Loaded {
        /// Its version, where it tells it.
        #[serde(default)]
        version: Option<String>,
    },
    /// What a later release has to say.
    #[serde(other)]
    Unknown,
}

/// Messages of one kind about one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFault {
    /// The device's address in the guest. What its driver leaves out, the function, is 0.
    pub address: String,
    /// What they say.
    pub fault: Fault,
    /// How many there were since the guest's kernel started, as far as its log goes back. 0: only the port above the device has told of it.
    pub count: u64,
    /// The first of them.
    pub text: String,
}

/// What is said against a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// A message of NVIDIA's driver.
    Xid {
        /// Its number in NVIDIA's catalogue.
        number: u32,
    },
    /// A message of the kernel about an error that PCI Express itself reports (Advanced Error Reporting).
    Aer {
        /// How bad it is.
        severity: AerSeverity,
    },
    /// What a later release has to say.
    #[serde(other)]
    Unknown,
}

/// How bad an error of PCI Express is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AerSeverity {
    /// The hardware has corrected it.
    Corrected,
    /// A transaction is lost, and the link works.
    Nonfatal,
    /// The link cannot be relied upon.
    Fatal,
}

/// What NVIDIA's tool tells of a GPU. What it does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuFigures {
    /// Its address in the guest.
    pub address: String,
    /// Its temperature, in degrees Celsius.
    pub temperature: Option<u32>,
    /// The power that it draws, in milliwatts.
    pub power: Option<u64>,
    /// The share of the last moments in which it worked, in percent.
    pub utilization: Option<u32>,
    /// Memory in use, in bytes.
    pub memory_used: Option<u64>,
    /// Memory, in bytes.
    pub memory_total: Option<u64>,
    /// Memory errors since its driver was loaded.
    pub ecc_volatile: EccCounts,
    /// Memory errors in its whole life.
    pub ecc_aggregate: EccCounts,
}

/// Memory errors that a GPU has counted (ECC).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EccCounts {
    /// Those that were corrected.
    pub corrected: Option<u64>,
    /// Those that could not be.
    pub uncorrected: Option<u64>,
}

/// When something happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// What it was.
    pub name: String,
    /// Milliseconds since the kernel's start, of the machine that saw it (CLOCK_BOOTTIME).
    pub at_ms: u64,
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

/// The guest's figures; sizes in bytes. Those that are new since the first release are zero or absent from an agent of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// All memory that the guest's kernel manages.
    pub memory_total: u64,
    /// Memory that new programs could have without swapping.
    pub memory_available: u64,
    /// Swap space.
    #[serde(default)]
    pub swap_total: u64,
    /// Swap space that is free.
    #[serde(default)]
    pub swap_free: u64,
    /// The root, what the overlay writes to, and the volumes.
    #[serde(default)]
    pub disks: Vec<DiskUse>,
    /// Load averages over 1, 5 and 15 minutes, in thousandths.
    pub load_thousandths: [u64; 3],
    /// Processes and threads.
    #[serde(default)]
    pub tasks: u64,
    /// Pressure, where the guest's kernel measures it.
    #[serde(default)]
    pub pressure: Option<Pressure>,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// The guest's clock, milliseconds since 1970.
    pub unix_ms: u64,
}

/// How full a file system of the guest is, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    /// Where it is mounted.
    pub mount: String,
    /// Its size.
    pub total: u64,
    /// What programs may still write.
    pub available: u64,
}

/// The share of the last ten seconds in which some task waited for a resource, in hundredths of a percent
/// (`avg10` of the kernel's pressure stall information).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// For a processor.
    pub cpu: u32,
    /// For memory.
    pub memory: u32,
    /// For disks.
    pub io: u32,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_in_no_debug_output() {
        let credential = Credential { value: Secret("c2VjcmV0".into()), restart: vec![] };
        let keep = BTreeMap::from([("key".to_string(), credential)]);
        let ask = Request { id: 1, ask: Ask::Credentials(Credentials { keep, remove: vec![] }) };
        let shown = format!("{ask:?}");
        assert!(shown.contains("Secret(8 bytes)") && !shown.contains("c2Vj"), "{shown}");
    }

    /// [`Hello`] as the first release had it.
    #[derive(Serialize, Deserialize)]
    struct FirstHello {
        version: u32,
        ticket: String,
        links_out: Vec<OutgoingLink>,
        links_in: Vec<IncomingLink>,
        credentials: BTreeMap<String, String>,
        unix_ms: u64,
    }

    #[test]
    fn vs7_the_greeting_is_understood_by_the_first_release_and_its_own_here() {
        let ours = Hello {
            version: 1,
            ticket: "t".into(),
            links_out: vec![],
            links_in: vec![],
            credentials: BTreeMap::new(),
            unix_ms: 7,
            features: Features::OURS,
        };
        let first: FirstHello = serde_json::from_value(serde_json::to_value(ours).unwrap()).unwrap();
        assert_eq!((first.ticket.as_str(), first.unix_ms, first.credentials.len()), ("t", 7, 0));
        let first = serde_json::to_value(first).unwrap();
        let ours: Hello = serde_json::from_value(first.clone()).unwrap();
        assert_eq!((ours.unix_ms, ours.features), (7, Features::default()));
        // Nor is it missed, so that a later release may leave it out.
        let mut later = first;
        later.as_object_mut().unwrap().remove("credentials");
        assert!(serde_json::from_value::<Hello>(later).is_ok());
    }

    #[test]
    fn vs7_messages_of_the_first_release_and_of_a_later_one_are_understood() {
        let welcome = r#"{"hello":"welcome","version":1,"boot_id":"b","phase":"agent"}"#;
        let HelloReply::Welcome { features, .. } = serde_json::from_str(welcome).unwrap() else {
            panic!("no welcome")
        };
        assert_eq!(features, Features::default());
        let later = r#"{"set_clock":true,"telepathy":true}"#;
        assert!(serde_json::from_str::<Features>(later).unwrap().set_clock);
        let ready: Event = serde_json::from_str(r#"{"event":"ready","uptime_ms":7}"#).unwrap();
        assert!(matches!(ready, Event::Ready { uptime_ms: 7, trace } if trace.is_empty()));
        let later = r#"{"event":"ready","uptime_ms":7,"trace":[{"name":"x","at_ms":1,"by":"me"}],"mood":1}"#;
        assert!(matches!(serde_json::from_str(later), Ok(Event::Ready { trace, .. }) if trace.len() == 1));
        assert!(matches!(serde_json::from_str(r#"{"event":"weather","sun":true}"#), Ok(Event::Unknown)));
        assert!(serde_json::from_str::<Ask>(r#"{"dance":{}}"#).is_err(), "A request needs its feature");
        let later = r#"{"event":"devices","report":{"devices":[],"nvidia":{"state":"asleep","since":1},"mood":1,
            "faults":[{"address":"a","fault":{"kind":"smell","of":"smoke"},"count":1,"text":"t"}]}}"#;
        let Event::Devices { report } = serde_json::from_str(later).unwrap() else { panic!("no devices") };
        assert_eq!((report.nvidia, report.faults[0].fault), (NvidiaDriver::Unknown, Fault::Unknown));
    }
}
