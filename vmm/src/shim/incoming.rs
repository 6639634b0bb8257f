//! Links that end in the guest: dialled for other VMs' shims, which get the connection and carry it; and opened by
//! the host's own clients, which are carried here.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Subject},
    carry::{carry, end},
    config::Incoming,
    fd, limits,
    links::{HOST, InUse},
    message::{self, OpenError},
    note::{chain, foreign},
    protocol::{Dial, DialReply},
    socket::{self, SocketError, accept},
    state::Shim,
    vsock::DialError,
};
use lair_guest::wire::relay::{End, Form};
use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::{sleep, timeout},
};

/// Why a link into the guest is not opened.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("Link {link} is not open to {from}")]
    NotAllowed { link: String, from: String },
    #[error("Limit of {} open connections is reached", limits::CONNECTIONS)]
    TooMany,
    #[error("The guest cannot be reached")]
    Dial(#[from] DialError),
    #[error("The link was not opened in the guest")]
    Agent(#[from] OpenError),
}

/// Serves other VMs' shims until the shim ends.
pub(super) async fn serve_dials(shim: Arc<Shim>, listener: UnixListener) {
    let handshakes = Arc::new(Semaphore::new(limits::HANDSHAKES));
    loop {
        let stream = accept(&listener).await;
        // Without a place the connection is dropped; the other shim records that.
        if let Ok(permit) = handshakes.clone().try_acquire_owned() {
            tokio::spawn(serve_dial(shim.clone(), stream, permit));
        }
    }
}

async fn serve_dial(shim: Arc<Shim>, mut stream: UnixStream, _permit: OwnedSemaphorePermit) {
    // No answer to what is not a request.
    let Ok(dial) = message::receive::<Dial, _>(&mut stream).await else {
        return;
    };
    let sent = match dial_for(&shim, &dial).await {
        Ok((connection, framed)) => {
            let reply = DialReply::Connected { framed };
            timeout(limits::HANDSHAKE, fd::send(&mut stream, &reply, Some(connection.as_fd()))).await
        }
        Err(refusal) => {
            if matches!(refusal, Refusal::NotAllowed { .. }) {
                let attempt = attempt(&shim, &foreign(&dial.link), &foreign(&dial.from), None);
                shim.audit.refused(attempt, chain(&refusal));
            }
            let reply = DialReply::Refused { reason: chain(&refusal) };
            timeout(limits::HANDSHAKE, fd::send(&mut stream, &reply, None)).await
        }
    };
    // The other shim is gone, or it hangs: it has its own deadline, and nothing is left here.
    let _ = sent;
}

fn attempt(shim: &Shim, link: &str, from: &str, uid: Option<u32>) -> Attempt {
    let subject = Subject::Link { link: link.into() };
    Attempt { subject, from: from.into(), to: shim.vm.clone(), uid }
}

/// A connection to the guest's port of a link, for another VM. Whether the agent speaks frames there.
async fn dial_for(shim: &Shim, dial: &Dial) -> Result<(UnixStream, bool), Refusal> {
    // The host's own clients come by their own listeners, never in the name of a VM.
    let known = shim.links.incoming(&dial.link).filter(|_| dial.from != HOST);
    let link = known.map(|(link, _)| link).filter(|link| link.from.contains(&dial.from));
    let Some(link) = link else {
        return Err(Refusal::NotAllowed { link: foreign(&dial.link), from: foreign(&dial.from) });
    };
    let stream = shim.dialer.dial(link.port).await?;
    Ok((stream, link.connect.is_some()))
}

/// Why the host cannot listen for a link.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The place is neither a socket's path nor a loopback address.
    #[error(
        "Link {link} cannot listen on {place}: it takes a loopback address with a port, or an absolute path"
    )]
    Place {
        /// The link.
        link: String,
        /// Where it should listen.
        place: String,
    },
    /// The path cannot be listened on.
    #[error("Link {link} cannot listen")]
    Unix {
        /// The link.
        link: String,
        /// Why.
        source: SocketError,
    },
    /// The address cannot be listened on.
    #[error("Link {link} cannot listen on {place}")]
    Tcp {
        /// The link.
        link: String,
        /// Where it should listen.
        place: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// The listeners of links from the host.
#[derive(Default)]
pub(super) struct HostListeners(Mutex<Vec<Running>>);

struct Running {
    link: String,
    place: String,
    task: AbortHandle,
}

impl HostListeners {
    /// Ends listeners that are not configured any more and starts those that are missing. A place that fails does
    /// not hold up the others; the first such error is returned.
    pub(super) fn apply(&self, shim: &Arc<Shim>) -> Result<(), ListenError> {
        let wanted = shim.links.host_listeners();
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|old| {
            let keep = !old.task.is_finished()
                && wanted.iter().any(|(link, place)| (link, place) == (&old.link, &old.place));
            if !keep {
                old.stop();
            }
            keep
        });
        let mut result = Ok(());
        for (link, place) in wanted {
            if running.iter().any(|old| (&old.link, &old.place) == (&link, &place)) {
                continue;
            }
            match listen(shim, &link, &place) {
                Ok(task) => running.push(Running { link, place, task }),
                Err(error) => {
                    shim.notes.say(&chain(&error));
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    /// Ends all of them.
    pub(super) fn stop(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(|old| old.stop());
    }
}

impl Running {
    fn stop(&self) {
        self.task.abort();
        if self.place.starts_with('/') {
            // A file that is gone already is as good as removed.
            let _ = std::fs::remove_file(&self.place);
        }
    }
}

/// The rights of a unix socket for the host's clients: this process's user and group.
const MODE: u32 = 0o660;

fn listen(shim: &Arc<Shim>, link: &str, place: &str) -> Result<AbortHandle, ListenError> {
    let name = link.to_owned();
    if place.starts_with('/') {
        let listener = socket::listen(Path::new(place), MODE)
            .map_err(|source| ListenError::Unix { link: name.clone(), source })?;
        return Ok(tokio::spawn(serve_unix(shim.clone(), name, listener)).abort_handle());
    }
    let bad = || ListenError::Place { link: name.clone(), place: place.into() };
    let address: SocketAddr = place.parse().map_err(|_| bad())?;
    if !address.ip().is_loopback() {
        return Err(bad());
    }
    let tcp = |source| ListenError::Tcp { link: name.clone(), place: address, source };
    let listener = std::net::TcpListener::bind(address).map_err(tcp)?;
    listener.set_nonblocking(true).map_err(tcp)?;
    let listener = TcpListener::from_std(listener).map_err(tcp)?;
    Ok(tokio::spawn(serve_tcp(shim.clone(), name, listener)).abort_handle())
}

async fn serve_unix(shim: Arc<Shim>, link: String, listener: UnixListener) {
    loop {
        let stream = accept(&listener).await;
        let uid = stream.peer_cred().ok().map(|peer| peer.uid());
        tokio::spawn(serve_client(shim.clone(), link.clone(), uid, end(stream, Form::Raw)));
    }
}

async fn serve_tcp(shim: Arc<Shim>, link: String, listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(limits::ACCEPT_PAUSE).await;
            continue;
        };
        // Small answers of a web service should not wait for more; it works without, too.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        tokio::spawn(serve_client(shim.clone(), link.clone(), None, End { reader, writer, form: Form::Raw }));
    }
}

async fn serve_client<R, W>(shim: Arc<Shim>, link: String, uid: Option<u32>, client: End<R, W>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let attempt = attempt(&shim, &link, HOST, uid);
    let known = shim.links.incoming(&link);
    let in_use = known.as_ref().map(|(_, in_use)| in_use.clone());
    match open_from_host(&shim, &link, known).await {
        Ok((target, form, in_use, _permit)) => {
            carry(&shim, attempt, Some(&in_use), client, end(target, form)).await;
        }
        Err(refusal) => {
            if let Some(in_use) = in_use {
                in_use.counters.refused.fetch_add(1, Relaxed);
            }
            shim.audit.refused(attempt, chain(&refusal));
        }
    }
}

async fn open_from_host(
    shim: &Shim,
    link: &str,
    known: Option<(Incoming, InUse)>,
) -> Result<(UnixStream, Form, InUse, OwnedSemaphorePermit), Refusal> {
    let refused = || Refusal::NotAllowed { link: link.into(), from: HOST.into() };
    let (link, in_use) = known.ok_or_else(refused)?;
    let permit = shim.connection().ok_or(Refusal::TooMany)?;
    let mut target = shim.dialer.dial(link.port).await?;
    if link.connect.is_none() {
        return Ok((target, Form::Raw, in_use, permit));
    }
    message::opened(&mut target).await?;
    Ok((target, Form::Framed, in_use, permit))
}
