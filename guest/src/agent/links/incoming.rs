//! Links that end in this VM: the host connects to a vsock port, the agent dials what is behind it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{super::target::BadTarget, super::target::Target, Shared, Tasks, relay::relay};
use lair_guest::wire::{
    AGENT_PORT,
    frame::{self, FrameError},
    message::{IncomingLink, LinkReply},
};
use std::{io, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// Why a link has no listener.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListenError {
    #[error(transparent)]
    Target(#[from] BadTarget),
    #[error("Vsock port {AGENT_PORT} is the agent's own")]
    AgentPort,
    #[error("Could not listen on vsock port {port}")]
    Listen {
        port: u32,
        #[source]
        source: io::Error,
    },
}

/// How long a program in the guest may take to accept.
const DIAL: Duration = Duration::from_secs(10);

/// Starts the listener of a link.
pub(super) fn listen(shared: &Shared, link: &IncomingLink) -> Result<Tasks, ListenError> {
    let target: Target = link.connect.parse()?;
    if link.port == AGENT_PORT {
        return Err(ListenError::AgentPort);
    }
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, link.port))
        .map_err(|source| ListenError::Listen { port: link.port, source })?;
    Ok(Tasks(vec![tokio::spawn(accept(shared.clone(), link.name.clone(), listener, target))]))
}

async fn accept(shared: Shared, link: String, listener: VsockListener, target: Target) {
    loop {
        let Ok((host, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Links come from other VMs by way of the host, never from a process of this one.
        if peer.cid() != VMADDR_CID_HOST {
            continue;
        }
        let Some(permit) = shared.permit(&link) else { continue };
        let target = target.clone();
        tokio::spawn(async move {
            // How a connection ends is for its two ends to see.
            let _ = carry(host, &target).await;
            drop(permit);
        });
    }
}

/// Answers one connection of the host, then relays.
async fn carry<S: AsyncRead + AsyncWrite + Unpin>(mut host: S, target: &Target) -> Result<(), FrameError> {
    let dialled = match tokio::time::timeout(DIAL, target.dial()).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(format!("Could not connect to `{target}` in the guest: {error}")),
        Err(_) => Err(format!("`{target}` in the guest did not accept within {} seconds", DIAL.as_secs())),
    };
    match dialled {
        Ok(stream) => {
            frame::write_message(&mut host, &LinkReply::Opened).await?;
            relay(stream, host).await
        }
        Err(reason) => frame::write_message(&mut host, &LinkReply::Refused { reason }).await,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::shared;
    use super::*;
    use lair_guest::wire::frame::Kind;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_connection_reaches_the_program_behind_the_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let target = Target::Unix(path);
        let (mut host, guest) = tokio::io::duplex(1 << 12);
        let task = tokio::spawn(async move { carry(guest, &target).await });
        let (mut program, _) = listener.accept().await.unwrap();
        assert_eq!(frame::read_message::<LinkReply, _>(&mut host).await.unwrap(), LinkReply::Opened);

        frame::write(&mut host, Kind::Data, b"ping").await.unwrap();
        frame::write(&mut host, Kind::Eof, b"").await.unwrap();
        let mut got = Vec::new();
        program.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"ping");
        program.write_all(b"pong").await.unwrap();
        drop(program);
        let mut payload = Vec::new();
        assert_eq!(frame::read(&mut host, &mut payload).await.unwrap(), Some(Kind::Data));
        assert_eq!(payload, b"pong");
        assert_eq!(frame::read(&mut host, &mut payload).await.unwrap(), Some(Kind::Eof));
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_missing_program_is_a_refusal_with_a_reason() {
        let (mut host, guest) = tokio::io::duplex(1 << 12);
        carry(guest, &Target::Unix("/no/such.sock".into())).await.unwrap();
        let LinkReply::Refused { reason } = frame::read_message(&mut host).await.unwrap() else {
            panic!("opened");
        };
        assert_eq!(
            reason,
            "Could not connect to `/no/such.sock` in the guest: No such file or directory (os error 2)"
        );
    }

    #[tokio::test]
    async fn a_link_does_not_take_the_agents_port() {
        let link = |port, connect: &str| IncomingLink { name: "x".into(), port, connect: connect.into() };
        assert!(matches!(listen(&shared(), &link(AGENT_PORT, "/x")), Err(ListenError::AgentPort)));
        assert!(matches!(listen(&shared(), &link(5000, "nowhere")), Err(ListenError::Target(_))));
    }
}
