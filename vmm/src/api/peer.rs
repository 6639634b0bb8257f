//! Who is at the other end of a unix socket, as the kernel says: no peer can claim it.

#![allow(unsafe_code)] // SO_PEERGROUPS has no safe wrapper in nix or rustix.

use nix::libc;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// The most groups of a process (NGROUPS_MAX in limits.h).
const GROUPS_MAX: usize = 65_536;

/// The credentials with which a peer connected. Its process id is not among them: it may be another's by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
}

impl Peer {
    /// The peer of a connected socket.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let socket = socket.as_fd();
        let credentials = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)?;
        Ok(Self { uid: credentials.uid(), gid: credentials.gid(), groups: groups(socket)? })
    }

    /// Whether it is in a group.
    pub fn is_in(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; 32];
    loop {
        let room = groups.len().saturating_mul(size_of::<u32>());
        let mut length = libc::socklen_t::try_from(room).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: the buffer has `length` bytes, and any bytes are a u32.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let error = io::Error::last_os_error();
        let count = usize::try_from(length).unwrap_or(usize::MAX) / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        // The kernel says then how many bytes it takes.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > GROUPS_MAX {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{getegid, geteuid, getgroups};
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!((peer.uid, peer.gid), (geteuid().as_raw(), getegid().as_raw()));
        let mut mine: Vec<u32> = getgroups().unwrap().into_iter().map(|gid| gid.as_raw()).collect();
        let mut told = peer.groups.clone();
        mine.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, mine);
        assert!(peer.is_in(peer.gid));
    }
}
