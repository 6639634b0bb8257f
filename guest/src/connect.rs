//! `lair-guest connect LINK`: standard input and output as a link's connection, for ssh's `ProxyCommand`.

use crate::paths::LINKS;
use lair_guest::wire::frame::CHUNK;
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("There is no link `{link}`; the links of this VM are: {known}")]
    NoSuchLink { link: String, known: String },
    #[error("Could not connect to the link `{link}`")]
    Connect {
        link: String,
        #[source]
        source: io::Error,
    },
    #[error("The connection over the link `{link}` failed")]
    Copy {
        link: String,
        #[source]
        source: io::Error,
    },
}

/// Relays until the other end closes its direction.
pub(crate) fn run(link: &str) -> Result<(), ConnectError> {
    let standard = |fd: io::Result<OwnedFd>| fd.map(File::from).map_err(failed(link));
    let stdin = standard(io::stdin().as_fd().try_clone_to_owned())?;
    let stdout = standard(io::stdout().as_fd().try_clone_to_owned())?;
    relay(Path::new(LINKS), link, stdin, stdout)
}

fn failed(link: &str) -> impl Fn(io::Error) -> ConnectError {
    move |source| ConnectError::Copy { link: link.to_string(), source }
}

fn relay(
    folder: &Path,
    link: &str,
    mut input: impl Read + Send + 'static,
    mut output: impl Write,
) -> Result<(), ConnectError> {
    let mut stream = open(folder, link)?;
    let mut to_link = stream.try_clone().map_err(failed(link))?;
    // It may wait for input for ever: the process ends without it.
    thread::spawn(move || {
        let _ = copy(&mut input, &mut to_link);
        let _ = to_link.shutdown(Shutdown::Write);
    });
    match copy(&mut stream, &mut output) {
        // Whoever reads our output has had enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(failed(link)),
    }
}

/// Copies until the end, and flushes each piece.
///
/// Not `std::io::copy`: between a socket and a pipe that is splice(2), which holds the pipe's lock while it waits for the socket
/// (seen with 6.12), so that whoever reads the pipe cannot take what is in it already. ssh hangs in its key exchange.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                to.write_all(buffer.get(..length).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn open(folder: &Path, link: &str) -> Result<UnixStream, ConnectError> {
    let no_such = || ConnectError::NoSuchLink { link: link.to_string(), known: known(folder) };
    if link.is_empty() || link.contains('/') {
        return Err(no_such());
    }
    UnixStream::connect(folder.join(link)).map_err(|source| match source.kind() {
        ErrorKind::NotFound => no_such(),
        _ => ConnectError::Connect { link: link.to_string(), source },
    })
}

/// The links that there are, in words.
fn known(folder: &Path) -> String {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn bytes_pass_and_the_other_ends_close_is_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("ssh")).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = String::new();
            stream.read_to_string(&mut got).unwrap();
            stream.write_all(format!("got {got}").as_bytes()).unwrap();
        });
        let mut output = Vec::new();
        relay(dir.path(), "ssh", &b"hello"[..], &mut output).unwrap();
        assert_eq!(output, b"got hello");
        server.join().unwrap();
    }

    #[test]
    fn input_that_never_ends_does_not_hold_the_end_back() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("ssh")).unwrap();
        let (endless, _keep) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || drop(listener.accept().unwrap()));
        relay(dir.path(), "ssh", endless, Vec::new()).unwrap();
        server.join().unwrap();
    }

    #[test]
    fn a_missing_link_is_named_with_those_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let message = |link| relay(dir.path(), link, io::empty(), Vec::new()).unwrap_err().to_string();
        assert_eq!(message("ssh"), "There is no link `ssh`; the links of this VM are: none");
        let _listeners =
            ["store", "queue-runner"].map(|name| UnixListener::bind(dir.path().join(name)).unwrap());
        assert_eq!(message("ssh"), "There is no link `ssh`; the links of this VM are: queue-runner, store");
        assert_eq!(message("../x"), "There is no link `../x`; the links of this VM are: queue-runner, store");
    }
}
