//! The sockets that this program makes. They stay when it ends, since by then it may not remove anything; the next start replaces
//! them.

use anyhow::{Context, Result, bail};
use std::{
    io,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

/// Listens at `path`. A socket that nobody listens at any more is replaced; anything else there is left alone.
pub(crate) fn bind(path: &Path) -> Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            let refused = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !is_socket || !refused {
                bail!("Cannot listen at {}: it is in use", path.display());
            }
            std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        result => result,
    };
    listener.with_context(|| format!("Cannot listen at {}", path.display()))
}
