//! Unix sockets by path: listening with exact rights, connecting with a deadline.

use super::limits;
use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag, fstat},
    unistd::geteuid,
};
use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::{UnixListener, UnixStream};

/// The longest path that fits into a socket address: 108 bytes with the NUL after it (unix(7)).
pub const LONGEST_PATH: usize = 107;

/// Why a socket was not made or not reached.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into an address.
    #[error("Socket path {path} has {length} bytes, the limit is {LONGEST_PATH}")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// A live process listens there.
    #[error("A running process listens on {path} already")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else than a socket is in the way, and is left there.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused to listen.
    #[error("Cannot listen on {path}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another user listens there.
    #[error("User {uid} listens on {path}, whose directory is user {owner}'s")]
    Stranger {
        /// The path.
        path: PathBuf,
        /// Who listens.
        uid: u32,
        /// Who should.
        owner: u32,
    },
    /// Nothing answers at the path.
    #[error("Cannot connect to {path}")]
    Connect {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn check_length(path: &Path) -> Result<(), SocketError> {
    let length = path.as_os_str().as_bytes().len();
    if length > LONGEST_PATH {
        return Err(SocketError::TooLong { path: path.into(), length });
    }
    Ok(())
}

/// Listens at `path` with the rights `mode`. A socket file that a dead process left there is replaced.
///
/// The process's umask must keep others out: between the bind and the change of rights it is all there is.
pub(super) fn listen(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    check_length(path)?;
    let failed = |source| SocketError::Listen { path: path.into(), source };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(failed)?;
    set_mode(path, mode).map_err(failed)?;
    Ok(listener)
}

/// Gives a socket of ours its rights, and nothing else that may lie there by now: the directory may be another user's.
fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    let file = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let found = fstat(&file)?;
    if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFSOCK.bits() || found.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("another file was put in its place"));
    }
    // A descriptor that is only a place has no rights to change by itself.
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(opened, fs::Permissions::from_mode(mode))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen { path: path.into(), source };
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.into() });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Ok(_) => Err(SocketError::InUse { path: path.into() }),
        Err(source) => Err(failed(source)),
    }
}

/// Connects to the socket at `path`.
pub(super) async fn connect(path: &Path, limit: Duration) -> Result<UnixStream, SocketError> {
    check_length(path)?;
    let failed = |source| SocketError::Connect { path: path.into(), source };
    tokio::time::timeout(limit, UnixStream::connect(path))
        .await
        .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
        .map_err(failed)
}

/// Connects to the socket at `path`, which lies in a directory of the process that is to listen there. Whoever has taken that process over
/// can put a link to another VM's socket in its place, but not make another process its own.
pub(super) async fn connect_to_owner(path: &Path, limit: Duration) -> Result<UnixStream, SocketError> {
    let stream = connect(path, limit).await?;
    let failed = |source| SocketError::Connect { path: path.into(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let owner = fs::symlink_metadata(directory).map_err(failed)?.uid();
    let uid = stream.peer_cred().map_err(failed)?.uid();
    if uid == owner { Ok(stream) } else { Err(SocketError::Stranger { path: path.into(), uid, owner }) }
}

/// The next connection. Where none can be taken, for want of descriptors most likely, it waits and tries again.
pub(super) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(_) => tokio::time::sleep(limits::ACCEPT_PAUSE).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path, 0o600).unwrap();
        assert!(matches!(listen(&path, 0o600), Err(SocketError::InUse { .. })));
        drop(first);
        let _second = listen(&path, 0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        connect(&path, Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_link_in_the_place_of_a_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (precious, link) = (dir.path().join("precious"), dir.path().join("link"));
        fs::write(&precious, "data").unwrap();
        fs::set_permissions(&precious, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        assert!(set_mode(&link, 0o666).is_err() && set_mode(&precious, 0o666).is_err());
        assert_eq!(fs::metadata(&precious).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_socket_of_another_user_than_its_directorys_is_not_spoken_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = listen(&path, 0o600).unwrap();
        connect_to_owner(&path, Duration::from_secs(5)).await.unwrap();
        if !geteuid().is_root() {
            return println!("SKIPPED: only root can give a directory away");
        }
        std::os::unix::fs::chown(dir.path(), Some(64_998), None).unwrap();
        let outcome = connect_to_owner(&path, Duration::from_secs(5)).await;
        assert!(matches!(outcome, Err(SocketError::Stranger { uid: 0, owner: 64_998, .. })), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_file_in_the_way_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(listen(&path, 0o600), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_path_that_does_not_fit_is_named_with_the_limit() {
        let path = PathBuf::from(format!("/{}", "x".repeat(LONGEST_PATH)));
        let listening = listen(&path, 0o600).unwrap_err().to_string();
        assert!(listening.contains("108 bytes, the limit is 107"), "{listening}");
        assert!(matches!(connect(&path, Duration::from_secs(1)).await, Err(SocketError::TooLong { .. })));
    }
}
