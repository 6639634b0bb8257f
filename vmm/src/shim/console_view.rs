//! An operator's session with the console: shown from its recent end on, and typed on by one session at a time.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Outcome, Subject},
    console::{View, Writing},
    limits, message,
    note::chain,
    protocol::{Console, ConsoleEvent},
    recorder::Recording,
    session::Refusal,
    state::Shim,
};
use lair_guest::wire::{
    frame::{self, CHUNK, FrameError, HEADER, Kind},
    message::{ExecInput, LinkReply},
};
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::UnixStream,
};

/// How much that is typed is taken at once, in bytes.
const TYPED: usize = 4 << 10;

/// Shows the console until the client leaves or the shim ends. An error means that it did not begin.
pub(super) async fn run(
    shim: &Shim,
    client: &mut UnixStream,
    console: Console,
    mut attempt: Attempt,
) -> Result<(), Refusal> {
    message::send(client, &LinkReply::Opened).await?;
    let (mut writing, writer) = match console.read_only {
        true => (None, None),
        false => match shim.console.write_as(attempt.uid.unwrap_or(u32::MAX)) {
            Ok(writing) => (Some(writing), None),
            Err(other) => (None, Some(other)),
        },
    };
    attempt.subject = Subject::Console { read_only: writing.is_none() };
    let recording =
        writing.as_ref().and_then(|_| shim.record("console", attempt.uid, console.terminal.as_ref()));
    let recording = recording.as_ref();
    let started = Instant::now();
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let view = shim.console.attach();
    let attached =
        ConsoleEvent::Attached { writable: writing.is_some(), writer, connected: shim.console.connected() };
    let (from, to) = client.split();
    let reason = tokio::select! {
        shown = show(shim, to, &attached, &view, recording, &back) => match shown {
            Ok(()) => "The shim was stopped".into(),
            Err(error) => chain(&error),
        },
        left = take_input(from, writing.as_mut(), recording, &out) => match left {
            Ok(()) => "The client left".into(),
            Err(error) => chain(&error),
        },
    };
    if let Some(recording) = recording {
        recording.note(reason.clone());
    }
    let outcome = Outcome {
        reason: Some(reason),
        recording: recording.map(|recording| recording.name().into()),
        recording_failed: recording.is_some_and(Recording::failed),
        bytes_out: out.into_inner(),
        bytes_in: back.into_inner(),
        duration: started.elapsed(),
        ..Outcome::default()
    };
    shim.audit.ended(attempt, outcome);
    Ok(())
}

/// Shows the console to the client until the shim ends.
async fn show<W: AsyncWrite + Unpin>(
    shim: &Shim,
    mut to: W,
    attached: &ConsoleEvent,
    view: &View,
    recording: Option<&Recording>,
    count: &AtomicU64,
) -> Result<(), FrameError> {
    frame::write_message(&mut to, attached).await?;
    let mut stopped = std::pin::pin!(shim.stopped());
    loop {
        let (lost, bytes) = tokio::select! {
            // First, so that a guest that floods its console does not put the end off.
            biased;
            () = &mut stopped => {
                let reason = "The shim was stopped".into();
                return frame::write_message(&mut to, &ConsoleEvent::Ended { reason }).await;
            }
            more = view.next() => more,
        };
        if lost > 0 {
            frame::write_message(&mut to, &ConsoleEvent::Lost { bytes: lost }).await?;
            if let Some(recording) = recording {
                recording.note(format!("{lost} bytes are missing here, the client was too slow"));
            }
        }
        for chunk in bytes.chunks(CHUNK) {
            if let Some(recording) = recording {
                recording.output(chunk);
            }
            frame::write(&mut to, Kind::Stdout, chunk).await?;
            count.fetch_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX), Relaxed);
        }
    }
}

/// Types what the client sends, or ignores it, until the client leaves. No frame is held whole.
async fn take_input<R: AsyncRead + Unpin>(
    mut from: R,
    mut writing: Option<&mut Writing<'_>>,
    recording: Option<&Recording>,
    count: &AtomicU64,
) -> Result<(), FrameError> {
    let mut buffer = vec![0; TYPED];
    loop {
        let mut head = [0; HEADER];
        let [first, rest @ ..] = &mut head;
        if from.read(std::slice::from_mut(first)).await? == 0 {
            return Ok(());
        }
        from.read_exact(rest).await?;
        let (kind, length) = frame::parse_header(head)?;
        match kind {
            Kind::Data => {
                let mut left = length;
                while left > 0 {
                    let part = buffer.get_mut(..left.min(TYPED)).unwrap_or_default();
                    from.read_exact(part).await?;
                    left = left.saturating_sub(part.len());
                    if let Some(writing) = &mut writing {
                        writing.send(part).await;
                        count.fetch_add(u64::try_from(part.len()).unwrap_or(u64::MAX), Relaxed);
                    }
                }
            }
            Kind::Message if length <= limits::HANDSHAKE_BYTES => {
                let mut payload = vec![0; length];
                from.read_exact(&mut payload).await?;
                let ExecInput::Resize(size) = frame::parse_message(&payload)?;
                if let Some(recording) = recording {
                    recording.resize(size);
                }
            }
            Kind::Message => return Err(FrameError::TooLong(u64::try_from(length).unwrap_or(u64::MAX))),
            // No more input; the client still looks.
            Kind::Eof => {}
            got => return Err(FrameError::Unexpected { expected: Kind::Data, got }),
        }
    }
}
