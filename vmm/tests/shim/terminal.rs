//! `vmctl` on a terminal, through a real shim, to an agent that the test plays.

use crate::{
    laird::{HOSTILE, Laird},
    operator::{Operator, without_terminal},
    support::*,
};
use lair_guest::wire::{
    frame::{self, Kind},
    message::{Exec, ExecEvent, ExecInput, HostOpen, TerminalSize},
};
use lair_vmm::shim::client;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{process::Stdio, sync::atomic::Ordering::Relaxed};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
};

struct Scene {
    host: Host,
    shim: Shim,
    guest: Guest,
    laird: Laird,
}

async fn scene() -> Scene {
    let host = Host::new();
    let (shim, guest) = host.start_ready(host.config("builder")).await;
    let laird = Laird::start(&host, &shim);
    Scene { host, shim, guest, laird }
}

impl Scene {
    /// The agent's end of the session that `vmctl` opens now, with the command started on a terminal.
    async fn started(&mut self) -> (Exec, UnixStream) {
        let (open, mut agent) = self.guest.agent_connection().await;
        let HostOpen::Exec(exec) = open else { panic!("Not a command") };
        let started = ExecEvent::Started { pid: 42, terminal: exec.terminal.is_some() };
        within(frame::write_message(&mut agent, &started)).await.unwrap();
        (exec, agent)
    }

    async fn shell(&mut self) -> (Operator, UnixStream) {
        let operator = Operator::run(&self.laird.socket, &["shell", "builder"]);
        let (exec, agent) = self.started().await;
        assert!(exec.is_shell());
        operator.becomes_raw().await;
        (operator, agent)
    }
}

async fn show(agent: &mut UnixStream, text: &str) {
    within(frame::write(agent, Kind::Stdout, text.as_bytes())).await.unwrap();
}

async fn exits(agent: &mut UnixStream, status: i32) {
    within(frame::write_message(agent, &ExecEvent::Exited { status })).await.unwrap();
}

#[tokio::test]
async fn a_shell_has_the_operators_terminal() {
    let mut scene = scene().await;
    let mut operator = Operator::run(&scene.laird.socket, &["shell", "builder"]);
    let (exec, mut agent) = scene.started().await;
    let terminal = exec.terminal.unwrap();
    assert_eq!((terminal.term.as_str(), terminal.size), ("xterm", TerminalSize { rows: 24, columns: 80 }));
    operator.becomes_raw().await;
    // Raw both ways: nothing is echoed, no line end is changed, and Ctrl-C is a byte.
    show(&mut agent, "one\ntwo\x1b[1m$ ").await;
    operator.sees("one\ntwo\x1b[1m$ ").await;
    operator.types("ls\r\x03");
    expect(&mut agent, b"ls\r\x03").await;
    assert_eq!(operator.seen(), "one\ntwo\x1b[1m$ ");
    operator.resize(50, 132);
    let resized: ExecInput = within(frame::read_message(&mut agent)).await.unwrap();
    assert_eq!(resized, ExecInput::Resize(TerminalSize { rows: 50, columns: 132 }));
    operator.types("\r~?~~.");
    operator.sees("~. leaves").await;
    expect(&mut agent, b"\r~.").await;
    exits(&mut agent, 7).await;
    assert_eq!(operator.status().await, Some(7));
    assert_eq!(scene.shim.audit(1).await[0]["status"], 7);
}

#[tokio::test]
async fn the_escape_ends_a_session_also_where_the_guest_takes_nothing() {
    let mut scene = scene().await;
    let (mut operator, mut agent) = scene.shell().await;
    operator.types("sleep\r~.");
    assert_eq!(operator.status().await, Some(125));
    operator.sees("vmctl: left VM builder").await;
    expect(&mut agent, b"sleep\r").await;
    assert_closed(&mut agent).await;

    let (mut operator, _agent) = scene.shell().await;
    let flood = format!("{}\r", "x".repeat(1023));
    // More than the sockets on the way hold.
    for _ in 0..700 {
        operator.types(&flood);
    }
    operator.types("\r~.");
    assert_eq!(operator.status().await, Some(125));
}

