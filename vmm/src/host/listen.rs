//! Listening sockets that `laird` makes for others, so that they need no right to make them.

use nix::unistd::{Gid, Uid, chown};
use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("Cannot make the socket {0}")]
pub struct ListenError(PathBuf, #[source] io::Error);

/// Makes a listening socket at `path` with these rights, of this user and group. One that is there is replaced; anything else is left
/// there, and an error.
pub fn listen(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<UnixListener, ListenError> {
    let failed = |error| ListenError(path.into(), error);
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path).map_err(failed)?;
    }
    // With laird's umask nobody but its user can connect until the rights are as they should be.
    let listener = UnixListener::bind(path).map_err(failed)?;
    if let Some((uid, gid)) = owner {
        chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|errno| failed(errno.into()))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{fs::MetadataExt, net::UnixStream};

    #[test]
    fn a_socket_has_its_rights_and_replaces_sockets_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(listen(&path, 0o600, None).unwrap());
        let _listener = listen(&path, 0o660, None).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let file = directory.path().join("precious");
        fs::write(&file, "data").unwrap();
        assert!(listen(&file, 0o660, None).unwrap_err().to_string().contains("precious"));
        assert_eq!(fs::read(&file).unwrap(), b"data");
    }

    #[test]
    fn a_socket_belongs_to_who_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return println!("SKIPPED: only root gives sockets away");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _listener = listen(&path, 0o660, Some((0, 70_000))).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (0, 70_000));
    }
}
