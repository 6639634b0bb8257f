//! A host with shims and the guests behind them. A guest is a listener that speaks the hybrid vsock handshake; the
//! test itself is what listens in it.

use lair_guest::wire::{
    AGENT_PORT, VERSION, frame,
    message::{
        Answer, Ask, Event, Features, Hello, HelloReply, HostOpen, LinkOpen, LinkReply, OutgoingLink, Phase,
        Request, Statistics, Terminal, TerminalSize,
    },
};
use lair_vmm::shim::{
    client,
    config::{Incoming, Outgoing, OutgoingTarget, ShimConfig, ShimSockets},
    protocol::{AgentState, Grant, LinkCounters, Session, ShimStatus},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    process::{Child, Command},
    sync::mpsc,
    time::{sleep, timeout},
};

/// No wait of these tests is longer: far above what anything takes, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The result of `future`, which must come.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    timeout(LIMIT, future).await.expect("It took too long")
}

/// Waits until `condition` gives something.
pub(crate) async fn until<T>(mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    within(async {
        loop {
            if let Some(found) = condition().await {
                return found;
            }
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

/// A directory for everything of one test.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A configuration without links.
    pub(crate) fn config(&self, vm: &str) -> ShimConfig {
        let file = |name: &str| self.path(&format!("{vm}-{name}"));
        ShimConfig {
            vm: vm.into(),
            vsock: file("vsock"),
            console: file("console"),
            console_log: file("console.log"),
            console_limit: 1 << 20,
            journal: None,
            audit_log: file("audit"),
            recordings: Some(file("sessions")),
            sockets: ShimSockets { control: file("control"), session: file("session"), dial: file("dial") },
            outgoing: vec![],
            incoming: vec![],
            credentials: BTreeMap::new(),
        }
    }

    /// Writes a configuration; returns its path.
    pub(crate) fn write(&self, config: &ShimConfig) -> PathBuf {
        let path = self.path(&format!("{}.json", config.vm));
        std::fs::write(&path, serde_json::to_vec(config).unwrap()).unwrap();
        path
    }

    /// A shim that runs, without a guest.
    pub(crate) async fn start(&self, config: ShimConfig) -> Shim {
        let path = self.write(&config);
        let stderr_path = self.path(&format!("{}.stderr", config.vm));
        let stderr = std::fs::File::create(&stderr_path).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_lair-shim"))
            .arg("--config")
            .arg(path)
            .stdin(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let control = config.sockets.control.clone();
        let shim = Shim { child, config, stderr_path };
        until(async || client::status(&control).await.ok()).await;
        shim
    }

    /// A shim that runs, and a guest whose agent is ready.
    pub(crate) async fn start_ready(&self, config: ShimConfig) -> (Shim, Guest) {
        let mut guest = Guest::new(&config);
        let shim = self.start(config).await;
        guest.boot("boot-1").await;
        shim.until_agent(|agent| matches!(agent, AgentState::Ready { .. })).await;
        (shim, guest)
    }
}

pub(crate) fn to_vm(name: &str, target: &ShimConfig) -> Outgoing {
    Outgoing {
        link: OutgoingLink { name: name.into(), listen: None },
        to: OutgoingTarget::Vm { vm: target.vm.clone(), dial: target.sockets.dial.clone() },
    }
}

pub(crate) fn to_host(name: &str, socket: PathBuf) -> Outgoing {
    Outgoing { link: OutgoingLink { name: name.into(), listen: None }, to: OutgoingTarget::Host { socket } }
}

/// A link into a guest with the agent behind its port.
pub(crate) fn framed(name: &str, port: u32, from: &[&str]) -> Incoming {
    Incoming { connect: Some("/run/service.sock".into()), ..raw(name, port, from) }
}

/// A link into a guest where a program listens by itself.
pub(crate) fn raw(name: &str, port: u32, from: &[&str]) -> Incoming {
    let from = from.iter().map(|&from| from.into()).collect();
    Incoming { name: name.into(), port, connect: None, from, host_listen: None }
}

/// A running `lair-shim`.
pub(crate) struct Shim {
    pub(crate) child: Child,
    pub(crate) config: ShimConfig,
    stderr_path: PathBuf,
}

impl Shim {
    pub(crate) fn control(&self) -> &Path {
        &self.config.sockets.control
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr_path).unwrap()
    }

    pub(crate) async fn status(&self) -> ShimStatus {
        within(client::status(self.control())).await.unwrap()
    }

    pub(crate) async fn link(&self, name: &str) -> LinkCounters {
        self.status().await.links.into_iter().find(|link| link.link == name).unwrap()
    }

    pub(crate) async fn until_agent(&self, wanted: impl Fn(&AgentState) -> bool) -> AgentState {
        until(async || Some(self.status().await.agent).filter(&wanted)).await
    }

    /// Takes a changed configuration into use.
    pub(crate) async fn reload(&self, host: &Host, config: &ShimConfig) -> Result<(), client::ClientError> {
        host.write(config);
        within(client::reload(self.control())).await
    }

    /// The audit log, once it has `count` lines.
    pub(crate) async fn audit(&self, count: usize) -> Vec<Value> {
        until(async || Some(self.audit_now()).filter(|lines| lines.len() >= count)).await
    }

    pub(crate) fn audit_now(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.config.audit_log).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id().unwrap())).unwrap().count()
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id().unwrap());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

pub(crate) fn in_ms(milliseconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap() + milliseconds
}

/// Allows a session; returns its ticket.
pub(crate) async fn grant(shim: &Shim, digit: char, session: Session) -> String {
    let ticket = digit.to_string().repeat(64);
    let grant = Grant { ticket: ticket.clone(), expires_unix_ms: in_ms(60_000), uid: 1000, session };
    within(client::grant(shim.control(), grant)).await.unwrap();
    ticket
}

pub(crate) fn terminal(rows: u16, columns: u16) -> Terminal {
    Terminal { term: "xterm".into(), size: TerminalSize { rows, columns } }
}

/// The lines of a recording, once it has ended with a word about the end.
pub(crate) async fn recording(shim: &Shim, name: &str) -> Vec<Value> {
    let path = shim.config.recordings.as_ref().unwrap().join(name);
    until(async || {
        let text = std::fs::read_to_string(&path).ok()?;
        let lines: Vec<Value> = text.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
        (lines.last()?[1] == "m").then_some(lines)
    })
    .await
}

type Ports = Arc<Mutex<HashMap<u32, mpsc::UnboundedSender<UnixStream>>>>;

/// What is behind a shim's vsock socket.
pub(crate) struct Guest {
    ports: Ports,
    link_socket: PathBuf,
    agent: mpsc::UnboundedReceiver<UnixStream>,
    /// The control channel of the present boot, and the greeting on it.
    pub(crate) control: Option<UnixStream>,
    pub(crate) hello: Option<Hello>,
}

impl Guest {
    /// A guest without an agent: its kernel answers, nothing listens.
    pub(crate) fn new(config: &ShimConfig) -> Self {
        let ports = Ports::default();
        // As a hypervisor does: what an earlier one left goes away.
        let _ = std::fs::remove_file(&config.vsock);
        let listener = UnixListener::bind(&config.vsock).unwrap();
        tokio::spawn(serve_vsock(listener, ports.clone()));
        let link_socket = config.link_socket();
        let agent = mpsc::unbounded_channel().1;
        Self { ports, link_socket, agent, control: None, hello: None }
    }

    /// Listens on a port of the guest.
    pub(crate) fn listen(&self, port: u32) -> mpsc::UnboundedReceiver<UnixStream> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.ports.lock().unwrap().insert(port, sender);
        receiver
    }

    /// The next connection to the agent's port, with what it begins with.
    pub(crate) async fn agent_connection(&mut self) -> (HostOpen, UnixStream) {
        within(async {
            let mut stream = self.agent.recv().await.unwrap();
            (frame::read_message(&mut stream).await.unwrap(), stream)
        })
        .await
    }

    pub(crate) fn start_agent(&mut self) {
        self.agent = self.listen(AGENT_PORT);
    }

    /// Answers the next control channel.
    pub(crate) async fn welcome(&mut self, boot_id: &str, phase: Phase) {
        let (open, mut stream) = self.agent_connection().await;
        let HostOpen::Control(hello) = open else { panic!("Not a control channel") };
        let welcome = HelloReply::Welcome {
            version: VERSION,
            boot_id: boot_id.into(),
            phase,
            features: Features::OURS,
        };
        within(frame::write_message(&mut stream, &welcome)).await.unwrap();
        self.control = Some(stream);
        self.hello = Some(hello);
    }

    pub(crate) async fn say(&mut self, event: &Event) {
        within(frame::write_message(self.control.as_mut().unwrap(), event)).await.unwrap();
    }

    /// The next request on the control channel.
    pub(crate) async fn asked(&mut self) -> Request {
        within(frame::read_message(self.control.as_mut().unwrap())).await.unwrap()
    }

    /// The next request that is no sign of life; those are answered, with a clock that is right.
    pub(crate) async fn asked_more(&mut self) -> Request {
        loop {
            let request = self.asked().await;
            if request.ask != Ask::Statistics {
                return request;
            }
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            let figures =
                Statistics { unix_ms: u64::try_from(now.as_millis()).unwrap(), ..Statistics::default() };
            self.answer(request.id, Answer::Statistics(figures)).await;
        }
    }

    pub(crate) async fn answer(&mut self, id: u64, answer: Answer) {
        self.say(&Event::Reply { id, answer }).await;
    }

    /// An agent that is up and ready.
    pub(crate) async fn boot(&mut self, boot_id: &str) {
        self.start_agent();
        self.welcome(boot_id, Phase::Agent).await;
        self.say(&Event::Ready { uptime_ms: 1234, trace: vec![] }).await;
    }

    pub(crate) fn ticket(&self) -> String {
        self.hello.as_ref().unwrap().ticket.clone()
    }

    /// A connection to the host's link port, with nothing said.
    pub(crate) async fn connect(&self) -> UnixStream {
        within(UnixStream::connect(&self.link_socket)).await.unwrap()
    }

    /// Asks for a link as a program in the guest does, with any ticket.
    pub(crate) async fn ask_link(&self, link: &str, ticket: &str) -> (UnixStream, LinkReply) {
        let mut stream = self.connect().await;
        let open = LinkOpen { version: VERSION, ticket: ticket.into(), link: link.into() };
        let reply = within(async {
            frame::write_message(&mut stream, &open).await.unwrap();
            frame::read_message(&mut stream).await.unwrap()
        })
        .await;
        (stream, reply)
    }

    /// Opens a link that must open.
    pub(crate) async fn open_link(&self, link: &str) -> UnixStream {
        let (stream, reply) = self.ask_link(link, &self.ticket()).await;
        assert_eq!(reply, LinkReply::Opened);
        stream
    }

    /// Asks for a link that must be refused; returns the reason.
    pub(crate) async fn refused_link(&self, link: &str, ticket: &str) -> String {
        let (mut stream, reply) = self.ask_link(link, ticket).await;
        let LinkReply::Refused { reason } = reply else { panic!("It was opened") };
        assert_closed(&mut stream).await;
        reason
    }
}

