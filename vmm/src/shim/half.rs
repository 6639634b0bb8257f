//! One direction of a unix stream by reference, so that the stream itself can be asked at the same time whether its peer
//! is still there.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

/// Waits until the peer has closed the stream, or its half of it. What it sent before may not be read yet.
pub(super) async fn left(stream: &UnixStream) {
    // Readiness of this kind is that of a closed reading side, apart from urgent data, which unix streams do not have. An error
    // says as much.
    let _ = stream.ready(Interest::PRIORITY).await;
}

/// What is read from the stream. There may be one of these at a time: the stream wakes one reader.
pub(super) struct Reader<'a>(pub(super) &'a UnixStream);

/// What is written to the stream. One at a time, likewise.
pub(super) struct Writer<'a>(pub(super) &'a UnixStream);

impl AsyncRead for Reader<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|read| buffer.advance(read))),
            }
        }
    }
}

impl AsyncWrite for Writer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A stream is closed with both directions, by its owner.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_peer_that_leaves_is_noticed_with_its_bytes_unread() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"last words").await.unwrap();
        let (mut reader, mut writer) = (Reader(&near), Writer(&near));
        writer.write_all(b"hello").await.unwrap();
        assert!(timeout(Duration::from_millis(100), left(&near)).await.is_err(), "It is still there");
        let mut hello = [0; 5];
        far.read_exact(&mut hello).await.unwrap();
        drop(far);
        timeout(LIMIT, left(&near)).await.unwrap();
        let mut words = String::new();
        timeout(LIMIT, reader.read_to_string(&mut words)).await.unwrap().unwrap();
        assert_eq!((&hello, words.as_str()), (b"hello", "last words"));
    }
}