#[tokio::test]
async fn signals_and_lost_output_leave_the_terminal_as_it_was() {
    let mut scene = scene().await;
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129), (Signal::SIGINT, 130)] {
        let (mut operator, mut agent) = scene.shell().await;
        let pid = i32::try_from(operator.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
        assert_eq!(operator.status().await, Some(status));
        assert_closed(&mut agent).await;
    }
    // `vmctl shell VM | head -1`
    let mut operator = Operator::run_with(&scene.laird.socket, &["shell", "builder"], |vmctl| {
        vmctl.stdout(Stdio::piped());
    });
    let (_, mut agent) = scene.started().await;
    operator.becomes_raw().await;
    drop(operator.child.stdout.take());
    // Again and again: a child that another test is about to start may hold the other end of the pipe for a moment.
    until(async || {
        let _ = frame::write(&mut agent, Kind::Stdout, b"text").await;
        operator.child.try_wait().unwrap()
    })
    .await;
    assert_eq!(operator.status().await, Some(125));
}

#[tokio::test]
async fn a_terminal_that_hangs_up_ends_the_session() {
    let mut scene = scene().await;
    let (mut operator, mut agent) = scene.shell().await;
    operator.hang_up();
    let status = within(operator.child.wait()).await.unwrap();
    assert!(matches!(status.code(), Some(125 | 129)), "{status}");
    assert_closed(&mut agent).await;
}

#[tokio::test]
async fn vs8_a_terminal_that_takes_nothing_holds_the_guest_and_can_be_left() {
    let mut scene = scene().await;
    let mut operator = Operator::run_with(&scene.laird.socket, &["shell", "builder"], |vmctl| {
        vmctl.stdout(Stdio::piped());
    });
    let (_, mut agent) = scene.started().await;
    operator.becomes_raw().await;
    let before = scene.shim.resident_kib();
    let yes = async {
        let block = "y\n".repeat(1 << 19);
        loop {
            show(&mut agent, &block).await;
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_secs(2), yes).await.is_err());
    assert!(scene.shim.resident_kib() < before + 6144, "{before} to {} KiB", scene.shim.resident_kib());
    operator.types("~.");
    assert_eq!(operator.status().await, Some(125));
    assert_closed(&mut agent).await;
}

#[tokio::test]
async fn a_session_lives_while_nothing_of_laird_runs() {
    let mut scene = scene().await;
    let (mut operator, mut agent) = scene.shell().await;
    drop(scene.laird);
    operator.types("still");
    expect(&mut agent, b"still").await;
    show(&mut agent, "here").await;
    operator.sees("here").await;
    scene.laird = Laird::start(&scene.host, &scene.shim);
    // The new one is used by a new session, and the old session goes on beside it.
    let (status, _, _) = {
        let run = without_terminal(&scene.laird.socket, &["exec", "builder", "--", "true"]);
        let agent = async {
            let (open, mut agent) = scene.guest.agent_connection().await;
            assert!(matches!(open, HostOpen::Exec(_)));
            exits(&mut agent, 3).await;
        };
        tokio::join!(run, agent).0
    };
    assert_eq!(status, Some(3));
    exits(&mut agent, 0).await;
    assert_eq!(operator.status().await, Some(0));
}

#[tokio::test]
async fn a_session_that_is_cut_off_is_125_with_the_reason() {
    let mut scene = scene().await;
    let (mut operator, agent) = scene.shell().await;
    drop(agent);
    assert_eq!(operator.status().await, Some(125));
    operator.sees("vmctl: VM builder: The agent closed before the end of the command\r\n").await;

    let (mut operator, _agent) = scene.shell().await;
    within(client::stop(scene.shim.control())).await.unwrap();
    assert_eq!(operator.status().await, Some(125));
    operator.sees("vmctl: VM builder: The shim was stopped\r\n").await;
}

#[tokio::test]
async fn a_shim_that_is_killed_leaves_the_terminal_as_it_was() {
    let mut scene = scene().await;
    let (mut operator, _agent) = scene.shell().await;
    scene.shim.child.kill().await.unwrap();
    assert_eq!(operator.status().await, Some(125));
}

