//! Runs one command for the host and carries its streams.
//!
//! The command is the leader of a session of its own, with a terminal if the host asks for one. When the connection ends
//! before the command, all of its session is ended. Nothing is buffered beyond one frame a direction: a host that does not read stops the command, a command
//! that does not read stops the host.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{environment::Environment, pty::Pty, session_end, shell};
use crate::sys;
use lair_guest::wire::{
    frame::{self, CHUNK, FrameError, Kind},
    message::{Exec, ExecEvent, ExecInput, Terminal},
};
use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    process::{Child, Command},
    time::{Instant, sleep_until},
};

/// How long to wait for output after the command has exited, if a process that it left behind keeps the pipe open.
const LINGER: Duration = Duration::from_millis(300);

/// After so long without output an empty frame goes out: while the command does not read its input, the connection
/// is not read either, and only a write tells that the host has gone. That holds for a hypervisor that passes the host's end on. One
/// that first has to deliver what the guest does not take never does: vhost-device-vsock spins without credit, and the command stays until
/// it reads or ends.
const PROBE: Duration = Duration::from_secs(10);

/// Runs `exec` and speaks about it over `stream`.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    exec: &Exec,
    environment: &Environment,
) -> Result<(), FrameError> {
    let Running { mut child, pid, input, output, terminal } = match spawn(exec, environment) {
        Ok(started) => started,
        Err(reason) => return frame::write_message(&mut stream, &ExecEvent::Failed { reason }).await,
    };
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let outcome = async {
        let started = ExecEvent::Started { pid, terminal: terminal.is_some() };
        frame::write_message(&mut to_host, &started).await?;
        tokio::select! {
            status = drain(&mut child, output, &mut to_host) => status,
            error = feed(&mut from_host, input, terminal.as_ref()) => Err(error),
        }
    };
    match outcome.await {
        Ok(status) => frame::write_message(&mut to_host, &in_words(status)).await,
        Err(error) => {
            session_end::end(&mut child, pid).await;
            Err(error)
        }
    }
}

type Reader = Box<dyn AsyncRead + Unpin + Send>;
type Writer = Box<dyn AsyncWrite + Unpin + Send>;

/// A command that was started.
struct Running {
    child: Child,
    pid: u32,
    input: Writer,
    output: Output,
    /// Its terminal, if it has one.
    terminal: Option<Pty>,
}

/// What a command writes. A terminal has one stream only.
struct Output {
    stdout: Option<Reader>,
    stderr: Option<Reader>,
}

fn spawn(exec: &Exec, environment: &Environment) -> Result<Running, String> {
    let mut command = match (exec.command.as_slice(), &exec.terminal) {
        ([program, arguments @ ..], _) => {
            let mut command = Command::new(program);
            command.args(arguments).env_clear().envs(environment.iter().cloned()).current_dir("/");
            command
        }
        ([], Some(_)) => shell::login(environment),
        ([], None) => return Err("There is no command to run".into()),
    };
    let term = exec.terminal.as_ref().map(|terminal| ("TERM", terminal.term.as_str()));
    command.envs(term).envs(&exec.environment);
    sys::isolate(&mut command, None);
    match &exec.terminal {
        Some(terminal) => on_terminal(command, terminal),
        None => on_pipes(command),
    }
}

fn start(command: &mut Command) -> Result<(Child, u32), String> {
    let child = command.spawn().map_err(|error| {
        format!("Could not start `{}`: {error}", command.as_std().get_program().to_string_lossy())
    })?;
    let pid = child.id().ok_or("The command ended before it started")?;
    Ok((child, pid))
}

fn on_pipes(mut command: Command) -> Result<Running, String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (mut child, pid) = start(&mut command)?;
    let missing = || "The command has no pipes".to_string();
    let input = child.stdin.take().ok_or_else(missing)?;
    let (stdout, stderr) =
        (child.stdout.take().ok_or_else(missing)?, child.stderr.take().ok_or_else(missing)?);
    let output = Output { stdout: Some(Box::new(stdout)), stderr: Some(Box::new(stderr)) };
    Ok(Running { child, pid, input: Box::new(input), output, terminal: None })
}

fn on_terminal(mut command: Command, terminal: &Terminal) -> Result<Running, String> {
    let failed = |error| format!("Could not make a terminal: {error}");
    let (pty, end) = Pty::open(terminal.size).map_err(failed)?;
    command.stdin(end.try_clone().map_err(failed)?).stdout(end.try_clone().map_err(failed)?).stderr(end);
    sys::control_terminal(&mut command);
    // With `command` our descriptors of the command's end go: its last one then ends the output.
    let (child, pid) = start(&mut command)?;
    let output = Output { stdout: Some(Box::new(pty.clone())), stderr: None };
    Ok(Running { child, pid, input: Box::new(pty.clone()), output, terminal: Some(pty) })
}

