//! Passes frames on as they are, and lets the caller see the short ones.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use lair_guest::wire::frame::{self, CHUNK, FrameError, HEADER, Kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// One direction of frames. It holds [`CHUNK`] bytes and a header, however long a frame is.
pub(super) struct Passage<R, W> {
    reader: R,
    writer: W,
    buffer: Vec<u8>,
    /// A frame has begun to be written and has not ended.
    inside: bool,
}

/// What passed.
pub(super) struct Passed<'a> {
    pub(super) kind: Kind,
    /// The length of its payload.
    pub(super) length: usize,
    /// The payload, if it is not longer than [`CHUNK`].
    pub(super) payload: Option<&'a [u8]>,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Passage<R, W> {
    pub(super) fn new(reader: R, writer: W) -> Self {
        Self { reader, writer, buffer: vec![0; HEADER.saturating_add(CHUNK)], inside: false }
    }

    /// Passes one frame. `None` if the sender closed between two.
    pub(super) async fn pass(&mut self) -> Result<Option<Passed<'_>>, FrameError> {
        self.pass_and_show(|_, _| {}).await
    }

    /// Passes one frame, and shows its kind and all of its payload, piece by piece.
    pub(super) async fn pass_and_show(
        &mut self,
        mut show: impl FnMut(Kind, &[u8]),
    ) -> Result<Option<Passed<'_>>, FrameError> {
        let mut head = [0; HEADER];
        let [first, rest @ ..] = &mut head;
        if self.reader.read(std::slice::from_mut(first)).await? == 0 {
            return Ok(None);
        }
        self.reader.read_exact(rest).await?;
        let (kind, length) = frame::parse_header(head)?;
        let (head_room, body) = self.buffer.split_at_mut(HEADER);
        head_room.copy_from_slice(&head);
        let mut part = length.min(CHUNK);
        self.reader.read_exact(body.get_mut(..part).unwrap_or_default()).await?;
        let whole = HEADER.saturating_add(part);
        show(kind, self.buffer.get(HEADER..whole).unwrap_or_default());
        self.inside = true;
        self.writer.write_all(self.buffer.get(..whole).unwrap_or_default()).await?;
        let mut left = length.saturating_sub(part);
        while left > 0 {
            part = left.min(CHUNK);
            let buffer = self.buffer.get_mut(..part).unwrap_or_default();
            self.reader.read_exact(buffer).await?;
            show(kind, buffer);
            self.writer.write_all(buffer).await?;
            left = left.saturating_sub(part);
        }
        self.inside = false;
        let payload = if length <= CHUNK { self.buffer.get(HEADER..whole) } else { None };
        Ok(Some(Passed { kind, length, payload }))
    }

    /// Whether the receiver is not in the middle of a frame: then a message may go to it from elsewhere.
    pub(super) fn is_between_frames(&self) -> bool {
        !self.inside
    }

    /// Waits until the sender closes or sends more, when it should do neither.
    pub(super) async fn after_end(&mut self) {
        // Whatever it is, it ends the connection.
        let _ = self.reader.read(&mut [0]).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_of_every_kind_and_length_pass_unchanged() {
        let long = vec![7; 3 * CHUNK + 1];
        let mut sent = Vec::new();
        for (kind, payload) in
            [(Kind::Message, &b"{}"[..]), (Kind::Data, &[]), (Kind::Stdout, &long), (Kind::Eof, &[])]
        {
            frame::write(&mut sent, kind, payload).await.unwrap();
        }
        let mut received = Vec::new();
        let mut passage = Passage::new(&sent[..], &mut received);
        let (mut seen, mut shown) = (Vec::new(), Vec::new());
        while let Some(passed) = passage
            .pass_and_show(|kind, part| {
                if kind == Kind::Stdout {
                    shown.extend_from_slice(part);
                }
            })
            .await
            .unwrap()
        {
            seen.push((passed.kind, passed.length, passed.payload.map(<[u8]>::to_vec)));
        }
        assert_eq!(seen[0], (Kind::Message, 2, Some(b"{}".to_vec())));
        assert_eq!(seen[1], (Kind::Data, 0, Some(vec![])));
        assert_eq!(seen[2], (Kind::Stdout, long.len(), None));
        assert_eq!(seen[3], (Kind::Eof, 0, Some(vec![])));
        assert_eq!(shown, long);
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn nothing_can_be_said_in_the_middle_of_a_frame() {
        let sent = [&frame::header(Kind::Stdout, 1000).unwrap()[..], &[0; 1000]].concat();
        let (narrow, _reader) = tokio::io::duplex(10);
        let mut passage = Passage::new(&sent[..], narrow);
        assert!(passage.is_between_frames());
        let pass = tokio::time::timeout(std::time::Duration::from_millis(50), passage.pass()).await;
        assert!(pass.is_err() && !passage.is_between_frames());
    }

    #[tokio::test]
    async fn vs4_a_cut_or_unknown_frame_is_an_error() {
        for bytes in [&[1, 5, 0, 0, 0, b'x'][..], &[1, 5], &[9, 0, 0, 0, 0], &[1, 0xff, 0xff, 0xff, 0xff]] {
            let mut received = Vec::new();
            assert!(Passage::new(bytes, &mut received).pass().await.is_err(), "{bytes:?}");
            assert!(received.is_empty(), "{bytes:?}");
        }
    }
}