#[tokio::test]
async fn vs7_an_agent_without_terminals_is_told_apart() {
    let mut scene = scene().await;
    let mut operator = Operator::run(&scene.laird.socket, &["exec", "-t", "builder", "--", "vi"]);
    let (open, mut agent) = scene.guest.agent_connection().await;
    assert!(matches!(open, HostOpen::Exec(exec) if exec.command == ["vi"] && exec.terminal.is_some()));
    frame::write(&mut agent, Kind::Message, br#"{"exec":"started","pid":1}"#).await.unwrap();
    assert_eq!(operator.status().await, Some(125));
    operator.sees("of a release without terminals").await;
    assert_closed(&mut agent).await;
}

#[tokio::test]
async fn without_a_terminal_there_is_no_shell_and_exec_keeps_its_streams_apart() {
    let mut scene = scene().await;
    let socket = scene.laird.socket.clone();
    for (arguments, expected) in [
        (&["shell", "builder"][..], 125),
        (&["exec", "-t", "builder", "--", "vi"], 125),
        (&["console", "builder"], 1),
    ] {
        let (status, out, error) = without_terminal(&socket, arguments).await;
        assert_eq!((status, out.as_str()), (Some(expected), ""));
        assert!(error.starts_with("vmctl: Standard input is not a terminal; `vmctl "), "{error}");
    }
    assert_eq!(scene.laird.asked.load(Relaxed), 0);
    let run = without_terminal(&socket, &["exec", "builder", "--", "make"]);
    let agent = async {
        let (exec, mut agent) = scene.started().await;
        assert_eq!(exec.terminal, None);
        show(&mut agent, "out").await;
        frame::write(&mut agent, Kind::Stderr, b"err").await.unwrap();
        frame::write_message(&mut agent, &ExecEvent::Killed { signal: 9 }).await.unwrap();
    };
    let (said, ()) = tokio::join!(run, agent);
    assert_eq!(said, (Some(137), "out".into(), "err".into()));
}

#[tokio::test]
async fn the_console_is_shown_as_it_is_and_typed_on() {
    let scene = scene().await;
    let listener = UnixListener::bind(&scene.shim.config.console).unwrap();
    let (mut hypervisor, _) = within(listener.accept()).await.unwrap();
    hypervisor.write_all(b"booted\r\n\x1b[32mlogin: ").await.unwrap();
    until(async || (scene.shim.status().await.console_bytes == 20).then_some(())).await;
    let mut first = Operator::run(&scene.laird.socket, &["console", "builder"]);
    first
        .sees("[console of VM builder; ~. at the beginning of a line leaves]\r\nbooted\r\n\x1b[32mlogin: ")
        .await;
    assert!(first.is_raw());
    let mut second = Operator::run(&scene.laird.socket, &["console", "builder"]);
    second.sees("read only: a session of uid 1000 types;").await;
    let mut third = Operator::run(&scene.laird.socket, &["console", "--read-only", "builder"]);
    third.sees("builder, read only; ~.").await;
    second.types("no");
    first.types("root\r");
    let mut typed = [0; 5];
    within(tokio::io::AsyncReadExt::read_exact(&mut hypervisor, &mut typed)).await.unwrap();
    assert_eq!(&typed, b"root\r");
    hypervisor.write_all(b"Welcome\x1b[0m").await.unwrap();
    for operator in [&first, &second, &third] {
        operator.sees("Welcome\x1b[0m").await;
    }
    first.types("~.");
    assert_eq!(first.status().await, Some(0));
    first.sees("vmctl: left the console of VM builder").await;
    within(client::stop(scene.shim.control())).await.unwrap();
    for operator in [&mut second, &mut third] {
        assert_eq!(operator.status().await, Some(1));
        operator.sees("vmctl: VM builder: The shim was stopped").await;
    }
}

#[tokio::test]
async fn cl14_what_a_guest_says_is_escaped_where_it_was_not_asked_for_raw() {
    let scene = scene().await;
    let socket = &scene.laird.socket;
    let escaped = "\\x1b]0;owned\\x07 \\x9b2J \\x1b[31m\\x7f";
    let (status, out, _) = without_terminal(socket, &["logs", "builder"]).await;
    assert_eq!((status, out), (Some(0), format!("{escaped}\nnext\n")));
    let (status, out, _) = without_terminal(socket, &["logs", "--raw", "builder"]).await;
    assert_eq!((status, out), (Some(0), format!("{HOSTILE}\nnext\r\n")));
    let (status, out, error) = without_terminal(socket, &["status", "builder"]).await;
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert_eq!(error, format!("vmctl: VM failed: {escaped}\\x0d\n"));
}
