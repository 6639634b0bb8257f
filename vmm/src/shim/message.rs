//! First messages: short, in time, or not at all.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::limits;
use lair_guest::wire::{
    frame::{self, FrameError, HEADER, Kind},
    message::LinkReply,
};
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    time::timeout,
};

/// Why a message was not exchanged.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("The peer did not say what it wants within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("The peer broke the protocol")]
    Frame(#[from] FrameError),
}

/// Reads one message of at most `limit` bytes, however long it takes to begin. `None` if the peer closed.
///
/// A longer one is refused from its header: it takes no memory.
pub(super) async fn next<T: DeserializeOwned, R: AsyncRead + Unpin>(
    from: &mut R,
    limit: usize,
) -> Result<Option<T>, FrameError> {
    let mut head = [0; HEADER];
    let [first, rest @ ..] = &mut head;
    if from.read(std::slice::from_mut(first)).await? == 0 {
        return Ok(None);
    }
    from.read_exact(rest).await?;
    let (kind, length) = frame::parse_header(head)?;
    if kind != Kind::Message {
        return Err(FrameError::Unexpected { expected: Kind::Message, got: kind });
    }
    if length > limit {
        return Err(FrameError::TooLong(u64::try_from(length).unwrap_or(u64::MAX)));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    Ok(Some(frame::parse_message(&payload)?))
}

/// Reads the one message that must come now.
pub(super) async fn receive<T: DeserializeOwned, R: AsyncRead + Unpin>(
    from: &mut R,
) -> Result<T, MessageError> {
    let message = timeout(limits::HANDSHAKE, next(from, limits::HANDSHAKE_BYTES));
    let message = message.await.map_err(|_| MessageError::TimedOut(limits::HANDSHAKE))??;
    Ok(message.ok_or(FrameError::Closed)?)
}

/// Writes one message to a peer that must take it.
pub(super) async fn send<T: Serialize, W: AsyncWrite + Unpin>(
    to: &mut W,
    message: &T,
) -> Result<(), MessageError> {
    let sent = timeout(limits::HANDSHAKE, frame::write_message(to, message)).await;
    Ok(sent.map_err(|_| MessageError::TimedOut(limits::HANDSHAKE))??)
}

/// Why the agent did not open its end of a link.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("The guest's agent refused: {0}")]
    Refused(String),
    #[error("The guest's agent did not answer")]
    Message(#[from] MessageError),
}

/// Awaits the agent's word that its end of a link is open.
pub(super) async fn opened<R: AsyncRead + Unpin>(from: &mut R) -> Result<(), OpenError> {
    match receive(from).await? {
        LinkReply::Opened => Ok(()),
        LinkReply::Refused { reason } => Err(OpenError::Refused(super::note::foreign(&reason))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::LinkOpen;

    #[tokio::test]
    async fn vs4_false_lengths_and_false_contents_are_errors() {
        let deep = format!("{}{}", "[".repeat(2000), "]".repeat(2000));
        let mut nested = frame::header(Kind::Message, deep.len()).unwrap().to_vec();
        nested.extend_from_slice(deep.as_bytes());
        let cases: [&[u8]; 8] = [
            &[0, 0, 0, 0, 0],
            &[0, 0xff, 0xff, 0xff, 0xff],
            &[0, 1, 16, 0, 0],
            &[0, 4, 0, 0, 0, b'{'],
            &[0, 2, 0, 0, 0, 0xff, 0xfe],
            &[1, 1, 0, 0, 0, b'x'],
            &[7, 0, 0, 0, 0],
            &nested,
        ];
        for mut bytes in cases {
            let shown = format!("{:?}", &bytes[..bytes.len().min(10)]);
            assert!(next::<LinkOpen, _>(&mut bytes, limits::HANDSHAKE_BYTES).await.is_err(), "{shown}");
        }
        let mut nothing: &[u8] = &[];
        assert!(next::<LinkOpen, _>(&mut nothing, 10).await.unwrap().is_none());
    }
}
