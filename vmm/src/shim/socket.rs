//! Unix sockets by path: listening with exact rights, connecting with a deadline.

use super::limits;
use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, PermissionsExt},
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
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
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
