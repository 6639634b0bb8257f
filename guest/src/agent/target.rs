//! What the agent dials inside the guest: a unix socket or a TCP address. No names are resolved.

use std::{fmt, io, net::SocketAddr, path::PathBuf, str::FromStr};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

/// A socket in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// The text is no target.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither the absolute path of a unix socket nor ADDRESS:PORT")]
pub(super) struct BadTarget(String);

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Self, BadTarget> {
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        text.parse().map(Self::Tcp).map_err(|_| BadTarget(text.to_string()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Either kind of connection.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Target {
    pub(super) async fn dial(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_paths_or_addresses() {
        assert_eq!("/run/x.sock".parse::<Target>().unwrap(), Target::Unix("/run/x.sock".into()));
        assert_eq!("[::1]:80".parse::<Target>().unwrap().to_string(), "[::1]:80");
        for bad in ["", "x.sock", "localhost:80", "127.0.0.1", "127.0.0.1:70000"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
