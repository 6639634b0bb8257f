//! The command line and the sockets of the program.

use crate::{fixture::Fixture, frontend::Program};
use nix::fcntl::{FcntlArg, fcntl};
use std::{
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::Path,
    process::{Command, Output},
};

pub(crate) fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lair-virtiofs")).args(args).env("COLUMNS", "100").output().unwrap()
}

/// The last line of standard error, without the time, and with the directory's name taken out.
pub(crate) fn complaint(output: &Output, dir: &Path) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let last = text.lines().last().unwrap_or_default();
    last.split_once("ERROR ").map_or(last, |(_, rest)| rest).replace(dir.to_str().unwrap(), "DIR")
}

#[test]
fn help() {
    let output = run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    insta::assert_snapshot!("help", String::from_utf8(output.stdout).unwrap());
    let output = run(&["index", "--help"]);
    assert_eq!(output.status.code(), Some(0));
    insta::assert_snapshot!("help_index", String::from_utf8(output.stdout).unwrap());
}

#[test]
fn wrong_usage() {
    for args in [
        &[][..],
        &["--socket", "s", "--fd", "3", "--source", "d", "--view", "v"],
        &["--source", "d", "--view", "v"],
        &["--socket", "s", "--view", "v"],
        &["--socket", "s", "--source", "d"],
        &["--socket", "s", "--source", "d", "--view", "v", "--sandbox=none"],
        &["--socket", "s", "--source", "d", "--view", "v", "--uid", "1000"],
        &["--socket", "s", "--source", "d", "--view", "v", "--gid", "1000"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn refuses_to_start_without_a_sound_view() {
    let fixture = Fixture::new();
    let dir = fixture.root();
    let (socket, store) = (dir.join("s"), fixture.store());
    let view = dir.join("other-view");
    let start = |source: &str, extra: &[&str]| {
        let args =
            ["--socket", socket.to_str().unwrap(), "--source", source, "--view", view.to_str().unwrap()];
        let output = run(&[&args[..], extra].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(!socket.exists(), "it listens");
        complaint(&output, dir)
    };
    let store = store.to_str().unwrap();
    insta::assert_snapshot!(start(store, &[]), @"Cannot read the view file DIR/other-view: No such file or directory (os error 2)");
    std::fs::write(&view, "").unwrap();
    insta::assert_snapshot!(start(store, &[]), @"Cannot use the view file DIR/other-view: It lists no store paths; a VM that may see nothing cannot run");
    std::fs::write(&view, "/nix/store/x\n").unwrap();
    insta::assert_snapshot!(start(store, &[]), @r#"Cannot use the view file DIR/other-view: Line 1 is no store path: "x" does not begin with 32 characters of Nix's base 32 and a hyphen"#);
    std::fs::write(&view, format!("/nix/store/{:032}-absent\n", 0)).unwrap();
    insta::assert_snapshot!(start(store, &[]), @r#"Cannot read the metadata of the view from ["DIR/store"]: /nix/store/00000000000000000000000000000000-absent is in none of the store directories"#);
    std::fs::copy(fixture.view_file(), &view).unwrap();
    insta::assert_snapshot!(start("/nowhere", &[]), @"Cannot open the store directory /nowhere: ENOENT: No such file or directory");
    insta::assert_snapshot!(start(store, &["--index", "/nowhere"]), @"Cannot open /nowhere: No such file or directory (os error 2)");
    insta::assert_snapshot!(start(store, &["--tag", &"t".repeat(37)]), @r#"The tag "ttttttttttttttttttttttttttttttttttttt" has 37 bytes; 1 to 36 bytes without NUL are allowed"#);
    insta::assert_snapshot!(start(store, &["--queues", "0"]), @"0 request queues are not possible; 1 to 31 are");
}

#[test]
fn replaces_a_stale_socket_only() {
    let fixture = Fixture::new();
    let socket = fixture.root().join("fs.sock");
    let start = || {
        let path = |p: &Path| p.to_str().unwrap().to_owned();
        let (view, store) = (fixture.view_file(), fixture.store());
        run(&["--socket", &path(&socket), "--source", &path(&store), "--view", &path(&view)])
    };
    std::fs::write(&socket, "precious").unwrap();
    let output = start();
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(complaint(&output, fixture.root()), @"Cannot listen at DIR/fs.sock: it is in use");
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
    std::fs::remove_file(&socket).unwrap();
    // A live one.
    let listener = UnixListener::bind(&socket).unwrap();
    assert_eq!(start().status.code(), Some(1));
    // One that nobody listens at.
    drop(listener);
    assert!(socket.exists());
    for _ in 0..2 {
        let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
        drop(crate::frontend::raw_connection(&socket));
        assert_eq!(program.terminate().0, Some(0));
        // It may not remove them any more.
        assert!(socket.exists() && fixture.root().join("control").exists());
    }
}

#[test]
fn serves_an_inherited_socket() {
    let fixture = Fixture::new();
    let socket = fixture.root().join("inherited.sock");
    let start = |fd: OwnedFd| {
        // In this process it may be number 7 itself, which then would be closed: only a copy stays open.
        let fd = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"));
        command.args(["--fd", "7", "--source"]).arg(fixture.store()).arg("--view").arg(fixture.view_file());
        // SAFETY: dup2 is safe to call between fork and exec. Descriptor 7 is this child's alone. The other one stays open in this process.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(move || {
                let copy = nix::unistd::dup2_raw(BorrowedFd::borrow_raw(fd), 7)?;
                std::mem::forget(copy);
                Ok(())
            });
        }
        let child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
        nix::unistd::close(fd).unwrap();
        child
    };
    // Not a socket; a socket that does not listen.
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for fd in [file, OwnedFd::from(one)] {
        let output = start(fd).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = complaint(&output, fixture.root());
        assert!(text.starts_with("Descriptor 7 is not "), "{text}");
    }
    // Non-blocking, as servers that use epoll make their sockets.
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert!(listener.as_raw_fd() > 2);
    let mut child = start(OwnedFd::from(listener));
    let mut guest = crate::frontend::Guest::new();
    for _ in 0..2 {
        guest.reset();
        let connection = crate::frontend::Connection::new(&socket, &guest);
        connection.init(&mut guest);
        crate::serve::check(&connection, &mut guest);
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(socket.exists(), "it removed a socket that it did not make");
}
