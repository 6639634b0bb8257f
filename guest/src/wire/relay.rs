//! Carries one link connection between its two ends, each of which is a plain byte stream or speaks frames.
//!
//! Half-close: the end of one direction leaves the other open. On a framed end it is a [`Kind::Eof`] frame; on a raw
//! end it is `shutdown(SHUT_WR)`. A framed end that closes without that frame was cut off: an error, so that a
//! truncated stream never looks complete.
//!
//! Memory: one buffer of [`CHUNK`] and a header for each direction, whatever a peer announces in its frames. A peer
//! that does not read stops the other one by back-pressure. There is no idle limit: a link may be silent for hours.
//!
//! Who closes first matters on vsock: a guest that closes while the host still has to read can lose what is on the
//! way. So the host's side drops its ends as soon as both directions are over, and the guest's side first waits with
//! [`wait_for_close`].

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::frame::{self, CHUNK, FrameError, HEADER, Kind};
use std::{io, pin::pin, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What an end of a relayed connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// [`Kind::Data`] frames, ended by [`Kind::Eof`].
    Framed,
    /// Plain bytes.
    Raw,
}

/// One end of a relayed connection.
#[derive(Debug)]
pub struct End<R, W> {
    /// Where its bytes come from.
    pub reader: R,
    /// Where bytes for it go.
    pub writer: W,
    /// What it speaks, both ways.
    pub form: Form,
}

/// Which end of a connection did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The end that opened the connection.
    Opener,
    /// The end that it was opened to.
    Target,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::Opener => "opener",
            Side::Target => "target",
        })
    }
}

/// Why a relayed connection ended before both directions were over.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A framed end closed without [`Kind::Eof`], or both its directions while the other end was still sending.
    #[error("The {0} closed the connection in the middle of it")]
    Cut(Side),
    /// An end sent something else than data, or more after its end.
    #[error("The {0} broke the protocol")]
    Protocol(Side, #[source] FrameError),
    /// Reading from an end failed.
    #[error("The connection to the {0} failed")]
    Read(Side, #[source] io::Error),
}

/// Relays until both directions are over. Calls `count_out` with the number of payload bytes that went from the
/// opener to the target, each time some did, and `count_in` for the other direction.
pub async fn relay<OR, OW, TR, TW>(
    opener: &mut End<OR, OW>,
    target: &mut End<TR, TW>,
    count_out: impl Fn(u64),
    count_in: impl Fn(u64),
) -> Result<(), RelayError>
where
    OR: AsyncRead + Unpin,
    OW: AsyncWrite + Unpin,
    TR: AsyncRead + Unpin,
    TW: AsyncWrite + Unpin,
{
    let (o, t) = (opener.form, target.form);
    let mut out = pin!(pump(Side::Opener, &mut opener.reader, o, &mut target.writer, t, count_out));
    let mut back = pin!(pump(Side::Target, &mut target.reader, t, &mut opener.writer, o, count_in));
    // The direction that is over first is still watched: a framed peer says Eof before it closes, so the end of its
    // connection means that it does not read either.
    tokio::select! {
        over = &mut out => {
            let over = over?;
            tokio::select! {
                end = &mut back => end.map(drop),
                gone = over.gone(Side::Opener) => Err(gone),
            }
        }
        over = &mut back => {
            let over = over?;
            tokio::select! {
                end = &mut out => end.map(drop),
                gone = over.gone(Side::Target) => Err(gone),
            }
        }
    }
}

/// Waits until the peer of a framed end closes, or `limit` is over. For the guest's side of a connection, after
/// [`relay`] has returned.
pub async fn wait_for_close<R: AsyncRead + Unpin>(reader: &mut R, limit: Duration) {
    let mut rest = [0; 256];
    let closed = async { while matches!(reader.read(&mut rest).await, Ok(1..)) {} };
    // The bound is the point: a peer that never closes must not keep the connection.
    let _ = tokio::time::timeout(limit, closed).await;
}

/// A direction that is over.
struct Over<'a, R>(Option<&'a mut R>);

impl<R: AsyncRead + Unpin> Over<'_, R> {
    /// Waits until the sender of this direction closes its connection altogether, where that can be seen.
    async fn gone(self, side: Side) -> RelayError {
        let Some(reader) = self.0 else {
            return std::future::pending().await;
        };
        match reader.read(&mut [0]).await {
            Ok(0) => RelayError::Cut(side),
            Ok(_) => RelayError::Protocol(side, AFTER_END),
            Err(error) => RelayError::Read(side, error),
        }
    }
}

const AFTER_END: FrameError = FrameError::Unexpected { expected: Kind::Eof, got: Kind::Data };

