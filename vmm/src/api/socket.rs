//! The unix sockets of clients: taken one by one, and read so that no descriptor comes with the bytes.

use nix::sys::socket::{MsgFlags, recvmsg};
use std::{
    io::{self, IoSliceMut},
    os::fd::AsRawFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
    time::sleep,
};

/// What `accept` gives, or `None` after a pause where it cannot give anything, as for want of descriptors: without the pause it
/// would fail again at once, for ever.
pub(super) async fn accept<T>(accepted: impl Future<Output = io::Result<T>>, pause: Duration) -> Option<T> {
    match accepted.await {
        Ok(connection) => Some(connection),
        Err(error) => {
            tracing::debug!(%error, "cannot accept a connection");
            sleep(pause).await;
            None
        }
    }
}

/// A client's stream. It is received without room for descriptors (SCM_RIGHTS), so the kernel closes those that come and says so;
/// they are counted.
#[derive(Debug)]
pub(super) struct ClientStream {
    stream: UnixStream,
    surplus: Arc<AtomicU64>,
}

impl ClientStream {
    /// `surplus` counts messages that had descriptors with them.
    pub(super) fn new(stream: UnixStream, surplus: Arc<AtomicU64>) -> Self {
        Self { stream, surplus }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, None, flags)?;
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            self.surplus.fetch_add(1, Relaxed);
        }
        Ok(message.bytes)
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || self.receive(room)) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::{fs::File, io::IoSlice};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[tokio::test]
    async fn cl10_descriptors_that_come_unasked_are_closed_and_counted() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let surplus = Arc::new(AtomicU64::new(0));
        let mut server = ClientStream::new(server, surplus.clone());
        let file = File::open("/dev/null").unwrap();
        // Other tests of this process open and close descriptors too: many make a leak stand out.
        let before = open_fds();
        for _ in 0..20 {
            let fds = [file.as_raw_fd(); 253];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(b"GET")], &rights, MsgFlags::empty(), None)
                .unwrap();
            let mut bytes = [0; 3];
            server.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"GET");
        }
        assert!(open_fds() < before + 100, "{before} to {}", open_fds());
        client.write_all(b"plain").await.unwrap();
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert_eq!((rest.as_slice(), surplus.load(Relaxed)), (&b"plain"[..], 20));
    }

    #[tokio::test]
    async fn sv8_after_an_error_nothing_is_accepted_for_a_while() {
        let mut tries = 0;
        let trying = async {
            loop {
                tries += 1;
                let emfile = async { Err::<(), _>(io::Error::from_raw_os_error(24)) };
                assert_eq!(accept(emfile, Duration::from_secs(3600)).await, None);
            }
        };
        assert!(tokio::time::timeout(Duration::from_millis(50), trying).await.is_err());
        assert_eq!(tries, 1);
        assert_eq!(accept(async { Ok(7) }, Duration::MAX).await, Some(7));
    }
}
