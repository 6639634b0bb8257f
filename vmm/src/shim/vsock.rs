//! Connecting to a port of the guest through the hybrid vsock socket: `CONNECT PORT\n`, then `OK NUMBER\n`.
//!
//! A dial is never dropped before the guest has answered it. vhost-device-vsock 0.3.0 writes its `OK` with an
//! unwrap: a socket that was closed in the meantime ends its worker, and with it all vsock of the VM, while the process
//! lives on (measured). So each dial is a task of its own, which goes on when its caller stopped waiting,
//! [`limits::DIAL_ABANDONED`] long.
//!
//! That device shuts both directions down when the host shuts one. Protocols of ours have a frame for it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    limits,
    socket::{self, SocketError},
};
use std::{io, path::PathBuf, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Semaphore,
    time::timeout,
};

/// The longest answer: `OK `, ten digits, the newline.
const LONGEST_ANSWER: usize = 14;

/// Why there is no connection to a port of the guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("The hypervisor does not offer vsock")]
    Socket(#[from] SocketError),
    #[error("Nothing in the guest listens on vsock port {port}")]
    Refused { port: u32 },
    #[error("The guest did not answer on vsock port {port} within {} s", limits::DIAL.as_secs())]
    TimedOut { port: u32 },
    #[error("The hypervisor's answer for vsock port {port} is not an OK line")]
    Malformed { port: u32 },
    #[error("Limit of {} dials that wait for the guest is reached", limits::DIALS)]
    TooMany,
    #[error("The connection to the hypervisor failed")]
    Io(#[source] io::Error),
}

/// Connects to ports of one guest.
pub(super) struct Dialer {
    path: PathBuf,
    pending: Arc<Semaphore>,
}

impl Dialer {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, pending: Arc::new(Semaphore::new(limits::DIALS)) }
    }

    /// A connection to `port`, within [`limits::DIAL`].
    pub(super) async fn dial(&self, port: u32) -> Result<UnixStream, DialError> {
        let permit = self.pending.clone().try_acquire_owned().map_err(|_| DialError::TooMany)?;
        let path = self.path.clone();
        let task = tokio::spawn(async move {
            let _permit = permit;
            let stream = socket::connect_to_owner(&path, limits::DIAL).await?;
            timeout(limits::DIAL_ABANDONED, connect(stream, port))
                .await
                .unwrap_or(Err(DialError::TimedOut { port }))
        });
        match timeout(limits::DIAL, task).await {
            Ok(Ok(dialled)) => dialled,
            Ok(Err(join)) => Err(DialError::Io(io::Error::other(join))),
            Err(_) => Err(DialError::TimedOut { port }),
        }
    }
}

async fn connect(mut stream: UnixStream, port: u32) -> Result<UnixStream, DialError> {
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(|_| DialError::Refused { port })?;
    let mut answer = Vec::with_capacity(LONGEST_ANSWER);
    // Byte by byte: what follows the newline is the guest's already.
    while answer.last() != Some(&b'\n') {
        if answer.len() == LONGEST_ANSWER {
            return Err(DialError::Malformed { port });
        }
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(_) if answer.is_empty() => return Err(DialError::Refused { port }),
            Err(error) => return Err(DialError::Io(error)),
        }
    }
    if is_ok(&answer) { Ok(stream) } else { Err(DialError::Malformed { port }) }
}

fn is_ok(answer: &[u8]) -> bool {
    let number = answer.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
    number.is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::UnixListener;

    async fn answer(bytes: &'static [u8]) -> Result<UnixStream, DialError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let hypervisor = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 11];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 77\n");
            stream.write_all(bytes).await.unwrap();
        });
        let dialled = Dialer::new(path).dial(77).await;
        hypervisor.await.unwrap();
        dialled
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_left_in_the_stream() {
        let mut stream = answer(b"OK 1073741824\nhello").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn other_answers_are_errors() {
        assert!(matches!(answer(b"").await, Err(DialError::Refused { port: 77 })));
        assert!(matches!(answer(b"OK\n").await, Err(DialError::Malformed { .. })));
        assert!(matches!(answer(b"OK x\n").await, Err(DialError::Malformed { .. })));
        assert!(matches!(answer(b"NO 1\n").await, Err(DialError::Malformed { .. })));
        assert!(matches!(answer(b"OK 1").await, Err(DialError::Io(_))));
        assert!(matches!(answer(b"OK 11111111111111111111111\n").await, Err(DialError::Malformed { .. })));
        let none = Dialer::new("/nonexistent/vsock".into()).dial(1).await;
        assert!(matches!(none, Err(DialError::Socket(_))));
    }

    /// The worker of vhost-device-vsock would end with the socket.
    #[tokio::test]
    async fn a_dial_that_nobody_waits_for_stays_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let dialer = Dialer::new(path);
        assert!(timeout(Duration::from_millis(100), dialer.dial(1)).await.is_err());
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = [0; 10];
        stream.read_exact(&mut line).await.unwrap();
        assert!(timeout(Duration::from_millis(200), stream.read_u8()).await.is_err(), "It was closed");
        stream.write_all(b"OK 1\n").await.unwrap();
        assert!(
            timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err(),
            "It is closed once answered"
        );
    }
}