/// Carries one direction until its end. A receiver that takes no more is no error: what it sends still counts, and
/// its own direction tells how it ended.
async fn pump<'a, R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    side: Side,
    reader: &'a mut R,
    from: Form,
    writer: &mut W,
    to: Form,
    count: impl Fn(u64),
) -> Result<Over<'a, R>, RelayError> {
    let mut buffer = vec![0; HEADER.saturating_add(CHUNK)];
    let mut frames = Unframer::new();
    loop {
        // Room before the bytes for the header that goes with them, so that both leave in one write.
        let (head, body) = buffer.split_at_mut(HEADER);
        let read = reader.read(body).await.map_err(|e| RelayError::Read(side, e))?;
        if read == 0 {
            return match from {
                Form::Framed => Err(RelayError::Cut(side)),
                Form::Raw => {
                    end(writer, to).await;
                    Ok(Over(None))
                }
            };
        }
        let bytes = body.get_mut(..read).unwrap_or_default();
        let protocol = |e| RelayError::Protocol(side, e);
        let (payload, over) = match (from, to) {
            (Form::Raw, _) => (read, false),
            (Form::Framed, Form::Framed) => frames.check(bytes).map_err(protocol)?,
            (Form::Framed, Form::Raw) => frames.strip(bytes).map_err(protocol)?,
        };
        let sent = match (from, to) {
            (Form::Raw, Form::Framed) => {
                head.copy_from_slice(&frame::header(Kind::Data, read).map_err(protocol)?);
                let whole = HEADER.saturating_add(read);
                writer.write_all(buffer.get(..whole).unwrap_or_default()).await
            }
            // With its headers as they came, the frame of the end among them.
            (Form::Framed, Form::Framed) => writer.write_all(bytes).await,
            (_, Form::Raw) => writer.write_all(bytes.get(..payload).unwrap_or_default()).await,
        };
        if sent.is_err() {
            return Ok(Over(None));
        }
        count(u64::try_from(payload).unwrap_or(u64::MAX));
        if over {
            if to == Form::Raw {
                end(writer, to).await;
            }
            return Ok(Over(Some(reader)));
        }
    }
}

/// Tells a receiver that nothing more comes. A receiver that is gone already needs no telling.
async fn end<W: AsyncWrite + Unpin>(writer: &mut W, form: Form) {
    let _ = match form {
        Form::Framed => frame::write(writer, Kind::Eof, &[]).await.ok(),
        Form::Raw => writer.shutdown().await.ok(),
    };
}

/// Follows the frames of one direction, in whatever pieces they arrive.
struct Unframer {
    state: State,
}

enum State {
    Header { bytes: [u8; HEADER], have: usize },
    Payload { left: usize },
    Ended,
}

impl Unframer {
    const HEADER: State = State::Header { bytes: [0; HEADER], have: 0 };

    fn new() -> Self {
        Self { state: Self::HEADER }
    }

    /// Checks `bytes`; returns how many of them are payload, and whether the direction ends with them.
    fn check(&mut self, bytes: &[u8]) -> Result<(usize, bool), FrameError> {
        let (mut rest, mut payload) = (bytes, 0_usize);
        while !rest.is_empty() {
            let (taken, is_payload) = self.step(rest)?;
            rest = rest.get(taken..).unwrap_or_default();
            if is_payload {
                payload = payload.saturating_add(taken);
            }
        }
        Ok((payload, matches!(self.state, State::Ended)))
    }

    /// Like [`Self::check`], and moves the payload to the front of `bytes`.
    fn strip(&mut self, bytes: &mut [u8]) -> Result<(usize, bool), FrameError> {
        let (mut at, mut kept) = (0_usize, 0_usize);
        while at < bytes.len() {
            let (taken, is_payload) = self.step(bytes.get(at..).unwrap_or_default())?;
            let next = at.saturating_add(taken);
            if is_payload {
                bytes.copy_within(at..next, kept);
                kept = kept.saturating_add(taken);
            }
            at = next;
        }
        Ok((kept, matches!(self.state, State::Ended)))
    }

