//! Operators' sessions: a command or a shell in the guest, its console, or a connection to one of its ports. `laird` has
//! authorised each and given a ticket for one use; here it is admitted.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Subject},
    carry::{carry, end},
    console_view, exec, limits,
    links::HOST,
    message::{self, MessageError, OpenError},
    note::chain,
    parting::leave,
    protocol::{Grant, Session, SessionOpen},
    socket::accept,
    state::Shim,
    ticket::GrantError,
    vsock::DialError,
};
use lair_guest::wire::{AGENT_PORT, frame::FrameError, message::LinkReply, relay::Form};
use std::sync::Arc;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
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
    let taken = shim.grants().take(&open.ticket, std::time::Instant::now());
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
        Session::Exec(exec) if exec.is_shell() => Subject::Shell,
        Session::Exec(exec) => Subject::Exec { command: exec.command.clone() },
        Session::Console(console) => Subject::Console { read_only: console.read_only },
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
        Session::Exec(exec) => exec::run(shim, client, exec, attempt).await,
        Session::Console(console) => console_view::run(shim, client, console, attempt).await,
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
    if let Err(error) = message::send(client, &LinkReply::Opened).await {
        leave(target).await;
        return Err(error.into());
    }
    let (reader, writer) = client.split();
    let client = lair_guest::wire::relay::End { reader, writer, form: Form::Framed };
    carry(shim, attempt, None, client, end(target, form)).await;
    Ok(())
}
