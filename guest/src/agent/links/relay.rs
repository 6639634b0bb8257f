//! Carries one connection between a stream of bytes in the guest and a stream of frames to the host.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use lair_guest::wire::frame::{self, CHUNK, FrameError, Kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Relays until both directions have ended, or one has failed. A direction that ends leaves the other open.
pub(super) async fn relay<P, F>(plain: P, framed: F) -> Result<(), FrameError>
where
    P: AsyncRead + AsyncWrite,
    F: AsyncRead + AsyncWrite,
{
    let (mut from_plain, mut to_plain) = tokio::io::split(plain);
    let (mut from_framed, mut to_framed) = tokio::io::split(framed);
    let out = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = from_plain.read(&mut buffer).await?;
            if n == 0 {
                return frame::write(&mut to_framed, Kind::Eof, &[]).await;
            }
            frame::write(&mut to_framed, Kind::Data, buffer.get(..n).unwrap_or_default()).await?;
        }
    };
    let into = async {
        let mut payload = Vec::new();
        loop {
            match frame::read(&mut from_framed, &mut payload).await? {
                Some(Kind::Data) => to_plain.write_all(&payload).await?,
                // A peer that has closed both directions already needs no such word.
                Some(Kind::Eof) => {
                    let _ = to_plain.shutdown().await;
                    return Ok(());
                }
                Some(got) => return Err(FrameError::Unexpected { expected: Kind::Data, got }),
                None => return Err(FrameError::Closed),
            }
        }
    };
    tokio::try_join!(out, into).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::{io::DuplexStream, task::JoinHandle, time::timeout};

    fn start() -> (DuplexStream, DuplexStream, JoinHandle<Result<(), FrameError>>) {
        let (client, plain) = tokio::io::duplex(1 << 12);
        let (host, framed) = tokio::io::duplex(1 << 12);
        (client, host, tokio::spawn(relay(plain, framed)))
    }

    #[tokio::test]
    async fn half_close_passes_in_both_directions() {
        let (mut client, mut host, task) = start();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut payload = Vec::new();
        assert_eq!(frame::read(&mut host, &mut payload).await.unwrap(), Some(Kind::Data));
        assert_eq!(payload, b"question");
        assert_eq!(frame::read(&mut host, &mut payload).await.unwrap(), Some(Kind::Eof));

        frame::write(&mut host, Kind::Data, b"answer").await.unwrap();
        frame::write(&mut host, Kind::Eof, b"").await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_host_that_goes_ends_the_clients_connection() {
        let (mut client, host, task) = start();
        drop(host);
        assert!(task.await.unwrap().is_err());
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn vs4_a_frame_that_is_no_data_ends_the_connection() {
        for bytes in [
            &b"\0\x02\0\0\0{}"[..],
            b"\x02\x01\0\0\0x",
            b"\x09\0\0\0\0",
            b"\x01\xff\xff\xff\xff",
            b"\x01\x05\0\0\0x",
        ] {
            let (mut client, mut host, task) = start();
            host.write_all(bytes).await.unwrap();
            host.shutdown().await.unwrap();
            assert!(timeout(Duration::from_secs(5), task).await.unwrap().unwrap().is_err(), "{bytes:?}");
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn vs6_one_byte_frames_pass() {
        let (mut client, mut host, _task) = start();
        let sender = tokio::spawn(async move {
            for _ in 0..10_000 {
                frame::write(&mut host, Kind::Data, b"x").await.unwrap();
            }
            frame::write(&mut host, Kind::Data, b"").await.unwrap();
            frame::write(&mut host, Kind::Eof, b"").await.unwrap();
            host
        });
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), 10_000);
        drop(sender.await.unwrap());
    }

    #[tokio::test]
    async fn vs8_a_client_that_does_not_read_stops_the_host() {
        let (_client, mut host, _task) = start();
        let flood = async {
            for _ in 0..1000 {
                frame::write(&mut host, Kind::Data, &[0; CHUNK]).await.unwrap();
            }
        };
        assert!(timeout(Duration::from_millis(300), flood).await.is_err(), "no back-pressure");
    }
}