/// Carries the command's output until it has exited and there is no more; the exit status.
async fn drain<W: AsyncWrite + Unpin>(
    child: &mut Child,
    output: Output,
    to: &mut W,
) -> Result<ExitStatus, FrameError> {
    let Output { mut stdout, mut stderr } = output;
    let (mut out, mut err) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut status = None;
    let mut last = Instant::now();
    loop {
        if let (Some(status), None, None) = (status, &stdout, &stderr) {
            return Ok(status);
        }
        let patience = if status.is_some() { LINGER } else { PROBE };
        let silence = sleep_until(last.checked_add(patience).unwrap_or(last));
        tokio::select! {
            read = read_some(&mut stdout, &mut out), if stdout.is_some() => match read {
                0 => stdout = None,
                n => frame::write(to, Kind::Stdout, out.get(..n).unwrap_or_default()).await?,
            },
            read = read_some(&mut stderr, &mut err), if stderr.is_some() => match read {
                0 => stderr = None,
                n => frame::write(to, Kind::Stderr, err.get(..n).unwrap_or_default()).await?,
            },
            exited = child.wait(), if status.is_none() => status = Some(exited?),
            () = silence => match status {
                Some(status) => return Ok(status),
                None => frame::write(to, Kind::Stdout, &[]).await?,
            },
        }
        last = Instant::now();
    }
}

/// How much was read; nothing at the end, also if that is an error or the pipe is gone.
async fn read_some<R: AsyncRead + Unpin>(from: &mut Option<R>, buffer: &mut [u8]) -> usize {
    match from {
        Some(from) => from.read(buffer).await.unwrap_or(0),
        None => 0,
    }
}

/// Carries the command's input; ends only with the connection.
async fn feed<R: AsyncRead + Unpin>(from: &mut R, input: Writer, terminal: Option<&Pty>) -> FrameError {
    let mut stdin = Some(input);
    let mut payload = Vec::new();
    loop {
        match frame::read(from, &mut payload).await {
            Ok(Some(Kind::Data)) => {
                // A command that has closed its input does not want the rest.
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&payload).await.is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some(Kind::Eof)) => stdin = None,
            Ok(Some(Kind::Message)) if let Some(pty) = terminal => match frame::parse_message(&payload) {
                // A terminal that is gone has no size; the command's end is on its way.
                Ok(ExecInput::Resize(size)) => drop(pty.resize(size)),
                Err(error) => return error,
            },
            Ok(Some(got)) => return FrameError::Unexpected { expected: Kind::Data, got },
            Ok(None) => return FrameError::Closed,
            Err(error) => return error,
        }
    }
}

