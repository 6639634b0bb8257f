//! The control socket: `laird`'s requests.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    limits, message,
    note::chain,
    protocol::{Control, ControlReply},
    socket::accept,
    state::{Asked, Shim, unix_ms},
};
use lair_guest::wire::{
    frame::{FrameError, MAX_PAYLOAD},
    message::Ask,
};
use std::sync::Arc;
use tokio::{
    io::{AsyncReadExt, AsyncWrite},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{sleep, timeout},
};

/// Serves `laird` until the shim ends.
pub(super) async fn serve(shim: Arc<Shim>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(limits::CONTROLS));
    loop {
        let stream = accept(&listener).await;
        // Without a place the connection is dropped: the client sees its end.
        if let Ok(permit) = places.clone().try_acquire_owned() {
            tokio::spawn(serve_one(shim.clone(), stream, permit));
        }
    }
}

async fn serve_one(shim: Arc<Shim>, mut stream: UnixStream, _place: OwnedSemaphorePermit) {
    loop {
        let reply = match message::next(&mut stream, MAX_PAYLOAD).await {
            Ok(Some(Control::Watch)) => return watch(&shim, stream).await,
            Ok(Some(Control::Stop)) => {
                // The stop goes on whether its answer arrives or not.
                let _ = message::send(&mut stream, &ControlReply::Done).await;
                return shim.stop();
            }
            Ok(Some(request)) => answer(&shim, request).await,
            // A request of a newer `laird`: its frame is read, so that the next one may be understood.
            Err(error @ FrameError::Malformed(_)) => failed(chain(&error)),
            Ok(None) | Err(_) => return,
        };
        if message::send(&mut stream, &reply).await.is_err() {
            return;
        }
    }
}

fn failed(reason: String) -> ControlReply {
    ControlReply::Failed { reason }
}

async fn answer(shim: &Arc<Shim>, request: Control) -> ControlReply {
    match request {
        Control::Grant(grant) => match shim.grants().add(grant, unix_ms(), std::time::Instant::now()) {
            Ok(()) => ControlReply::Done,
            Err(error) => failed(error.to_string()),
        },
        Control::Ask { ask } => ask_agent(shim, ask).await,
        Control::Reload => {
            if let Err(error) = shim.reload().await {
                return failed(chain(&error));
            }
            match shim.host_listeners.apply(shim) {
                Ok(()) => ControlReply::Done,
                Err(error) => failed(chain(&error)),
            }
        }
        // The two others have no single answer; they are taken where the connection is.
        Control::Status | Control::Watch | Control::Stop => ControlReply::Status(shim.status()),
    }
}

async fn ask_agent(shim: &Shim, ask: Ask) -> ControlReply {
    let Some(agent) = shim.agent() else {
        return failed("The guest's agent is not connected".into());
    };
    let (answer, answered) = oneshot::channel();
    let asked = async {
        agent.send(Asked { ask, answer }).await.ok()?;
        answered.await.ok()
    };
    match timeout(limits::ASK, asked).await {
        Ok(Some(answer)) => ControlReply::Answer { answer },
        Ok(None) => failed("The guest's agent was lost before its answer".into()),
        Err(_) => failed(format!("The guest's agent did not answer within {} s", limits::ASK.as_secs())),
    }
}

/// Sends the state now and after each change, until the client leaves. Changes that come fast share one reply.
async fn watch(shim: &Shim, stream: UnixStream) {
    let (mut reader, mut writer) = stream.into_split();
    let replies = async {
        let mut seen = shim.observed.subscribe();
        loop {
            seen.mark_unchanged();
            send_status(shim, &mut writer).await?;
            sleep(limits::WATCH_PAUSE).await;
            seen.changed().await.ok()?;
        }
    };
    let left = async {
        // Nothing more is expected here: either the client has left, or it does not know the protocol.
        let _ = reader.read(&mut [0]).await;
    };
    tokio::select! {
        None::<()> = replies => {}
        () = left => {}
        else => {}
    }
}

async fn send_status<W: AsyncWrite + Unpin>(shim: &Shim, writer: &mut W) -> Option<()> {
    message::send(writer, &ControlReply::Status(shim.status())).await.ok()
}
