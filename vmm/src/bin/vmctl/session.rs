//! Sessions: a ticket from `laird`, then straight to the VM's shim, so that a session outlives `laird`.

use crate::{Context, error::CommandError};
use lair_guest::wire::frame::{self, CHUNK, Kind};
use lair_vmm::{
    api::types::SessionRequest,
    error::chain,
    shim::{client, protocol::Session},
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite},
    net::UnixStream,
};

/// Opens a session.
pub(crate) async fn open(context: &Context, vm: &str, session: Session) -> Result<UnixStream, CommandError> {
    let reply = context.client.session(vm, &SessionRequest { session }).await?;
    client::open_session(&reply.socket, &reply.ticket)
        .await
        .map_err(|error| CommandError::failed(format!("VM {vm}: {}", chain(&error))))
}

/// Sends standard input as data until its end, which is a frame as well. It does not return: a connection that is closed, even by
/// half, says that this client is gone.
pub(crate) async fn send_input<W: AsyncWrite + Unpin>(mut to: W) {
    let mut input = tokio::io::stdin();
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = input.read(&mut chunk).await.unwrap_or(0);
        let sent = match chunk.get(..length) {
            Some([]) | None => frame::write(&mut to, Kind::Eof, &[]).await,
            Some(data) => frame::write(&mut to, Kind::Data, data).await,
        };
        if length == 0 || sent.is_err() {
            return std::future::pending().await;
        }
    }
}
