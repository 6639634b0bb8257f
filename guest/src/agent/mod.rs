//! The agent: answers the host on one vsock port, carries the links, and runs the services of a guest without an
//! init of its own.
//!
//! One thread runs it all, so that an idle guest costs nothing; a second one only writes the log, because a console
//! that nobody reads would stop the first. What one connection does wrong ends that connection.
//!
//! | task | ends when |
//! |---|---|
//! | a session ([`control`] or [`exec`]) for each connection of the host | the connection ends; a control session also when a newer one comes |
//! | a listener for each link ([`links`]) | a new greeting does not name the link |
//! | a relay for each connection of a link | either side ends it |
//! | the reader of the journal ([`journal`]), where there is one | never |
//! | the reader of the kernel's log ([`devices`]), where devices were passed through | never |
//! | a keeper for each service ([`services`]) | never |

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod bucket;
mod control;
mod credentials;
mod devices;
mod environment;
mod exec;
mod journal;
mod links;
mod log;
mod power;
mod pty;
mod ready;
mod services;
mod session_end;
mod shell;
mod statistics;
mod target;
mod vsock_filter;

use crate::{
    clock,
    credentials::Store,
    handshake::{self, PATIENCE},
    paths, report,
    trace::Trace,
};
use devices::Devices;
use environment::Environment;
use lair_guest::{
    boot::BootConfig,
    wire::{
        AGENT_PORT,
        frame::{self, FrameError},
        message::{ExecEvent, HostOpen, JournalEntry},
    },
};
use log::Log;
use nix::sys::signal::SigSet;
pub(crate) use ready::tell as tell_ready;
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, Semaphore, broadcast, mpsc, watch},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The configuration that init wrote is not there.
    #[error("Could not read `{}`", paths::CONFIG)]
    Read(#[source] io::Error),
    /// The configuration is not one.
    #[error("`{}` is not a boot configuration", paths::CONFIG)]
    Config(#[source] serde_json::Error),
    /// There is no vsock, or another agent.
    #[error("Could not listen on vsock port {AGENT_PORT}")]
    Listen(#[source] io::Error),
    /// The kernel refused something that every kernel grants.
    #[error("Could not {what}")]
    Start {
        /// What the agent was about to do.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The most commands that may run for the host at a time.
const MAX_COMMANDS: usize = 256;

/// What the tasks share.
struct Agent {
    boot_id: String,
    environment: Environment,
    /// Whether PID 1 is the system's own init.
    own_init: bool,
    log: Log,
    /// Milliseconds from the kernel's start to readiness, once it is reached.
    ready: watch::Sender<Option<u64>>,
    /// Services that ended: name and how.
    ended: broadcast::Sender<(String, String)>,
    links: Mutex<links::Links>,
    /// The number of the newest control session.
    newest: watch::Sender<u64>,
    /// Whether there has been a control channel.
    greeted: AtomicBool,
    trace: Trace,
    disks: Vec<statistics::Disk>,
    devices: Arc<Devices>,
    credentials: Store,
    /// Entries of the journal on their way to the host, and where they come from.
    journal: Mutex<mpsc::Receiver<JournalEntry>>,
    journal_source: mpsc::Sender<JournalEntry>,
    /// How many of them were lost with a channel, and are still to be told.
    journal_lost: AtomicU64,
    /// One for each service, counted up for each restart of it that is asked for.
    restarts: BTreeMap<String, watch::Sender<u64>>,
    /// What could not be restarted because of a credential.
    undone_restarts: Mutex<credentials::Restarts>,
    commands: Semaphore,
}

impl Agent {
    /// Of the guest whose kernel's files are below `root`.
    fn new(config: &BootConfig, boot_id: String, log: Log, trace: Trace, root: &str) -> Self {
        let (journal_source, journal) = mpsc::channel(journal::QUEUE);
        let environment = environment::of(config.profile.as_deref());
        Self {
            journal: Mutex::new(journal),
            journal_source,
            journal_lost: AtomicU64::new(0),
            boot_id,
            devices: Devices::new(root, environment.clone(), log.clone()),
            environment,
            own_init: config.init.is_some(),
            links: Mutex::new(links::Links::new(log.clone())),
            log,
            ready: watch::Sender::new(None),
            // More than a host that reads at all lets pile up; one that does not misses the oldest.
            ended: broadcast::Sender::new(64),
            newest: watch::Sender::new(0),
            greeted: AtomicBool::new(false),
            trace,
            disks: statistics::disks(config),
            credentials: Store::of_guest(config.init.is_some()),
            restarts: config.services.iter().map(|s| (s.name.clone(), watch::Sender::new(0))).collect(),
            undone_restarts: Mutex::default(),
            commands: Semaphore::new(MAX_COMMANDS),
        }
    }

    /// The next entries of the journal, a few at a time. Those that are not taken stay.
    async fn journal(&self) -> Vec<JournalEntry> {
        let mut entries = Vec::new();
        self.journal.lock().await.recv_many(&mut entries, journal::BATCH).await;
        if let Some(first) = entries.first_mut() {
            let lost = self.journal_lost.swap(0, Ordering::Relaxed);
            first.dropped_before = first.dropped_before.saturating_add(lost);
        }
        entries
    }

    /// Has a service restarted; whether there is one of this name.
    fn restart(&self, service: &str) -> bool {
        let restarts = self.restarts.get(service);
        restarts.inspect(|asked| asked.send_modify(|count| *count = count.wrapping_add(1))).is_some()
    }

    /// Notes that the guest is up, once; the time of it.
    fn set_ready(&self) -> u64 {
        let known = *self.ready.borrow();
        known.unwrap_or_else(|| {
            let uptime_ms = clock::uptime_ms();
            self.ready.send_replace(Some(uptime_ms));
            uptime_ms
        })
    }
}

/// Runs the agent; returns only if it can not.
pub(crate) fn run() -> Result<(), AgentError> {
    let start = |what| move |source| AgentError::Start { what, source };
    // PID 1 blocks signals for itself, and a service that inherited that would not hear SIGTERM.
    let _ = SigSet::all().thread_unblock();
    let trace = Trace::new(paths::TRACE);
    trace.mark("agent");
    let json = std::fs::read(paths::CONFIG).map_err(AgentError::Read)?;
    let config: BootConfig = serde_json::from_slice(&json).map_err(AgentError::Config)?;
    let boot_id = handshake::boot_id().map_err(start("read the boot id"))?;
    let log = Log::start().map_err(start("start the log"))?;
    crate::sys::raise_descriptor_limit()
        .map_err(|errno| AgentError::Start { what: "raise the limit of open files", source: errno.into() })?;
    // The guest is of no use without its agent. Needs root, as everything here.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(start("start the runtime"))?.block_on(async {
        let agent = Arc::new(Agent::new(&config, boot_id, log, trace, "/"));
        agent.devices.look();
        if config.init.is_some() {
            ready::listen(&agent).map_err(start("make the agent's socket"))?;
            tokio::spawn(journal::follow(agent.clone(), agent.journal_source.clone()));
        } else {
            services::start(&agent, config.services, config.deny_vsock);
        }
        serve(agent).await
    })
}

/// Accepts the host's connections.
async fn serve(agent: Arc<Agent>) -> Result<(), AgentError> {
    let listener =
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT)).map_err(AgentError::Listen)?;
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of descriptors, for instance.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // A process of the guest could connect here as well (vsock's loopback transport), and is not heard.
        if peer.cid() != VMADDR_CID_HOST {
            continue;
        }
        let agent = agent.clone();
        // An error in a session is the host's to see: its connection ends.
        tokio::spawn(async move { session(&agent, stream).await });
    }
}

