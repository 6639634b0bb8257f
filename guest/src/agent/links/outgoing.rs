//! Links that start in this VM: a unix socket, and a loopback port where asked for; each connection is opened at the
//! host with this boot's ticket, which no client gets to see.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{Shared, Tasks, relay::relay};
use crate::paths::LINKS;
use lair_guest::wire::{
    LINK_PORT, VERSION,
    frame::{self, FrameError},
    message::{LinkOpen, LinkReply, OutgoingLink},
};
use std::{
    fs, io,
    net::{self, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// Why a link has no listener.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListenError {
    #[error("A link's name is 1 to 64 letters, digits, `-`, `_` and `.`, and does not begin with `.`")]
    BadName,
    #[error("`{0}` is not a loopback ADDRESS:PORT")]
    NotLoopback(String),
    #[error("Could not listen on `{at}`")]
    Listen {
        at: String,
        #[source]
        source: io::Error,
    },
}

/// Why a connection was not opened.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("The host can not be reached")]
    Connect(#[source] io::Error),
    #[error("The host did not answer within {} seconds", REPLY.as_secs())]
    Silent,
    #[error("Refused: {0}")]
    Refused(String),
    #[error("The host's answer was not understood")]
    Frame(#[from] FrameError),
}

/// How long the host may take to open a link: it may have to dial another VM.
const REPLY: Duration = Duration::from_secs(30);

/// Starts the listeners of a link. Either all of them listen, or none.
pub(super) fn listen(shared: &Shared, link: &OutgoingLink) -> Result<Tasks, ListenError> {
    let path = socket(&link.name).ok_or(ListenError::BadName)?;
    let tcp = link.listen.as_deref().map(listen_loopback).transpose()?;
    let unix = listen_unix(&path)
        .map_err(|source| ListenError::Listen { at: path.display().to_string(), source })?;

    let mut tasks = vec![tokio::spawn(accept(shared.clone(), link.name.clone(), async move || {
        Ok(unix.accept().await?.0)
    }))];
    if let Some(tcp) = tcp {
        tasks.push(tokio::spawn(accept(shared.clone(), link.name.clone(), async move || {
            let (stream, _) = tcp.accept().await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })));
    }
    Ok(Tasks(tasks))
}

/// Removes what the listeners of a link have left.
pub(super) fn clean_up(name: &str) {
    if let Some(path) = socket(name) {
        let _ = fs::remove_file(path);
    }
}

fn socket(name: &str) -> Option<PathBuf> {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = (1..=64).contains(&name.len()) && name.chars().all(known) && !name.starts_with('.');
    good.then(|| Path::new(LINKS).join(name))
}

fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Left over from an agent that was killed.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

fn listen_loopback(text: &str) -> Result<TcpListener, ListenError> {
    let address = text.parse::<SocketAddr>().ok().filter(|address| address.ip().is_loopback());
    let address = address.ok_or_else(|| ListenError::NotLoopback(text.to_string()))?;
    let failed = |source| ListenError::Listen { at: text.to_string(), source };
    let listener = net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(listener).map_err(failed)
}

async fn accept<S>(shared: Shared, link: String, next: impl AsyncFn() -> io::Result<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    loop {
        let Ok(client) = next().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(permit) = shared.permit(&link) else { continue };
        let (shared, link) = (shared.clone(), link.clone());
        tokio::spawn(async move {
            let host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, LINK_PORT)).await;
            let ticket = shared.ticket.borrow().clone();
            let opened = match host {
                Ok(host) => open(host, ticket, link.clone()).await,
                Err(error) => Err(OpenError::Connect(error)),
            };
            match opened {
                // How a connection ends is its clients' business.
                Ok(host) => drop(relay(client, host).await),
                Err(error) => shared.say(&format!("link `{link}`: {}", crate::report::chain(&error))),
            }
            drop(permit);
        });
    }
}

/// Asks the host to open `link` on this connection.
async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    mut host: S,
    ticket: String,
    link: String,
) -> Result<S, OpenError> {
    let exchange = async {
        frame::write_message(&mut host, &LinkOpen { version: VERSION, ticket, link }).await?;
        frame::read_message(&mut host).await
    };
    match tokio::time::timeout(REPLY, exchange).await.map_err(|_| OpenError::Silent)?? {
        LinkReply::Opened => Ok(host),
        LinkReply::Refused { reason } => Err(OpenError::Refused(reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::shared;
    use super::*;

    #[test]
    fn names_stay_in_their_folder() {
        assert_eq!(socket("queue-runner"), Some(PathBuf::from("/run/lair/links/queue-runner")));
        for bad in ["", ".", "..", ".x", "a/b", "../x", "a b", "a\0", &"x".repeat(65)] {
            assert_eq!(socket(bad), None, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn only_loopback_addresses_are_listened_on() {
        for bad in ["0.0.0.0:1", "192.168.1.1:80", "[::]:1", "localhost:80", "127.0.0.1"] {
            assert!(matches!(listen_loopback(bad), Err(ListenError::NotLoopback(_))), "{bad}");
        }
        let listener = listen_loopback("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap().to_string();
        assert!(matches!(listen_loopback(&taken), Err(ListenError::Listen { at, .. }) if at == taken));
    }

    #[tokio::test]
    async fn a_socket_is_for_root_and_replaces_a_stale_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("links/x");
        drop(listen_unix(&path).unwrap());
        let _listener = listen_unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    }

    #[tokio::test]
    async fn the_host_gets_ticket_and_name_and_decides() {
        for (reply, opened) in
            [(LinkReply::Opened, true), (LinkReply::Refused { reason: "no such link".into() }, false)]
        {
            let (mut host, guest) = tokio::io::duplex(1 << 12);
            let task = tokio::spawn(open(guest, "ticket".into(), "store".into()));
            let asked: LinkOpen = frame::read_message(&mut host).await.unwrap();
            assert_eq!(asked, LinkOpen { version: VERSION, ticket: "ticket".into(), link: "store".into() });
            frame::write_message(&mut host, &reply).await.unwrap();
            let result = task.await.unwrap().map(drop).map_err(|error| error.to_string());
            assert_eq!(result, if opened { Ok(()) } else { Err("Refused: no such link".into()) });
        }
    }

    #[tokio::test]
    async fn a_silent_host_is_given_up() {
        tokio::time::pause();
        let (_host, guest) = tokio::io::duplex(1 << 12);
        assert!(matches!(open(guest, String::new(), String::new()).await, Err(OpenError::Silent)));
    }

    #[tokio::test]
    async fn a_client_of_a_closed_link_sees_the_end() {
        let shared = shared();
        let (mut client, server) = tokio::net::UnixStream::pair().unwrap();
        let server = std::sync::Mutex::new(Some(server));
        let task = tokio::spawn(accept(shared.clone(), "store".into(), async move || {
            let next = server.lock().unwrap().take();
            match next {
                Some(stream) => Ok(stream),
                None => std::future::pending().await,
            }
        }));
        // No host listens for links where tests run, so the connection is refused.
        let mut byte = [0];
        let end = tokio::io::AsyncReadExt::read(&mut client, &mut byte);
        let end = tokio::time::timeout(Duration::from_secs(20), end).await.expect("the client hangs");
        assert_eq!(end.unwrap(), 0);
        task.abort();
    }
}
