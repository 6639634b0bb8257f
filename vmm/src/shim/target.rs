//! Reaches what a link of the guest leads to: a socket of the host, or another VM by way of its shim.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    config::OutgoingTarget,
    fd, limits,
    message::{self, MessageError, OpenError},
    note::foreign,
    protocol::{Dial, DialReply},
    socket::{self, SocketError},
};
use lair_guest::wire::{frame::FrameError, relay::Form};
use std::{os::fd::OwnedFd, path::Path};
use tokio::{net::UnixStream, time::timeout};

/// Why a link's target was not reached. The guest is told the message; its sources, which name paths of the host,
/// are for the audit log.
#[derive(Debug, thiserror::Error)]
pub(super) enum TargetError {
    #[error("Nothing answers at the end of the link")]
    Host(#[source] SocketError),
    #[error("VM {vm} is not running")]
    NoShim { vm: String, source: SocketError },
    #[error("VM {vm} did not answer")]
    Shim { vm: String, source: FrameError },
    #[error("VM {vm} did not answer within {} s", limits::DIAL_OTHER.as_secs())]
    TimedOut { vm: String },
    #[error("VM {vm} was not asked")]
    Message { vm: String, source: MessageError },
    #[error("VM {vm} refused: {reason}")]
    Refused { vm: String, reason: String },
    #[error("VM {vm} sent no connection")]
    NoConnection { vm: String },
    #[error("VM {vm} sent what is not a connection")]
    NotAConnection { vm: String, source: std::io::Error },
    #[error("VM {vm} did not open the link")]
    Agent { vm: String, source: OpenError },
}

/// Connects `from` to the target of `link`. What comes back is ready for data.
pub(super) async fn reach(
    to: &OutgoingTarget,
    link: &str,
    from: &str,
) -> Result<(UnixStream, Form), TargetError> {
    match to {
        OutgoingTarget::Host { socket } => {
            let stream = socket::connect(socket, limits::DIAL).await.map_err(TargetError::Host)?;
            Ok((stream, Form::Raw))
        }
        OutgoingTarget::Vm { vm, dial } => reach_vm(vm, dial, link, from).await,
    }
}

async fn reach_vm(vm: &str, dial: &Path, link: &str, from: &str) -> Result<(UnixStream, Form), TargetError> {
    let name = || vm.to_owned();
    let mut shim = socket::connect(dial, limits::DIAL)
        .await
        .map_err(|source| TargetError::NoShim { vm: name(), source })?;
    let request = Dial { link: link.into(), from: from.into() };
    message::send(&mut shim, &request).await.map_err(|source| TargetError::Message { vm: name(), source })?;
    let (reply, connection) = timeout(limits::DIAL_OTHER, fd::receive::<DialReply>(&shim))
        .await
        .map_err(|_| TargetError::TimedOut { vm: name() })?
        .map_err(|source| TargetError::Shim { vm: name(), source })?;
    let framed = match reply {
        DialReply::Connected { framed } => framed,
        DialReply::Refused { reason } => {
            return Err(TargetError::Refused { vm: name(), reason: foreign(&reason) });
        }
    };
    let connection = connection.ok_or_else(|| TargetError::NoConnection { vm: name() })?;
    let mut stream =
        stream_of(connection).map_err(|source| TargetError::NotAConnection { vm: name(), source })?;
    if !framed {
        return Ok((stream, Form::Raw));
    }
    message::opened(&mut stream).await.map_err(|source| TargetError::Agent { vm: name(), source })?;
    Ok((stream, Form::Framed))
}

fn stream_of(connection: OwnedFd) -> std::io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(connection);
    stream.set_nonblocking(true)?;
    // Fails for what is no socket: a peer could send anything.
    stream.peer_addr()?;
    UnixStream::from_std(stream)
}
