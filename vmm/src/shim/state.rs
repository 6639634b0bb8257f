//! What all connections of one shim share.

use super::{
    audit::Audit,
    config::{ConfigError, ShimConfig},
    console::Console,
    credentials::Given,
    guest::Known,
    incoming::HostListeners,
    journal::Journal,
    limits,
    links::Links,
    note::Notes,
    protocol::{AgentState, ShimStatus},
    recorder::{Recorder, Recording},
    ticket::{BootTickets, Grants},
    vsock::Dialer,
};
use crate::fleet::schema::Credential;
use lair_guest::wire::message::{Answer, Ask, Terminal};
use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// What watchers are told about.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Observed {
    pub(super) agent: AgentState,
    /// [`ShimStatus::silent_since_unix_ms`].
    pub(super) silent_since: Option<u64>,
    pub(super) console: bool,
    /// Counts what the guest said of its devices.
    pub(super) devices: u64,
    /// Raised with each configuration.
    pub(super) generation: u64,
}

/// A request for the agent, and where its answer goes.
pub(super) struct Asked {
    pub(super) ask: Ask,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// One shim.
pub(super) struct Shim {
    pub(super) vm: String,
    config_path: PathBuf,
    pub(super) dialer: Dialer,
    pub(super) audit: Audit,
    pub(super) notes: Notes,
    /// Where the guest's journal goes, if it goes anywhere.
    pub(super) journal: Option<Journal>,
    pub(super) links: Links,
    pub(super) host_listeners: HostListeners,
    credentials: Mutex<BTreeMap<String, Credential>>,
    given: Mutex<Given>,
    tickets: Mutex<BootTickets>,
    grants: Mutex<Grants>,
    guest: Mutex<Known>,
    pub(super) observed: watch::Sender<Observed>,
    pub(super) console: Console,
    pub(super) console_bytes: AtomicU64,
    /// `None` if nothing is to be recorded.
    recorder: Option<Recorder>,
    /// The way to the agent, while there is a control channel.
    agent: Mutex<Option<mpsc::Sender<Asked>>>,
    /// The agent is to be told of a new configuration.
    pub(super) renewed: Notify,
    /// The configuration that was read last.
    config: Mutex<ShimConfig>,
    stop: watch::Sender<bool>,
    /// Counts the guest's reboots.
    reboots: watch::Sender<u64>,
    connections: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shim {
    pub(super) fn new(config_path: PathBuf, config: &ShimConfig) -> io::Result<Self> {
        let shim = Self {
            vm: config.vm.clone(),
            config_path,
            dialer: Dialer::new(config.vsock.clone()),
            audit: Audit::start(config.audit_log.clone(), config.vm.clone())?,
            notes: Notes::start()?,
            journal: config.journal.as_ref().map(|to| Journal::start(&config.vm, to)).transpose()?,
            links: Links::default(),
            host_listeners: HostListeners::default(),
            credentials: Mutex::default(),
            given: Mutex::default(),
            tickets: Mutex::default(),
            grants: Mutex::default(),
            guest: Mutex::new(Known::new()),
            observed: watch::Sender::new(Observed {
                agent: AgentState::Absent,
                silent_since: None,
                console: false,
                devices: 0,
                generation: 0,
            }),
            console: Console::new(&config.console_log),
            console_bytes: AtomicU64::new(0),
            recorder: config.recordings.clone().map(Recorder::new),
            agent: Mutex::default(),
            renewed: Notify::new(),
            config: Mutex::new(config.clone()),
            stop: watch::Sender::new(false),
            reboots: watch::Sender::new(0),
            connections: Arc::new(Semaphore::new(limits::CONNECTIONS)),
            sessions: Arc::new(Semaphore::new(limits::SESSIONS)),
        };
        shim.apply(config);
        Ok(shim)
    }

    /// Reads the configuration file again. Nothing changes if that fails.
    pub(super) async fn reload(&self) -> Result<(), ConfigError> {
        let path = self.config_path.clone();
        let read = tokio::task::spawn_blocking(move || ShimConfig::load(&path)).await;
        let config = match read {
            Ok(config) => config?,
            Err(join) => return Err(ConfigError::Interrupted(join)),
        };
        if config.vm != self.vm {
            return Err(ConfigError::OtherVm { mine: self.vm.clone(), other: config.vm });
        }
        self.apply(&config);
        // A laird that starts has each shim read its configuration, which mostly is the same: then the guest has all that it needs.
        if std::mem::replace(&mut *locked(&self.config), config.clone()) != config {
            self.renewed.notify_one();
        }
        Ok(())
    }

    fn apply(&self, config: &ShimConfig) {
        self.links.apply(config);
        *locked(&self.credentials) = config.credentials.clone();
        self.observed.send_modify(|seen| seen.generation = seen.generation.wrapping_add(1));
    }

    /// Ends all connections to the guest that was: the vsock device does not, and their other ends would wait for ever.
    pub(super) fn guest_rebooted(&self) {
        self.reboots.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Waits until the guest has been started anew.
    pub(super) async fn rebooted(&self) {
        // The sender lives as long as the shim, so this ends only with a reboot.
        let _ = self.reboots.subscribe().changed().await;
    }

    pub(super) fn credentials(&self) -> BTreeMap<String, Credential> {
        locked(&self.credentials).clone()
    }

    /// Which of them the guest has.
    pub(super) fn given(&self) -> MutexGuard<'_, Given> {
        locked(&self.given)
    }

    pub(super) fn tickets(&self) -> MutexGuard<'_, BootTickets> {
        locked(&self.tickets)
    }

