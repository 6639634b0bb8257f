//! Leaves a connection so that the other side learns of it.
//!
//! A unix socket that is closed with unread bytes in it resets its peer. vhost-device-vsock passes a clean end on to the guest, and
//! a reset not at all: what was connected there would never hear that the host has gone, and a command would live on.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::limits;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink},
    net::UnixStream,
    time::timeout,
};

/// Leaves a connection: see [`leave_halves`].
pub(super) async fn leave(mut stream: UnixStream) {
    let (mut reader, mut writer) = stream.split();
    leave_halves(&mut reader, &mut writer).await;
}

/// Says that nothing more comes, then reads and drops what the other side still sends, until it closes as well; for
/// [`limits::PARTING`] at most. The caller closes after that.
pub(super) async fn leave_halves<R, W>(reader: &mut R, writer: &mut W)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    // One that has gone already, in whatever way, needs no telling.
    let _ = writer.shutdown().await;
    let _ = timeout(limits::PARTING, copy(reader, &mut sink())).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_side_that_floods_sees_a_clean_end() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut from_near, mut to_near) = far.into_split();
        let flood = tokio::spawn(async move { while to_near.write_all(&[b'y'; 4096]).await.is_ok() {} });
        // Until there is something unread.
        near.readable().await.unwrap();
        let leaving = tokio::spawn(leave(near));
        let mut rest = Vec::new();
        timeout(LIMIT, from_near.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert_eq!(rest, b"");
        flood.abort();
        let _ = flood.await;
        timeout(LIMIT, leaving).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_side_that_neither_reads_nor_closes_is_left_all_the_same() {
        let (near, far) = UnixStream::pair().unwrap();
        timeout(LIMIT, leave(near)).await.unwrap();
        drop(far);
    }
}
