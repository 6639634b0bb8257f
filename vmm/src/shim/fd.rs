//! A message with a descriptor (SCM_RIGHTS): how another VM's shim gets the connection that this one dialled.

#![allow(unsafe_code)] // Descriptors come out of recvmsg as bare numbers; here they get their owner.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::limits;
use lair_guest::wire::frame::{self, FrameError, HEADER, Kind};
use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::{
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
        stat::{SFlag, fstat},
    },
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
};

/// Why a pipe that was handed over cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PipeError {
    /// Standard input, output and error are not for this.
    #[error("Descriptor {0} is a standard stream; 3 and above can be handed over")]
    Standard(RawFd),
    /// It is something else, or not open.
    #[error("Descriptor {0} is not the reading end of a pipe")]
    NotAPipe(RawFd),
    /// It was named before.
    #[error("Descriptor {0} was handed over twice")]
    Twice(RawFd),
}

/// Takes over the reading ends of pipes that the parent process left open under these numbers. Once in a process, before anything else
/// is opened.
pub(super) fn inherited_pipes(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, PipeError> {
    for (index, number) in numbers.iter().enumerate() {
        if *number < 3 {
            return Err(PipeError::Standard(*number));
        }
        if numbers.iter().take(index).any(|other| other == number) {
            return Err(PipeError::Twice(*number));
        }
        // SAFETY: A number that is not open is an error to these calls, and nothing closes it meanwhile.
        let borrowed = unsafe { BorrowedFd::borrow_raw(*number) };
        let not_a_pipe = |_| PipeError::NotAPipe(*number);
        let kind =
            SFlag::from_bits_truncate(fstat(borrowed).map_err(not_a_pipe)?.st_mode & SFlag::S_IFMT.bits());
        let flags = fcntl(borrowed, FcntlArg::F_GETFL).map_err(not_a_pipe)?;
        if kind != SFlag::S_IFIFO || flags & OFlag::O_ACCMODE.bits() != OFlag::O_RDONLY.bits() {
            return Err(PipeError::NotAPipe(*number));
        }
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(not_a_pipe)?;
    }
    // SAFETY: Each is open, as was just seen, the parent left it to this process by number, and it is taken once.
    Ok(numbers.iter().map(|number| unsafe { OwnedFd::from_raw_fd(*number) }).collect())
}

/// The most descriptors in one message (unix(7)).
const SCM_MAX_FD: usize = 253;

/// Sends one message and, with it, a descriptor if there is one.
pub(super) async fn send<T: Serialize>(
    to: &mut UnixStream,
    message: &T,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), FrameError> {
    let payload = serde_json::to_vec(message).map_err(FrameError::Malformed)?;
    let mut bytes = frame::header(Kind::Message, payload.len())?.to_vec();
    bytes.extend_from_slice(&payload);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let sent = to
        .async_io(Interest::WRITABLE, || {
            let parts = [IoSlice::new(&bytes)];
            Ok(sendmsg::<()>(to.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?)
        })
        .await?;
    // The descriptor went with the first byte. What is left is plain bytes.
    to.write_all(bytes.get(sent..).unwrap_or_default()).await?;
    Ok(())
}

/// Receives one message of at most [`limits::HANDSHAKE_BYTES`], and the first descriptor that came with it. Every
/// other one is closed.
pub(super) async fn receive<T: DeserializeOwned>(
    from: &UnixStream,
) -> Result<(T, Option<OwnedFd>), FrameError> {
    let mut first = None;
    let mut head = [0; HEADER];
    read_exact(from, &mut head, &mut first).await?;
    let (kind, length) = frame::parse_header(head)?;
    if kind != Kind::Message {
        return Err(FrameError::Unexpected { expected: Kind::Message, got: kind });
    }
    if length > limits::HANDSHAKE_BYTES {
        return Err(FrameError::TooLong(u64::try_from(length).unwrap_or(u64::MAX)));
    }
    let mut payload = vec![0; length];
    read_exact(from, &mut payload, &mut first).await?;
    Ok((frame::parse_message(&payload)?, first))
}

async fn read_exact(
    from: &UnixStream,
    mut buffer: &mut [u8],
    first: &mut Option<OwnedFd>,
) -> Result<(), FrameError> {
    while !buffer.is_empty() {
        let (read, fds) = from.async_io(Interest::READABLE, || read_some(from, buffer)).await?;
        if first.is_none() {
            *first = fds.into_iter().next();
        }
        if read == 0 {
            return Err(FrameError::Closed);
        }
        buffer = buffer.get_mut(read..).unwrap_or_default();
    }
    Ok(())
}

fn read_some(from: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    // Room for all that one message can carry: of a truncated one, nix does not tell the descriptors that did come,
    // and they would stay open for ever.
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; SCM_MAX_FD]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: recvmsg has just made these descriptors for this process, and nothing else knows them.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::fd::AsFd};
    use tokio::io::AsyncReadExt;

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[tokio::test]
    async fn a_descriptor_travels_with_its_message() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let (mine, theirs) = UnixStream::pair().unwrap();
        send(&mut a, &"with", Some(theirs.as_fd())).await.unwrap();
        send(&mut a, &"without", None).await.unwrap();
        drop(theirs);
        let (text, fd) = receive::<String>(&b).await.unwrap();
        assert_eq!(text, "with");
        let stream = std::os::unix::net::UnixStream::from(fd.unwrap());
        let mut stream = UnixStream::from_std(stream).unwrap();
        stream.write_all(b"x").await.unwrap();
        let mut mine = mine;
        assert_eq!(mine.read_u8().await.unwrap(), b'x');
        let (text, fd) = receive::<String>(&b).await.unwrap();
        assert_eq!(text, "without");
        assert!(fd.is_none());
    }

    #[tokio::test]
    async fn cl10_surplus_descriptors_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let payload = frame::header(Kind::Message, 2).unwrap();
        // Other tests of this process open and close descriptors too: many rounds make a leak stand out.
        let before = open_fds();
        for _ in 0..20 {
            let fds = [file.as_raw_fd(); SCM_MAX_FD];
            let rights = [ControlMessage::ScmRights(&fds)];
            let parts = [IoSlice::new(&payload), IoSlice::new(b"\"\"")];
            sendmsg::<()>(a.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
            let (_, fd) = receive::<String>(&b).await.unwrap();
            assert!(fd.is_some());
        }
        assert!(open_fds() < before + 100, "{before} to {}", open_fds());
    }

    #[tokio::test]
    async fn vs4_a_long_message_is_refused_from_its_header() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[0, 0, 0, 1, 0]).await.unwrap();
        assert!(matches!(receive::<String>(&b).await, Err(FrameError::TooLong(65536))));
    }
}
