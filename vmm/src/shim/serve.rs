//! The shim from its start to its end.

use super::{
    agent,
    config::{ConfigError, ShimConfig},
    console::{self, ConsoleLog},
    control,
    incoming::{self, ListenError},
    limits, outgoing,
    output::{Log, LogError, Logs},
    session, socket,
    state::Shim,
};
use crate::shim::SocketError;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};

/// Why a shim did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its configuration cannot be used.
    #[error("The shim has no usable configuration")]
    Config(#[from] ConfigError),
    /// It cannot keep the logs of others.
    #[error("The shim cannot keep the logs of others")]
    Logs(#[from] LogError),
    /// It cannot listen.
    #[error("The shim cannot listen")]
    Socket(#[from] SocketError),
    /// It cannot listen for a link from the host.
    #[error("The shim cannot listen for the host")]
    Host(#[from] ListenError),
    /// The system refused threads or signals.
    #[error("The shim cannot start")]
    System(#[from] io::Error),
}

/// The rights of sockets for the user of the shim.
const OWNER: u32 = 0o600;

/// The rights of sockets for the group, too: operators at the session socket, the hypervisor at the link socket.
const GROUP: u32 = 0o660;

/// Serves one VM until it is told to stop, by [`super::protocol::Control::Stop`], SIGTERM or SIGINT.
///
/// The control socket appears last: once it is there, all of the shim is.
///
/// `logs` are pipes that were handed over. They are read from the beginning.
pub async fn serve(config_path: &Path, logs: &[Log]) -> Result<(), ServeError> {
    let mut logs = Logs::start(logs)?;
    let config = ShimConfig::load(config_path)?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut sockets = Sockets::default();
    let links = sockets.listen(&config.link_socket(), GROUP)?;
    let dials = sockets.listen(&config.sockets.dial, OWNER)?;
    let sessions = sockets.listen(&config.sockets.session, GROUP)?;
    let shim = Arc::new(Shim::new(config_path.into(), &config)?);
    let log = ConsoleLog::start(config.console_log.clone(), config.console_limit)?;
    shim.host_listeners.apply(&shim)?;
    let controls = sockets.listen(&config.sockets.control, OWNER)?;

    tokio::select! {
        // Each of these runs as long as the shim does.
        () = outgoing::serve(shim.clone(), links) => {}
        () = incoming::serve_dials(shim.clone(), dials) => {}
        () = session::serve(shim.clone(), sessions) => {}
        () = control::serve(shim.clone(), controls) => {}
        () = agent::keep(&shim) => {}
        () = console::follow(&shim, &config.console, &log) => {}
        () = logs.follow() => {}
        () = shim.stopped() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shim.stop();
    shim.host_listeners.stop();
    drop(sockets);
    // Connections end by themselves now; one that hangs must not hold up the rest.
    let _ = timeout(limits::STOP, shim.quiet()).await;
    log.finish();
    logs.finish();
    if let Some(journal) = &shim.journal {
        journal.finish();
    }
    shim.finish_recordings();
    shim.audit.finish(limits::STOP);
    shim.notes.finish(limits::STOP);
    Ok(())
}

/// The socket files that this shim has made; removed with it.
#[derive(Default)]
struct Sockets(Vec<PathBuf>);

impl Sockets {
    fn listen(&mut self, path: &Path, mode: u32) -> Result<tokio::net::UnixListener, SocketError> {
        let listener = socket::listen(path, mode)?;
        self.0.push(path.into());
        Ok(listener)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.0 {
            // A file that is gone already is as good as removed.
            let _ = std::fs::remove_file(path);
        }
    }
}
