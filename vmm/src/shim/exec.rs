//! An operator's command or shell in the guest: its streams pass unchanged, its end is recorded, and so is what its
//! terminal shows.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Outcome},
    frames::Passage,
    half::{self, Reader, Writer},
    limits, message,
    note::{chain, foreign},
    parting::leave,
    recorder::Recording,
    session::Refusal,
    state::Shim,
};
use lair_guest::wire::{
    AGENT_PORT,
    frame::{self, FrameError, Kind},
    message::{Exec, ExecEvent, ExecInput, HostOpen, LinkReply},
};
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    time::{sleep, timeout},
};

/// Why a session ended whose client is gone.
const CLIENT_LEFT: &str = "The client left";

/// Runs a command to its end. An error means that it did not begin.
pub(super) async fn run(
    shim: &Shim,
    client: &mut UnixStream,
    exec: Exec,
    attempt: Attempt,
) -> Result<(), Refusal> {
    let mut agent = shim.dialer.dial(AGENT_PORT).await?;
    let carried = carry(shim, client, &mut agent, exec, attempt).await;
    let tell = async {
        if let Ok(Some(cut)) = &carried {
            // Whether the client takes it is its own affair.
            let _ = timeout(limits::PARTING, frame::write_message(client, cut)).await;
        }
    };
    // On every way out, however it came about: an agent that does not learn of the end keeps the command.
    tokio::join!(tell, leave(agent));
    carried.map(drop)
}

/// Carries the streams until the command ends or one of the two sides leaves; what the client is to hear in place of the
/// command's end.
async fn carry(
    shim: &Shim,
    client: &mut UnixStream,
    agent: &mut UnixStream,
    exec: Exec,
    attempt: Attempt,
) -> Result<Option<ExecEvent>, Refusal> {
    let kind = if exec.is_shell() { "shell" } else { "exec" };
    let terminal = exec.terminal.clone();
    let open = HostOpen::Exec(exec);
    timeout(limits::HANDSHAKE, frame::write_message(agent, &open)).await.map_err(|_| Refusal::Slow)??;
    if message::send(client, &LinkReply::Opened).await.is_err() {
        // The agent has the command: it was allowed, and may have begun.
        let outcome = Outcome { reason: Some(CLIENT_LEFT.into()), ..Outcome::default() };
        shim.audit.ended(attempt, outcome);
        return Ok(None);
    }
    let recording = terminal.and_then(|terminal| shim.record(kind, attempt.uid, Some(&terminal)));
    let recording = recording.as_ref();
    let started = Instant::now();
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let client = &*client;
    let (from_agent, to_agent) = agent.split();
    let mut output = Passage::new(from_agent, Writer(client));
    let end = tokio::select! {
        end = watch_agent(&mut output, recording, &back) => end,
        reason = pass_input(Passage::new(Reader(client), to_agent), recording, &out) => ExecEnd::Cut(reason),
        () = left_for_good(client) => ExecEnd::Cut(CLIENT_LEFT.into()),
        () = shim.rebooted() => ExecEnd::Cut("The guest was started anew".into()),
        () = shim.stopped() => ExecEnd::Cut("The shim was stopped".into()),
    };
    // In the middle of a frame there is no place for a word.
    let told = output.is_between_frames();
    let cut = match &end {
        ExecEnd::Cut(reason) if told => Some(ExecEvent::Failed { reason: reason.clone() }),
        _ => None,
    };
    if let Some(recording) = recording {
        recording.note(end.in_words());
    }
    let mut outcome = Outcome {
        recording: recording.map(|recording| recording.name().into()),
        recording_failed: recording.is_some_and(Recording::failed),
        bytes_out: out.into_inner(),
        bytes_in: back.into_inner(),
        duration: started.elapsed(),
        ..Outcome::default()
    };
    match end {
        ExecEnd::Exited(status) => outcome.status = Some(status),
        ExecEnd::Killed(signal) => outcome.signal = Some(signal),
        ExecEnd::Failed(reason) => outcome.reason = Some(foreign(&reason)),
        ExecEnd::Cut(reason) => outcome.reason = Some(reason),
    }
    shim.audit.ended(attempt, outcome);
    Ok(cut)
}

/// Waits until the client has left, and then as long as its last input may take: a guest that takes no input must not keep
/// a session whose client is gone.
async fn left_for_good(client: &UnixStream) {
    half::left(client).await;
    sleep(limits::PARTING).await;
}

/// How a command's session ended.
enum ExecEnd {
    Exited(i32),
    Killed(i32),
    /// The agent could not start it.
    Failed(String),
    /// One of the two sides left, for this reason.
    Cut(String),
}

impl ExecEnd {
    fn in_words(&self) -> String {
        match self {
            Self::Exited(status) => format!("exited with status {status}"),
            Self::Killed(signal) => format!("ended by signal {signal}"),
            Self::Failed(reason) => foreign(reason),
            Self::Cut(reason) => reason.clone(),
        }
    }
}

/// Passes what the agent sends until the command's end has gone to the client.
async fn watch_agent<R, W>(
    frames: &mut Passage<R, W>,
    recording: Option<&Recording>,
    bytes: &AtomicU64,
) -> ExecEnd
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        let show = |kind, part: &[u8]| {
            if let (Some(recording), Kind::Stdout | Kind::Stderr) = (recording, kind) {
                recording.output(part);
            }
        };
        let passed = match frames.pass_and_show(show).await {
            Ok(Some(passed)) => passed,
            Ok(None) => return ExecEnd::Cut("The agent closed before the end of the command".into()),
            Err(error) => return ExecEnd::Cut(chain(&error)),
        };
        match passed.kind {
            Kind::Message => match passed.payload.map(frame::parse_message::<ExecEvent>) {
                Some(Ok(ExecEvent::Exited { status })) => return ExecEnd::Exited(status),
                Some(Ok(ExecEvent::Killed { signal })) => return ExecEnd::Killed(signal),
                Some(Ok(ExecEvent::Failed { reason })) => return ExecEnd::Failed(reason),
                // Started, or what a newer agent has to say to its client.
                _ => {}
            },
            _ => count(bytes, passed.length),
        }
    }
}

/// Passes what the client sends. It returns only when the client leaves or breaks the protocol.
async fn pass_input<R, W>(
    mut frames: Passage<R, W>,
    recording: Option<&Recording>,
    bytes: &AtomicU64,
) -> String
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        match frames.pass().await {
            Ok(Some(passed)) => match passed.kind {
                Kind::Data => count(bytes, passed.length),
                Kind::Message => {
                    let input = passed.payload.map(frame::parse_message::<ExecInput>);
                    // Anything else is the agent's to judge.
                    if let (Some(recording), Some(Ok(ExecInput::Resize(size)))) = (recording, input) {
                        recording.resize(size);
                    }
                }
                // No more input; the client still waits for the output.
                Kind::Eof => {
                    frames.after_end().await;
                    return CLIENT_LEFT.into();
                }
                _ => {}
            },
            Ok(None) => return CLIENT_LEFT.into(),
            // The agent takes no more input: the command may end any moment, and its end comes the other way.
            Err(FrameError::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                frames.after_end().await;
                return CLIENT_LEFT.into();
            }
            Err(error) => return chain(&error),
        }
    }
}

fn count(bytes: &AtomicU64, length: usize) {
    bytes.fetch_add(u64::try_from(length).unwrap_or(u64::MAX), Relaxed);
}