    pub(super) fn grants(&self) -> MutexGuard<'_, Grants> {
        locked(&self.grants)
    }

    /// What is known of the guest.
    pub(super) fn guest(&self) -> MutexGuard<'_, Known> {
        locked(&self.guest)
    }

    pub(super) fn status(&self) -> ShimStatus {
        let seen = self.observed.borrow().clone();
        let (figures, times, devices) = {
            let guest = self.guest();
            (guest.figures.clone(), guest.times.clone(), guest.devices.newest.clone())
        };
        ShimStatus {
            vm: self.vm.clone(),
            agent: seen.agent,
            console: seen.console,
            console_bytes: self.console_bytes.load(Relaxed),
            links: self.links.counters(&self.vm),
            silent_since_unix_ms: seen.silent_since,
            figures,
            times,
            devices,
        }
    }

    /// Tells watchers, if anything is new.
    pub(super) fn observe(&self, change: impl FnOnce(&mut Observed)) {
        self.observed.send_if_modified(|seen| {
            let before = seen.clone();
            change(seen);
            *seen != before
        });
    }

    /// Opens the way to the agent, or closes it.
    pub(super) fn set_agent(&self, way: Option<mpsc::Sender<Asked>>) {
        *locked(&self.agent) = way;
    }

    /// The way to the agent.
    pub(super) fn agent(&self) -> Option<mpsc::Sender<Asked>> {
        locked(&self.agent).clone()
    }

    /// Room for one more link connection.
    pub(super) fn connection(&self) -> Option<OwnedSemaphorePermit> {
        self.connections.clone().try_acquire_owned().ok()
    }

    /// Room for one more session.
    pub(super) fn session(&self) -> Option<OwnedSemaphorePermit> {
        self.sessions.clone().try_acquire_owned().ok()
    }

    /// Begins to record the terminal of a session of `kind`.
    pub(super) fn record(
        &self,
        kind: &str,
        uid: Option<u32>,
        terminal: Option<&Terminal>,
    ) -> Option<Recording> {
        Some(self.recorder.as_ref()?.begin(&self.vm, kind, uid.unwrap_or_default(), terminal))
    }

    /// Writes what is left to the recordings.
    pub(super) fn finish_recordings(&self) {
        if let Some(recorder) = &self.recorder {
            recorder.finish();
        }
    }

    /// Ends the shim.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until the shim is to end.
    pub(super) async fn stopped(&self) {
        // The sender lives as long as this shim: there is no other way out than the word.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Waits until no connection and no session is left.
    pub(super) async fn quiet(&self) {
        let all = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let _ = self.connections.acquire_many(all(limits::CONNECTIONS)).await;
        let _ = self.sessions.acquire_many(all(limits::SESSIONS)).await;
    }
}

/// The host's clock, milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
