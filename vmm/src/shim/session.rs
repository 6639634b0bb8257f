//! Operators' sessions: a command in the guest, or a connection to one of its ports. `laird` has authorised each and
//! given a ticket for one use; here it is carried and recorded.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Outcome, Subject},
    carry::{carry, end},
    frames::Passage,
    limits,
    links::HOST,
    message::{self, MessageError, OpenError},
    note::chain,
    protocol::{Grant, Session, SessionOpen},
    socket::accept,
    state::{Shim, unix_ms},
    ticket::GrantError,
    vsock::DialError,
};
use lair_guest::wire::{
    AGENT_PORT,
    frame::{self, FrameError, Kind},
    message::{Exec, ExecEvent, HostOpen, LinkReply},
    relay::Form,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("The session is not allowed")]
    Grant(#[from] GrantError),
    #[error("Limit of {} open sessions is reached", limits::SESSIONS)]
    TooMany,
    #[error("Port {AGENT_PORT} is the agent's own, commands go by exec")]
    AgentPort,
    #[error("The guest cannot be reached")]
    Dial(#[from] DialError),
    #[error("The agent did not take the command")]
    Exec(#[from] FrameError),
    #[error("The agent did not take the command in time")]
    Slow,
    #[error("The port was not opened in the guest")]
    Agent(#[from] OpenError),
    #[error("The client left")]
    Client(#[from] MessageError),
}

/// Serves operators' clients until the shim ends.
pub(super) async fn serve(shim: Arc<Shim>, listener: UnixListener) {
    let handshakes = Arc::new(Semaphore::new(limits::HANDSHAKES));
    loop {
        let stream = accept(&listener).await;
        // Without a place the connection is dropped: the client sees its end.
        if let Ok(permit) = handshakes.clone().try_acquire_owned() {
            tokio::spawn(serve_one(shim.clone(), stream, permit));
        }
    }
}

async fn serve_one(shim: Arc<Shim>, mut client: UnixStream, handshake: OwnedSemaphorePermit) {
    let uid = client.peer_cred().ok().map(|peer| peer.uid());
    let mut attempt = Attempt { subject: Subject::Session, from: HOST.into(), to: shim.vm.clone(), uid };
    let open = match message::receive::<SessionOpen, _>(&mut client).await {
        Ok(open) => open,
        Err(error) => return shim.audit.refused(attempt, chain(&error)),
    };
    drop(handshake);
    let taken = shim.grants().take(&open.ticket, unix_ms());
    let result = match taken {
        Ok(grant) => {
            attempt.uid = Some(grant.uid);
            attempt.subject = subject(&grant);
            run(&shim, &mut client, grant.session, attempt.clone()).await
        }
        Err(error) => Err(error.into()),
    };
    if let Err(refusal) = result {
        let reason = chain(&refusal);
        shim.audit.refused(attempt, reason.clone());
        // Whether the client takes it is its own affair.
        let _ = message::send(&mut client, &LinkReply::Refused { reason }).await;
    }
}

fn subject(grant: &Grant) -> Subject {
    match &grant.session {
        Session::Exec(exec) => Subject::Exec { command: exec.command.clone() },
        Session::Connect { port } => Subject::Connect { port: *port },
    }
}

/// Runs a session to its end. An error means that it did not begin.
async fn run(
    shim: &Shim,
    client: &mut UnixStream,
    session: Session,
    attempt: Attempt,
) -> Result<(), Refusal> {
    let _permit = shim.session().ok_or(Refusal::TooMany)?;
    match session {
        Session::Exec(exec) => run_exec(shim, client, exec, attempt).await,
        Session::Connect { port } => run_connect(shim, client, port, attempt).await,
    }
}

async fn run_connect(
    shim: &Shim,
    client: &mut UnixStream,
    port: u32,
    attempt: Attempt,
) -> Result<(), Refusal> {
    if port == AGENT_PORT {
        return Err(Refusal::AgentPort);
    }
    let mut target = shim.dialer.dial(port).await?;
    let form = if shim.links.is_framed(port) { Form::Framed } else { Form::Raw };
    if form == Form::Framed {
        message::opened(&mut target).await?;
    }
    message::send(client, &LinkReply::Opened).await?;
    let (reader, writer) = client.split();
    let client = lair_guest::wire::relay::End { reader, writer, form: Form::Framed };
    carry(shim, attempt, None, client, end(target, form)).await;
    Ok(())
}

async fn run_exec(shim: &Shim, client: &mut UnixStream, exec: Exec, attempt: Attempt) -> Result<(), Refusal> {
    let mut agent = shim.dialer.dial(AGENT_PORT).await?;
    let open = HostOpen::Exec(exec);
    timeout(limits::HANDSHAKE, frame::write_message(&mut agent, &open))
        .await
        .map_err(|_| Refusal::Slow)??;
    message::send(client, &LinkReply::Opened).await?;
    let started = Instant::now();
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let (from_client, to_client) = client.split();
    let (from_agent, to_agent) = agent.split();
    let end = tokio::select! {
        end = watch_agent(Passage::new(from_agent, to_client), &back) => end,
        reason = pass_input(Passage::new(from_client, to_agent), &out) => ExecEnd::Cut(reason),
        () = shim.rebooted() => ExecEnd::Cut("The guest was started anew".into()),
        () = shim.stopped() => ExecEnd::Cut("The shim was stopped".into()),
    };
    let mut outcome = Outcome {
        bytes_out: out.into_inner(),
        bytes_in: back.into_inner(),
        duration: started.elapsed(),
        ..Outcome::default()
    };
    match end {
        ExecEnd::Exited(status) => outcome.status = Some(status),
        ExecEnd::Killed(signal) => outcome.signal = Some(signal),
        ExecEnd::Failed(reason) => outcome.reason = Some(super::note::foreign(&reason)),
        ExecEnd::Cut(reason) => outcome.reason = Some(reason),
    }
    shim.audit.ended(attempt, outcome);
    Ok(())
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

/// Passes what the agent sends until the command's end has gone to the client.
async fn watch_agent<R, W>(mut frames: Passage<R, W>, bytes: &AtomicU64) -> ExecEnd
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        let passed = match frames.pass().await {
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
async fn pass_input<R, W>(mut frames: Passage<R, W>, bytes: &AtomicU64) -> String
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        match frames.pass().await {
            Ok(Some(passed)) => match passed.kind {
                Kind::Data => count(bytes, passed.length),
                // No more input; the client still waits for the output.
                Kind::Eof => {
                    frames.after_end().await;
                    return "The client left".into();
                }
                _ => {}
            },
            Ok(None) => return "The client left".into(),
            // The agent takes no more input: the command may end any moment, and its end comes the other way.
            Err(FrameError::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                frames.after_end().await;
                return "The client left".into();
            }
            Err(error) => return chain(&error),
        }
    }
}

fn count(bytes: &AtomicU64, length: usize) {
    bytes.fetch_add(u64::try_from(length).unwrap_or(u64::MAX), Relaxed);
}