async fn serve_vsock(listener: UnixListener, ports: Ports) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let ports = ports.clone();
        tokio::spawn(async move {
            let mut line = String::new();
            while !line.ends_with('\n') {
                let Ok(byte) = stream.read_u8().await else { return };
                line.push(byte.into());
            }
            let port = line.strip_prefix("CONNECT ").unwrap().trim_end().parse().unwrap();
            let listener = ports.lock().unwrap().get(&port).cloned();
            // Without a listener, or with one that has left, the guest's kernel resets the connection.
            if let Some(listener) = listener.filter(|listener| !listener.is_closed()) {
                stream.write_all(b"OK 1073741824\n").await.unwrap();
                let _ = listener.send(stream);
            }
        });
    }
}

/// The agent's end of a link into the guest: the next connection, opened.
pub(crate) async fn accept_framed(port: &mut mpsc::UnboundedReceiver<UnixStream>) -> UnixStream {
    let mut stream = within(port.recv()).await.unwrap();
    within(frame::write_message(&mut stream, &LinkReply::Opened)).await.unwrap();
    stream
}

pub(crate) async fn send(to: &mut UnixStream, bytes: &[u8]) {
    within(frame::write(to, frame::Kind::Data, bytes)).await.unwrap();
}

pub(crate) async fn send_eof(to: &mut UnixStream) {
    within(frame::write(to, frame::Kind::Eof, &[])).await.unwrap();
}

