//! How `laird` and `vmctl` speak to a shim.

use super::{
    limits,
    message::{self, MessageError},
    protocol::{Control, ControlReply, Grant, SessionOpen, ShimStatus},
    socket::{self, SocketError},
};
use lair_guest::wire::{
    frame::{self, FrameError, MAX_PAYLOAD},
    message::{Answer, Ask, LinkReply},
};
use std::{path::Path, time::Duration};
use tokio::{net::UnixStream, time::timeout};

/// How long to wait for an answer that the shim has to get from elsewhere. The longest is an exec session: 5 s
/// for the dial, 10 s for the agent.
const ANSWER: Duration = Duration::from_secs(20);

/// Why a shim did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no shim at the socket, or it is not for this user.
    #[error("The shim cannot be reached")]
    Unreachable(#[from] SocketError),
    /// It did not answer in time.
    #[error("The shim did not answer within {} s", ANSWER.as_secs())]
    TimedOut,
    /// What it said was not understood, or it closed.
    #[error("The connection to the shim failed")]
    Failed(#[from] FrameError),
    /// It answered, to another question.
    #[error("The shim's answer does not belong to the request")]
    Unexpected,
    /// It said no, for this reason.
    #[error("The shim refused: {0}")]
    Refused(String),
}

impl From<MessageError> for ClientError {
    fn from(error: MessageError) -> Self {
        match error {
            MessageError::TimedOut(_) => Self::TimedOut,
            MessageError::Frame(error) => Self::Failed(error),
        }
    }
}

/// The state of the shim at `socket`, its control socket.
pub async fn status(socket: &Path) -> Result<ShimStatus, ClientError> {
    match request(socket, &Control::Status).await? {
        ControlReply::Status(status) => Ok(status),
        _ => Err(ClientError::Unexpected),
    }
}

/// The shim's state, now and after each change.
pub async fn watch(socket: &Path) -> Result<Watch, ClientError> {
    let mut stream = socket::connect(socket, limits::DIAL).await?;
    message::send(&mut stream, &Control::Watch).await?;
    Ok(Watch { stream })
}

/// The states of a shim, as they change.
#[derive(Debug)]
pub struct Watch {
    stream: UnixStream,
}

impl Watch {
    /// The next state; the first one is there at once. `None` when the shim has ended.
    ///
    /// Not cancel safe: a call that was dropped may have read a part of a state.
    pub async fn next(&mut self) -> Result<Option<ShimStatus>, ClientError> {
        match message::next(&mut self.stream, MAX_PAYLOAD).await? {
            Some(ControlReply::Status(status)) => Ok(Some(status)),
            Some(ControlReply::Failed { reason }) => Err(ClientError::Refused(reason)),
            Some(_) => Err(ClientError::Unexpected),
            None => Ok(None),
        }
    }
}

/// Allows one session.
pub async fn grant(socket: &Path, grant: Grant) -> Result<(), ClientError> {
    done(request(socket, &Control::Grant(grant)).await?)
}

/// Asks the guest's agent. [`Answer::Failed`] is the agent's own answer; [`ClientError::Refused`] means that there
/// was none.
pub async fn ask(socket: &Path, ask: Ask) -> Result<Answer, ClientError> {
    match request(socket, &Control::Ask { ask }).await? {
        ControlReply::Answer { answer } => Ok(answer),
        _ => Err(ClientError::Unexpected),
    }
}

/// Has the shim read its configuration again.
pub async fn reload(socket: &Path) -> Result<(), ClientError> {
    done(request(socket, &Control::Reload).await?)
}

/// Ends the shim with all its links and sessions. It has taken the request when this returns, and goes on ending.
pub async fn stop(socket: &Path) -> Result<(), ClientError> {
    done(request(socket, &Control::Stop).await?)
}

/// Opens the session of a ticket at `socket`, a session socket. The stream is ready for the session's frames.
pub async fn open_session(socket: &Path, ticket: &str) -> Result<UnixStream, ClientError> {
    let mut stream = socket::connect(socket, limits::DIAL).await?;
    message::send(&mut stream, &SessionOpen { ticket: ticket.into() }).await?;
    let reply = timeout(ANSWER, message::next(&mut stream, limits::HANDSHAKE_BYTES));
    match reply.await.map_err(|_| ClientError::TimedOut)?? {
        Some(LinkReply::Opened) => Ok(stream),
        Some(LinkReply::Refused { reason }) => Err(ClientError::Refused(reason)),
        None => Err(FrameError::Closed.into()),
    }
}

fn done(reply: ControlReply) -> Result<(), ClientError> {
    match reply {
        ControlReply::Done => Ok(()),
        _ => Err(ClientError::Unexpected),
    }
}

async fn request(socket: &Path, control: &Control) -> Result<ControlReply, ClientError> {
    let mut stream = socket::connect(socket, limits::DIAL).await?;
    message::send(&mut stream, control).await?;
    match timeout(ANSWER, frame::read_message(&mut stream)).await.map_err(|_| ClientError::TimedOut)?? {
        ControlReply::Failed { reason } => Err(ClientError::Refused(reason)),
        reply => Ok(reply),
    }
}