    /// Takes bytes up to the next boundary between header and payload: how many, and whether they are payload.
    fn step(&mut self, input: &[u8]) -> Result<(usize, bool), FrameError> {
        match &mut self.state {
            State::Header { bytes, have } => {
                let missing = bytes.get_mut(*have..).unwrap_or_default();
                let taken = missing.len().min(input.len());
                for (to, from) in missing.iter_mut().zip(input) {
                    *to = *from;
                }
                *have = have.saturating_add(taken);
                if *have == HEADER {
                    self.state = match frame::parse_header(*bytes)? {
                        (Kind::Data, 0) => Self::HEADER,
                        (Kind::Data, left) => State::Payload { left },
                        (Kind::Eof, 0) => State::Ended,
                        (Kind::Eof, length) => {
                            return Err(FrameError::TooLong(u64::try_from(length).unwrap_or(u64::MAX)));
                        }
                        (got, _) => return Err(FrameError::Unexpected { expected: Kind::Data, got }),
                    };
                }
                Ok((taken, false))
            }
            State::Payload { left } => {
                let taken = (*left).min(input.len());
                *left = left.saturating_sub(taken);
                if *left == 0 {
                    self.state = Self::HEADER;
                }
                Ok((taken, true))
            }
            State::Ended => Err(AFTER_END),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;
    use tokio::{
        io::{DuplexStream, ReadHalf, WriteHalf, duplex, split},
        task::JoinHandle,
    };

    type TestEnd = End<ReadHalf<DuplexStream>, WriteHalf<DuplexStream>>;

    fn end_of(stream: DuplexStream, form: Form) -> TestEnd {
        let (reader, writer) = split(stream);
        End { reader, writer, form }
    }

    /// The result, and the bytes counted each way.
    type Outcome = (Result<(), RelayError>, u64, u64);

    /// A relay between two forms; what the test holds are the far ends.
    fn start(opener: Form, target: Form) -> (DuplexStream, DuplexStream, JoinHandle<Outcome>) {
        let (near_opener, far_opener) = duplex(4096);
        let (near_target, far_target) = duplex(4096);
        let task = tokio::spawn(async move {
            use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
            let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
            let result = relay(
                &mut end_of(near_opener, opener),
                &mut end_of(near_target, target),
                |n| _ = out.fetch_add(n, Relaxed),
                |n| _ = back.fetch_add(n, Relaxed),
            )
            .await;
            (result, out.into_inner(), back.into_inner())
        });
        (far_opener, far_target, task)
    }

    async fn send(to: &mut DuplexStream, form: Form, bytes: &[u8]) {
        match form {
            Form::Raw => to.write_all(bytes).await.unwrap(),
            Form::Framed => frame::write(to, Kind::Data, bytes).await.unwrap(),
        }
    }

    async fn finish(to: &mut DuplexStream, form: Form) {
        match form {
            Form::Raw => to.shutdown().await.unwrap(),
            Form::Framed => frame::write(to, Kind::Eof, &[]).await.unwrap(),
        }
    }

    async fn receive_all(from: &mut DuplexStream, form: Form) -> Vec<u8> {
        let mut all = Vec::new();
        match form {
            Form::Raw => drop(from.read_to_end(&mut all).await.unwrap()),
            Form::Framed => {
                let mut payload = Vec::new();
                while frame::read(from, &mut payload).await.unwrap().unwrap() == Kind::Data {
                    all.extend_from_slice(&payload);
                }
            }
        }
        all
    }

    #[tokio::test]
    async fn every_pair_of_forms_carries_bytes_and_half_close() {
        for (o, t) in [
            (Form::Raw, Form::Raw),
            (Form::Raw, Form::Framed),
            (Form::Framed, Form::Raw),
            (Form::Framed, Form::Framed),
        ] {
            let (mut opener, mut target, task) = start(o, t);
            send(&mut opener, o, b"question").await;
            finish(&mut opener, o).await;
            assert_eq!(receive_all(&mut target, t).await, b"question", "{o:?} to {t:?}");
            // The other direction is open after the first one has ended.
            send(&mut target, t, b"a longer answer").await;
            finish(&mut target, t).await;
            assert_eq!(receive_all(&mut opener, o).await, b"a longer answer", "{o:?} to {t:?}");
            let (result, out, back) = task.await.unwrap();
            result.unwrap();
            assert_eq!((out, back), (8, 15), "{o:?} to {t:?}");
        }
    }

    #[tokio::test]
    async fn much_data_passes_unchanged() {
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        for (o, t) in [(Form::Raw, Form::Framed), (Form::Framed, Form::Raw), (Form::Framed, Form::Framed)] {
            let (mut opener, mut target, task) = start(o, t);
            let sent = bytes.clone();
            let sender = tokio::spawn(async move {
                for part in sent.chunks(300_001) {
                    send(&mut opener, o, part).await;
                }
                finish(&mut opener, o).await;
                opener
            });
            assert_eq!(receive_all(&mut target, t).await, bytes);
            finish(&mut target, t).await;
            let _opener = sender.await.unwrap();
            task.await.unwrap().0.unwrap();
        }
    }

    #[tokio::test]
    async fn a_framed_end_that_closes_without_eof_was_cut() {
        let (mut opener, mut target, task) = start(Form::Framed, Form::Raw);
        send(&mut opener, Form::Framed, b"half").await;
        drop(opener);
        assert_eq!(receive_all(&mut target, Form::Raw).await, b"half");
        assert!(matches!(task.await.unwrap().0, Err(RelayError::Cut(Side::Opener))));
    }

    #[tokio::test]
    async fn a_framed_end_that_closes_after_its_eof_ends_an_idle_connection() {
        let (mut opener, _target, task) = start(Form::Framed, Form::Raw);
        finish(&mut opener, Form::Framed).await;
        drop(opener);
        assert!(matches!(task.await.unwrap().0, Err(RelayError::Cut(Side::Opener))));
    }

    #[tokio::test]
    async fn a_target_that_closes_after_its_eof_ends_an_idle_connection() {
        let (mut opener, mut target, task) = start(Form::Framed, Form::Framed);
        finish(&mut target, Form::Framed).await;
        assert_eq!(receive_all(&mut opener, Form::Framed).await, b"");
        drop(target);
        assert!(matches!(task.await.unwrap().0, Err(RelayError::Cut(Side::Target))));
    }

    #[tokio::test]
    async fn a_target_that_reads_no_more_still_delivers_its_answer() {
        let (target_reader, mut far_writes) = duplex(4096);
        let (target_writer, far_reads) = duplex(4096);
        let (near_opener, mut opener) = duplex(4096);
        drop(far_reads);
        let task = tokio::spawn(async move {
            let mut target = End { reader: target_reader, writer: target_writer, form: Form::Raw };
            relay(&mut end_of(near_opener, Form::Framed), &mut target, |_| {}, |_| {}).await
        });
        send(&mut opener, Form::Framed, b"request that nobody reads").await;
        far_writes.write_all(b"400 enough").await.unwrap();
        drop(far_writes);
        assert_eq!(receive_all(&mut opener, Form::Framed).await, b"400 enough");
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn frames_that_do_not_belong_end_the_connection() {
        let cases: [&[u8]; 5] = [
            &[0, 2, 0, 0, 0, b'{', b'}'],
            &[2, 1, 0, 0, 0, b'x'],
            &[9, 0, 0, 0, 0],
            &[1, 0xff, 0xff, 0xff, 0xff],
            &[4, 1, 0, 0, 0, b'x'],
        ];
        for bytes in cases {
            let (mut opener, mut target, task) = start(Form::Framed, Form::Raw);
            opener.write_all(bytes).await.unwrap();
            assert_eq!(receive_all(&mut target, Form::Raw).await, b"", "{bytes:?}");
            assert!(matches!(task.await.unwrap().0, Err(RelayError::Protocol(Side::Opener, _))), "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn data_after_the_end_is_refused() {
        let (mut opener, _target, task) = start(Form::Framed, Form::Raw);
        opener.write_all(&[4, 0, 0, 0, 0, 1]).await.unwrap();
        assert!(matches!(task.await.unwrap().0, Err(RelayError::Protocol(Side::Opener, _))));
    }

    #[tokio::test]
    async fn waiting_for_the_close_is_bounded() {
        let (mut near, mut far) = duplex(64);
        far.write_all(b"late").await.unwrap();
        wait_for_close(&mut near, Duration::from_millis(20)).await;
        drop(far);
        wait_for_close(&mut near, Duration::from_secs(3600)).await;
    }

    proptest! {
        /// However frames are cut into pieces, the payload and the end come out the same.
        #[test]
        fn pieces_do_not_matter(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..8),
            piece in 1_usize..40,
        ) {
            let mut stream = Vec::new();
            for payload in &payloads {
                stream.extend_from_slice(&frame::header(Kind::Data, payload.len()).unwrap());
                stream.extend_from_slice(payload);
            }
            stream.extend_from_slice(&frame::header(Kind::Eof, 0).unwrap());
            let (mut checked, mut stripped) = (Unframer::new(), Unframer::new());
            let (mut out, mut count) = (Vec::new(), 0);
            let ended = Cell::new(false);
            for part in stream.chunks(piece) {
                prop_assert!(!ended.get());
                count = checked.check(part).unwrap().0.saturating_add(count);
                let mut part = part.to_vec();
                let (kept, end) = stripped.strip(&mut part).unwrap();
                out.extend_from_slice(&part[..kept]);
                ended.set(end);
            }
            prop_assert!(ended.get());
            prop_assert_eq!(&out, &payloads.concat());
            prop_assert_eq!(count, out.len());
        }

        /// Garbage is an answer or an error, never a panic.
        #[test]
        fn vs4_any_bytes_are_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let checked = Unframer::new().check(&bytes).ok();
            let stripped = Unframer::new().strip(&mut bytes.clone()).ok();
            prop_assert_eq!(checked, stripped);
        }
    }
}