/// One connection of the host.
async fn session<S: AsyncRead + AsyncWrite + Unpin>(agent: &Agent, mut stream: S) -> Result<(), FrameError> {
    let open = tokio::time::timeout(PATIENCE, frame::read_message(&mut stream)).await;
    match open.map_err(|_| FrameError::Io(io::ErrorKind::TimedOut.into()))?? {
        HostOpen::Control(hello) => control::serve(agent, hello, stream).await,
        HostOpen::Exec(exec) => match agent.commands.try_acquire() {
            Ok(_permit) => exec::serve(stream, &exec, &agent.environment).await,
            Err(_) => {
                let reason = format!("{MAX_COMMANDS} commands run in this guest already, the limit");
                frame::write_message(&mut stream, &ExecEvent::Failed { reason }).await
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    pub(super) fn agent(own_init: bool) -> Agent {
        let json = if own_init { r#"{"hostname":"vm","init":"/init"}"# } else { r#"{"hostname":"vm"}"# };
        let config = serde_json::from_str(json).unwrap();
        Agent::new(&config, "boot".into(), Log::start().unwrap(), Trace::new("/dev/null"), "/nonexistent")
    }

    /// Everything that the agent answers to these bytes, until it ends the connection.
    async fn answers(bytes: &[u8]) -> Vec<u8> {
        let (mut host, guest) = tokio::io::duplex(1 << 16);
        host.write_all(bytes).await.unwrap();
        let agent = agent(false);
        let session = tokio::time::timeout(Duration::from_secs(20), session(&agent, guest));
        let (result, got) = tokio::join!(session, async {
            let mut got = Vec::new();
            host.read_to_end(&mut got).await.unwrap();
            got
        });
        assert!(result.expect("the session did not end").is_err());
        got
    }

    #[tokio::test]
    async fn vs8_commands_have_a_cap() {
        let agent = agent(false);
        let running = agent.commands.acquire_many(u32::try_from(MAX_COMMANDS).unwrap()).await.unwrap();
        let run = async || {
            let (mut host, guest) = tokio::io::duplex(1 << 12);
            let exec = serde_json::from_str(r#"{"open":"exec","command":["true"]}"#).unwrap();
            frame::write_message::<HostOpen, _>(&mut host, &exec).await.unwrap();
            session(&agent, guest).await.unwrap();
            frame::read_message::<ExecEvent, _>(&mut host).await.unwrap()
        };
        assert!(matches!(run().await, ExecEvent::Failed { reason } if reason.contains("256 commands")));
        drop(running);
        assert!(matches!(run().await, ExecEvent::Started { .. }));
    }

    #[tokio::test]
    async fn vs4_malformed_openings_end_the_connection_without_an_answer() {
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        let mut nested = vec![0];
        nested.extend(u32::try_from(deep.len()).unwrap().to_le_bytes());
        nested.extend(deep.as_bytes());
        for bytes in [
            &b"\0\0\0\0\0"[..],                  // no JSON
            b"\0\xff\xff\xff\xff",               // 4 GiB
            b"\x01\x01\0\0\0x",                  // data before any message
            b"\0\x04\0\0\0\xff\xfe\xfd\xfc",     // not UTF-8
            b"\0\x10\0\0\0{\"open\":\"shell\"}", // no such opening
            b"\x07",                             // unknown kind, cut: needs the whole header, so it times out
            &nested,
        ] {
            if bytes == b"\x07" {
                tokio::time::pause();
            }
            assert!(answers(bytes).await.is_empty(), "{bytes:?}");
        }
    }
}