/// What comes in frames until the Eof frame.
pub(crate) async fn receive_to_eof(from: &mut UnixStream) -> Vec<u8> {
    within(async {
        let (mut all, mut payload) = (Vec::new(), Vec::new());
        loop {
            match frame::read(from, &mut payload).await.unwrap() {
                Some(frame::Kind::Data) => all.extend_from_slice(&payload),
                Some(frame::Kind::Eof) => return all,
                other => panic!("Got {other:?} after {} bytes", all.len()),
            }
        }
    })
    .await
}

/// Receives exactly `bytes` in frames, however they are cut.
pub(crate) async fn expect(from: &mut UnixStream, bytes: &[u8]) {
    within(async {
        let (mut all, mut payload) = (Vec::new(), Vec::new());
        while all.len() < bytes.len() {
            assert_eq!(frame::read(from, &mut payload).await.unwrap(), Some(frame::Kind::Data));
            all.extend_from_slice(&payload);
        }
        assert_eq!(all, bytes);
    })
    .await;
}

/// The other side closes, with nothing more to say. A reset is no close: vhost-device-vsock does not tell it to the guest.
pub(crate) async fn assert_closed(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    within(stream.read_to_end(&mut rest)).await.expect("It was reset");
    assert_eq!(rest, b"");
}

/// The other side ends, with nothing more to say. For clients on the host, who learn of a reset as well.
pub(crate) async fn assert_ended(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
}

/// Writes frames of data until the other side takes no more, which leaves some of them unread.
pub(crate) async fn fill(to: &mut UnixStream, kind: frame::Kind) {
    let flood = async {
        loop {
            frame::write(to, kind, &[b'x'; 65536]).await.unwrap();
        }
    };
    assert!(timeout(Duration::from_millis(500), flood).await.is_err());
}

/// Nothing has connected there.
pub(crate) fn assert_untouched(port: &mut mpsc::UnboundedReceiver<UnixStream>) {
    assert!(port.try_recv().is_err(), "Something connected");
}
