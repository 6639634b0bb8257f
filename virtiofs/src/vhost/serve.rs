//! Connections, one after the other, on a socket that stays.

use super::{Config, Service, device::Device};
use crate::fd;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::close,
};
use std::{
    io::{self, PipeReader},
    os::{fd::AsFd, unix::net::UnixListener},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};
use thiserror::Error;
use tracing::{info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// How long a worker may take to end. It ends at once, unless the hypervisor gave it a descriptor that blocks.
const WORKER_END: Duration = Duration::from_secs(5);

/// How long one who connects waits while a connection is served, before being refused: it may be the successor of one that is
/// just ending.
const SUCCESSION: Duration = Duration::from_millis(250);

/// How long to wait after a failed `accept`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why serving ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket is of no use.
    #[error("Cannot use the listening socket")]
    Socket(#[source] io::Error),
    /// A system call for the service itself failed.
    #[error("Cannot set up a connection's {what}")]
    Setup {
        /// What it was for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The library failed.
    // As text: the library's error is no `std::error::Error`, so it cannot be a source.
    #[error("Cannot set up the device: {0}")]
    Device(String),
    /// A worker hangs, and with it what it has of the guest's memory.
    #[error("The worker of a closed connection did not end within {} s", WORKER_END.as_secs())]
    WorkerHangs,
}

/// Serves one connection after the other, for ever. The socket is listened on all the time; while a connection is served,
/// others are closed at once.
pub fn serve(listener: UnixListener, service: &Arc<Service>, config: &Config) -> Result<(), ServeError> {
    // The library's accept loop would spin on a non-blocking socket.
    fd::set_blocking(&listener).map_err(|errno| ServeError::Socket(errno.into()))?;
    let watched = listener.try_clone().map_err(ServeError::Socket)?;
    let mut listener = Listener::from(listener);
    loop {
        connection(&mut listener, &watched, service, config)?;
    }
}

pub(super) fn connection(
    listener: &mut Listener,
    watched: &UnixListener,
    service: &Arc<Service>,
    config: &Config,
) -> Result<(), ServeError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let device = Arc::new(Device::new(service.clone(), config.clone(), memory.clone()));
    let mut daemon = VhostUserDaemon::new("vhost-user".into(), device.clone(), memory)
        .map_err(|e| ServeError::Device(e.to_string()))?;
    let workers = daemon.get_epoll_handlers();
    device.meet(&workers).map_err(|source| ServeError::Setup { what: "worker", source })?;
    let accepted = daemon.start(listener);
    // Told once the workers have ended, for which dropping the daemon waits.
    let mut failure = Ok(());
    match &accepted {
        Ok(()) => {
            service.events.connections.add(1);
            if let Some(skipped) = service.trouble.admit() {
                info!(skipped, "The hypervisor connected");
            }
            if let Some(handle) = daemon.shutdown_handle() {
                device.set_shutdown(handle);
            }
            // Here, since queues' workers may not start threads; and not before, since the hypervisor waits for its first answer by now.
            let started = service.pool.start();
            let served = started
                .map_err(|source| ServeError::Setup { what: "threads that read from disks", source })
                .and_then(|()| refusing_others(watched, service, || daemon.wait()));
            match served {
                Ok(ended) => {
                    if let Some(skipped) = service.trouble.admit() {
                        match ended {
                            Ok(()) | Err(Error::HandleRequest(VhostUserError::Disconnected)) => {
                                info!(skipped, "The hypervisor disconnected")
                            }
                            Err(error) => warn!(%error, skipped, "The connection broke"),
                        }
                    }
                }
                Err(error) => failure = Err(error),
            }
        }
        Err(error) => {
            if let Some(skipped) = service.trouble.admit() {
                warn!(%error, skipped, "Cannot accept a connection");
            }
            thread::sleep(ACCEPT_PAUSE);
        }
    }
    device.stop();
    for worker in &workers {
        worker.send_exit_event();
    }
    drop(workers);
    let joined = join(daemon);
    // One that hangs still has its own.
    if joined.is_ok() {
        for exit in device.take_exits() {
            let _ = close(exit);
        }
    }
    // What came first says more: without threads, joining fails as well.
    failure.and(joined)
}

/// Does `work`, and closes meanwhile whatever connects.
fn refusing_others<T>(
    listener: &UnixListener,
    service: &Service,
    work: impl FnOnce() -> T,
) -> Result<T, ServeError> {
    let setup = |what| move |source| ServeError::Setup { what, source };
    let (done, end) = io::pipe().map_err(setup("pipe"))?;
    thread::scope(|scope| {
        thread::Builder::new()
            .name("refuse".into())
            .spawn_scoped(scope, move || refuse(listener, service, &done))
            .map_err(setup("thread"))?;
        let result = work();
        // Closing the pipe ends the thread.
        drop(end);
        Ok(result)
    })
}

fn refuse(listener: &UnixListener, service: &Service, done: &PipeReader) {
    let over = || PollFd::new(done.as_fd(), PollFlags::POLLIN);
    let succession = PollTimeout::try_from(SUCCESSION).unwrap_or(PollTimeout::ZERO);
    loop {
        let mut fds = [over(), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return,
        }
        // Any event on the pipe, or an error, is the end.
        if poll(&mut [over()], succession) != Ok(0) {
            return;
        }
        match listener.accept() {
            Ok(_) => service.events.refused.add(1),
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// Drops the daemon, which waits for its worker, but not for ever.
fn join(daemon: VhostUserDaemon<Arc<Device>>) -> Result<(), ServeError> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("join".into())
        .spawn(move || {
            drop(daemon);
            let _ = sender.send(());
        })
        .map_err(|source| ServeError::Setup { what: "thread", source })?;
    receiver.recv_timeout(WORKER_END).map_err(|_| ServeError::WorkerHangs)
}
