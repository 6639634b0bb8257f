//! Frames: one byte of kind, four bytes of length (little endian), then the payload.
//!
//! Input may come from a hostile peer. A frame longer than [`MAX_PAYLOAD`] or of an unknown kind is an
//! error, found from the header alone, before any memory is taken for it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// How much of a byte stream goes into one frame, in bytes: large enough that the header does not count,
/// small enough that many connections do not add up to much memory.
pub const CHUNK: usize = 64 << 10;

/// The length of a frame's header in bytes.
pub const HEADER: usize = 5;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A JSON document, see [`super::message`].
    Message = 0,
    /// Bytes of a link, or of standard input.
    Data = 1,
    /// Bytes of standard output.
    Stdout = 2,
    /// Bytes of standard error.
    Stderr = 3,
    /// The sender has no more [`Kind::Data`]; the other direction stays open. No payload.
    Eof = 4,
}

/// Why a frame, or the message in it, was not understood or not sent.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The first byte of the header is none of [`Kind`].
    #[error("Frame kind {0} is unknown")]
    UnknownKind(u8),
    /// The header announces more than [`MAX_PAYLOAD`] bytes.
    #[error("Frame of {0} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLong(u64),
    /// A frame of another kind was expected here.
    #[error("Expected a frame of kind {expected:?}, got {got:?}")]
    Unexpected {
        /// What the conversation allows at this point.
        expected: Kind,
        /// What came.
        got: Kind,
    },
    /// The connection ended inside a conversation.
    #[error("The peer closed the connection before its answer")]
    Closed,
    /// The payload of a message is not the JSON that is expected here.
    #[error("Malformed message")]
    Malformed(#[source] serde_json::Error),
    /// Reading or writing failed.
    #[error("Connection failed")]
    Io(#[from] std::io::Error),
}

/// Reads the header of a frame: its kind and the length of its payload.
pub fn parse_header(header: [u8; HEADER]) -> Result<(Kind, usize), FrameError> {
    let [kind, length @ ..] = header;
    let kind = match kind {
        0 => Kind::Message,
        1 => Kind::Data,
        2 => Kind::Stdout,
        3 => Kind::Stderr,
        4 => Kind::Eof,
        other => return Err(FrameError::UnknownKind(other)),
    };
    let length = u32::from_le_bytes(length);
    match usize::try_from(length) {
        Ok(length) if length <= MAX_PAYLOAD => Ok((kind, length)),
        _ => Err(FrameError::TooLong(length.into())),
    }
}

/// The header of a frame with a payload of `length` bytes.
pub fn header(kind: Kind, length: usize) -> Result<[u8; HEADER], FrameError> {
    let too_long = || FrameError::TooLong(u64::try_from(length).unwrap_or(u64::MAX));
    if length > MAX_PAYLOAD {
        return Err(too_long());
    }
    let [a, b, c, d] = u32::try_from(length).map_err(|_| too_long())?.to_le_bytes();
    Ok([kind as u8, a, b, c, d])
}

/// Reads one frame into `payload`, replacing what it held. `None` if the peer closed between two frames.
pub async fn read<R: AsyncRead + Unpin>(
    from: &mut R,
    payload: &mut Vec<u8>,
) -> Result<Option<Kind>, FrameError> {
    let mut head = [0; HEADER];
    let [first, rest @ ..] = &mut head;
    if from.read(std::slice::from_mut(first)).await? == 0 {
        return Ok(None);
    }
    from.read_exact(rest).await?;
    let (kind, length) = parse_header(head)?;
    payload.clear();
    payload.resize(length, 0);
    from.read_exact(payload).await?;
    Ok(Some(kind))
}

/// Writes one frame and flushes it.
pub async fn write<W: AsyncWrite + Unpin>(to: &mut W, kind: Kind, payload: &[u8]) -> Result<(), FrameError> {
    let head = header(kind, payload.len())?;
    // One write for a small frame: a packet each for header and payload would double the cost of a message.
    if payload.len() <= CHUNK {
        let mut whole = Vec::with_capacity(HEADER.saturating_add(payload.len()));
        whole.extend_from_slice(&head);
        whole.extend_from_slice(payload);
        to.write_all(&whole).await?;
    } else {
        to.write_all(&head).await?;
        to.write_all(payload).await?;
    }
    to.flush().await?;
    Ok(())
}

/// Reads a message: a frame of kind [`Kind::Message`] that holds one `T`.
pub async fn read_message<T: DeserializeOwned, R: AsyncRead + Unpin>(from: &mut R) -> Result<T, FrameError> {
    read_message_or_end(from).await?.ok_or(FrameError::Closed)
}

/// Like [`read_message`], for a conversation that may end here: `None` if the peer closed.
pub async fn read_message_or_end<T: DeserializeOwned, R: AsyncRead + Unpin>(
    from: &mut R,
) -> Result<Option<T>, FrameError> {
    let mut payload = Vec::new();
    match read(from, &mut payload).await? {
        None => Ok(None),
        Some(Kind::Message) => Ok(Some(parse_message(&payload)?)),
        Some(got) => Err(FrameError::Unexpected { expected: Kind::Message, got }),
    }
}

/// Reads the payload of a frame of kind [`Kind::Message`].
pub fn parse_message<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(payload).map_err(FrameError::Malformed)
}

/// Writes a message.
pub async fn write_message<T: Serialize, W: AsyncWrite + Unpin>(
    to: &mut W,
    message: &T,
) -> Result<(), FrameError> {
    let payload = serde_json::to_vec(message).map_err(FrameError::Malformed)?;
    write(to, Kind::Message, &payload).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_round_trip() {
        for kind in [Kind::Message, Kind::Data, Kind::Stdout, Kind::Stderr, Kind::Eof] {
            for length in [0, 1, CHUNK, MAX_PAYLOAD] {
                assert_eq!(parse_header(header(kind, length).unwrap()).unwrap(), (kind, length));
            }
        }
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused_from_its_header() {
        assert!(matches!(header(Kind::Data, MAX_PAYLOAD + 1), Err(FrameError::TooLong(_))));
        assert!(matches!(parse_header([1, 0xff, 0xff, 0xff, 0xff]), Err(FrameError::TooLong(0xffff_ffff))));
        assert!(matches!(parse_header([5, 0, 0, 0, 0]), Err(FrameError::UnknownKind(5))));
    }

    proptest! {
        #[test]
        fn any_header_is_an_answer(header in any::<[u8; HEADER]>()) {
            if let Ok((_, length)) = parse_header(header) {
                prop_assert!(length <= MAX_PAYLOAD);
            }
        }
    }

    #[tokio::test]
    async fn messages_travel() {
        let (mut a, mut b) = tokio::io::duplex(16);
        let text = "x".repeat(100_000);
        let sent = text.clone();
        let writer = tokio::spawn(async move { write_message(&mut a, &sent).await });
        assert_eq!(read_message::<String, _>(&mut b).await.unwrap(), text);
        writer.await.unwrap().unwrap();
        assert_eq!(read_message_or_end::<String, _>(&mut b).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_cut_frame_is_an_error_not_an_end() {
        let mut cut: &[u8] = &[0, 10, 0, 0, 0, b'"'];
        assert!(matches!(read_message_or_end::<String, _>(&mut cut).await, Err(FrameError::Io(_))));
    }
}