fn in_words(status: ExitStatus) -> ExecEvent {
    match (status.code(), status.signal()) {
        (Some(status), _) => ExecEvent::Exited { status },
        (None, signal) => ExecEvent::Killed { signal: signal.unwrap_or_default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::TerminalSize;
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    use std::collections::BTreeMap;
    use tokio::{io::DuplexStream, time::timeout};

    /// No wait is longer: far above what anything takes, also on a busy machine.
    const LIMIT: Duration = Duration::from_secs(60);

    type Task = tokio::task::JoinHandle<Result<(), FrameError>>;

    fn start(command: &[&str]) -> (DuplexStream, Task) {
        serve_with(command, None)
    }

    fn start_on_terminal(command: &[&str]) -> (DuplexStream, Task) {
        let size = TerminalSize { rows: 33, columns: 111 };
        serve_with(command, Some(Terminal { term: "vt220".into(), size }))
    }

    fn serve_with(command: &[&str], terminal: Option<Terminal>) -> (DuplexStream, Task) {
        let (host, guest) = tokio::io::duplex(1 << 12);
        let exec = Exec {
            command: command.iter().map(|s| s.to_string()).collect(),
            environment: BTreeMap::from([("GREETING".into(), "hello".into())]),
            terminal,
        };
        let environment = super::super::environment::of(None);
        (host, tokio::spawn(async move { serve(guest, &exec, &environment).await }))
    }

    async fn started(host: &mut DuplexStream) -> i32 {
        match timeout(LIMIT, frame::read_message(host)).await.expect("no start").unwrap() {
            ExecEvent::Started { pid, .. } => pid.try_into().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// All output, and the last event.
    async fn rest(host: &mut DuplexStream) -> (String, String, ExecEvent) {
        timeout(LIMIT, rest_without_limit(host)).await.expect("no end")
    }

    async fn rest_without_limit(host: &mut DuplexStream) -> (String, String, ExecEvent) {
        let (mut out, mut err, mut payload) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match frame::read(host, &mut payload).await.unwrap().unwrap() {
                Kind::Stdout => out.extend_from_slice(&payload),
                Kind::Stderr => err.extend_from_slice(&payload),
                Kind::Message => {
                    let event = frame::parse_message(&payload).unwrap();
                    return (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), event);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn is_gone(pid: i32) -> bool {
        for _ in 0..200 {
            if kill(Pid::from_raw(pid), None).is_err() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    #[tokio::test]
    async fn streams_and_status_come_back() {
        let (mut host, task) =
            start(&["sh", "-c", "cat; echo $GREETING $HOME ${NIX_REMOTE-unset} >&2; exit 3"]);
        started(&mut host).await;
        frame::write(&mut host, Kind::Data, b"some input").await.unwrap();
        frame::write(&mut host, Kind::Eof, b"").await.unwrap();
        let (out, err, event) = rest(&mut host).await;
        assert_eq!((out.as_str(), err.as_str()), ("some input", "hello /root unset\n"));
        assert_eq!(event, ExecEvent::Exited { status: 3 });
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_signal_and_a_missing_program_are_told_apart() {
        let (mut host, _task) = start(&["sh", "-c", "kill -9 $$"]);
        started(&mut host).await;
        assert_eq!(rest(&mut host).await.2, ExecEvent::Killed { signal: 9 });

        for (command, reason) in [
            (
                &["no-such-program"][..],
                "Could not start `no-such-program`: No such file or directory (os error 2)",
            ),
            (&[], "There is no command to run"),
        ] {
            let (mut host, task) = start(command);
            let event: ExecEvent = frame::read_message(&mut host).await.unwrap();
            assert_eq!(event, ExecEvent::Failed { reason: reason.into() });
            task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn all_output_comes_before_the_status() {
        let (mut host, _task) = start(&["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x"]);
        started(&mut host).await;
        tokio::time::sleep(2 * LINGER).await;
        let (out, _, event) = rest(&mut host).await;
        assert_eq!((out.len(), event), (1_000_000, ExecEvent::Exited { status: 0 }));
    }

    #[tokio::test]
    async fn a_process_left_behind_does_not_hold_the_status_back() {
        let (mut host, _task) = start(&["sh", "-c", "sleep 30 & echo $!"]);
        started(&mut host).await;
        let (out, _, event) = rest(&mut host).await;
        assert_eq!(event, ExecEvent::Exited { status: 0 });
        let left = Pid::from_raw(out.trim().parse().unwrap());
        kill(left, Signal::SIGKILL).expect("it was ended");
    }

    /// Reads output until `wanted` is in it.
    async fn read_until(host: &mut DuplexStream, wanted: &str) -> String {
        let (mut seen, mut payload) = (String::new(), Vec::new());
        let reading = async {
            while !seen.contains(wanted) {
                assert_eq!(frame::read(host, &mut payload).await.unwrap(), Some(Kind::Stdout), "{seen}");
                seen.push_str(std::str::from_utf8(&payload).unwrap());
            }
        };
        timeout(LIMIT, reading).await.unwrap_or_else(|_| panic!("no {wanted:?}"));
        seen
    }

    #[tokio::test]
    async fn vs8_a_lost_connection_ends_the_whole_session() {
        // The shell ignores SIGHUP, and so does the child that it prints; on a terminal, that has a group of its own.
        let script = "trap '' HUP; set -m 2>/dev/null; sleep 300 & echo $!.; wait";
        for start in [start, start_on_terminal] {
            let (mut host, task) = start(&["sh", "-c", script]);
            let leader = started(&mut host).await;
            let text = read_until(&mut host, ".").await;
            let child: i32 = text.trim().trim_end_matches('.').parse().unwrap();
            drop(host);
            assert!(task.await.unwrap().is_err());
            assert!(is_gone(leader).await && is_gone(child).await, "the command outlived its connection");
        }
    }

    #[tokio::test]
    async fn a_command_may_have_a_terminal() {
        let script = "for fd in 0 1 2; do [ -t $fd ] || echo $fd is none; done; stty size; echo $TERM $GREETING; \
                      ls -l /proc/self/fd | grep -c ptmx; [ $(ps -o tpgid= $$) -gt 0 ] && echo controlled >&2; exit 3";
        let (mut host, task) = start_on_terminal(&["sh", "-c", script]);
        let first: ExecEvent = frame::read_message(&mut host).await.unwrap();
        assert!(matches!(first, ExecEvent::Started { terminal: true, .. }));
        let (out, err, event) = rest(&mut host).await;
        assert_eq!(out, "33 111\r\nvt220 hello\r\n0\r\ncontrolled\r\n", "The agent's end is not inherited");
        assert_eq!((err.as_str(), event), ("", ExecEvent::Exited { status: 3 }));
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_login_shell_reads_what_is_typed() {
        let (mut host, task) = start_on_terminal(&[]);
        started(&mut host).await;
        frame::write(&mut host, Kind::Data, b"echo $0 in $PWD is $((6*7))\r").await.unwrap();
        let text = read_until(&mut host, "is 42\r\n").await;
        let home = if std::path::Path::new("/root").is_dir() { "/root" } else { "/" };
        assert!(text.contains(&format!("sh in {home} is 42")) && text.contains("-"), "{text}");
        frame::write(&mut host, Kind::Data, b"exit 5\r").await.unwrap();
        assert_eq!(rest(&mut host).await.2, ExecEvent::Exited { status: 5 });
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_terminal_follows_its_size_and_sends_signals() {
        let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
        let (mut host, task) = start_on_terminal(&["sh", "-c", script]);
        started(&mut host).await;
        read_until(&mut host, "ready").await;
        let resize = ExecInput::Resize(TerminalSize { rows: 50, columns: 200 });
        frame::write_message(&mut host, &resize).await.unwrap();
        read_until(&mut host, "50 200").await;
        frame::write(&mut host, Kind::Data, b"\x03").await.unwrap();
        assert_eq!(rest(&mut host).await.2, ExecEvent::Killed { signal: 2 });
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_terminal_leaves_no_descriptor_behind() {
        let terminals = || {
            let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let names = fds.filter_map(|entry| std::fs::read_link(entry.path()).ok());
            names.filter(|name| name.starts_with("/dev/pts") || name.ends_with("ptmx")).count()
        };
        for _ in 0..40 {
            let (mut host, task) = start_on_terminal(&["true"]);
            started(&mut host).await;
            assert_eq!(rest(&mut host).await.2, ExecEvent::Exited { status: 0 });
            task.await.unwrap().unwrap();
        }
        // Other tests of this process have some.
        assert!(terminals() < 30, "{}", terminals());
    }

    #[tokio::test]
    async fn vs8_a_terminal_without_a_reader_stops_the_command_and_the_host() {
        let (mut host, task) = start_on_terminal(&["sh", "-c", "stty raw -echo; echo on; yes"]);
        let pid = started(&mut host).await;
        read_until(&mut host, "on").await;
        let flood = async {
            loop {
                frame::write(&mut host, Kind::Data, &[b'x'; CHUNK]).await.unwrap();
            }
        };
        assert!(timeout(Duration::from_millis(500), flood).await.is_err(), "the input was taken");
        drop(host);
        assert!(task.await.unwrap().is_err());
        assert!(is_gone(pid).await);
    }

    #[tokio::test]
    async fn vs4_sizes_that_are_none_end_the_command() {
        for (terminal, message) in
            [(true, r#"{"input":"resize","rows":70000,"columns":1}"#), (true, "[]"), (false, "{}")]
        {
            let (mut host, task) =
                if terminal { start_on_terminal(&["sleep", "300"]) } else { start(&["sleep", "300"]) };
            let pid = started(&mut host).await;
            frame::write(&mut host, Kind::Message, message.as_bytes()).await.unwrap();
            assert!(task.await.unwrap().is_err(), "{message}");
            assert!(is_gone(pid).await);
        }
    }

    #[tokio::test]
    async fn vs8_endless_output_waits_for_the_reader() {
        let (mut host, task) = start(&["yes"]);
        let pid = started(&mut host).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        assert_eq!(state.split(' ').nth(2), Some("S"), "the command is not held back: {state}");
        drop(host);
        assert!(task.await.unwrap().is_err());
        assert!(is_gone(pid).await);
    }

    #[tokio::test]
    async fn vs8_a_host_that_goes_while_the_command_does_not_read_is_noticed() {
        tokio::time::pause();
        let (mut host, task) = start(&["sleep", "300"]);
        let pid = started(&mut host).await;
        // More than the pipe and the connection hold, so that nobody reads the end of the connection.
        let flood = async {
            loop {
                frame::write(&mut host, Kind::Data, &[0; CHUNK]).await.unwrap();
            }
        };
        let _ = timeout(Duration::from_millis(500), flood).await;
        drop(host);
        assert!(task.await.unwrap().is_err());
        tokio::time::resume();
        assert!(is_gone(pid).await);
    }

    #[tokio::test]
    async fn vs4_an_unexpected_frame_ends_the_command() {
        let (mut host, task) = start(&["sleep", "300"]);
        let pid = started(&mut host).await;
        frame::write(&mut host, Kind::Stdout, b"x").await.unwrap();
        assert!(matches!(task.await.unwrap(), Err(FrameError::Unexpected { got: Kind::Stdout, .. })));
        assert!(is_gone(pid).await);
    }
}
