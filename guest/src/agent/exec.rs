//! Runs one command for the host and carries its streams.
//!
//! The command is the leader of a session of its own. When the connection ends before it, the whole process group is
//! ended. Nothing is buffered beyond one frame a direction: a host that does not read stops the command, a command
//! that does not read stops the host.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::environment::Environment;
use crate::sys;
use lair_guest::wire::{
    frame::{self, CHUNK, FrameError, Kind},
    message::{Exec, ExecEvent},
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    process::{Child, ChildStdin, Command},
    time::{Instant, sleep_until, timeout},
};

/// How long a command may take to end after SIGHUP.
const GRACE: Duration = Duration::from_secs(2);

/// How long to wait for output after the command has exited, if a process that it left behind keeps the pipe open.
const LINGER: Duration = Duration::from_millis(300);

/// After so long without output an empty frame goes out: while the command does not read its input, the connection
/// is not read either, and only a write tells that the host has gone.
const PROBE: Duration = Duration::from_secs(10);

/// Runs `exec` and speaks about it over `stream`.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    exec: &Exec,
    environment: &Environment,
) -> Result<(), FrameError> {
    let (mut child, pid) = match spawn(exec, environment) {
        Ok(started) => started,
        Err(reason) => return frame::write_message(&mut stream, &ExecEvent::Failed { reason }).await,
    };
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let stdin = child.stdin.take();
    let outcome = async {
        frame::write_message(&mut to_host, &ExecEvent::Started { pid }).await?;
        tokio::select! {
            status = drain(&mut child, &mut to_host) => status,
            error = feed(&mut from_host, stdin) => Err(error),
        }
    };
    match outcome.await {
        Ok(status) => frame::write_message(&mut to_host, &in_words(status)).await,
        Err(error) => {
            end(&mut child, pid).await;
            Err(error)
        }
    }
}

fn spawn(exec: &Exec, environment: &Environment) -> Result<(Child, u32), String> {
    let [program, arguments @ ..] = exec.command.as_slice() else {
        return Err("There is no command to run".into());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment.iter().cloned())
        .envs(&exec.environment)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sys::isolate(&mut command, None);
    let child = command.spawn().map_err(|error| format!("Could not start `{program}`: {error}"))?;
    let pid = child.id().ok_or("The command ended before it started")?;
    Ok((child, pid))
}

/// Carries the command's output until it has exited and there is no more; the exit status.
async fn drain<W: AsyncWrite + Unpin>(child: &mut Child, to: &mut W) -> Result<ExitStatus, FrameError> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
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
async fn feed<R: AsyncRead + Unpin>(from: &mut R, mut stdin: Option<ChildStdin>) -> FrameError {
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
            Ok(Some(got)) => return FrameError::Unexpected { expected: Kind::Data, got },
            Ok(None) => return FrameError::Closed,
            Err(error) => return error,
        }
    }
}

/// Ends the command and what it has started in its process group.
async fn end(child: &mut Child, pid: u32) {
    let group = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
    let _ = killpg(group, Signal::SIGHUP);
    let _ = timeout(GRACE, child.wait()).await;
    let _ = killpg(group, Signal::SIGKILL);
    // A process that hangs in the kernel is reaped by the runtime when it comes out.
    let _ = timeout(GRACE, child.wait()).await;
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
    use std::collections::BTreeMap;
    use tokio::io::DuplexStream;

    fn start(command: &[&str]) -> (DuplexStream, tokio::task::JoinHandle<Result<(), FrameError>>) {
        let (host, guest) = tokio::io::duplex(1 << 12);
        let exec = Exec {
            command: command.iter().map(|s| s.to_string()).collect(),
            environment: BTreeMap::from([("GREETING".into(), "hello".into())]),
        };
        let environment = super::super::environment::of(None);
        (host, tokio::spawn(async move { serve(guest, &exec, &environment).await }))
    }

    async fn started(host: &mut DuplexStream) -> i32 {
        match frame::read_message(host).await.unwrap() {
            ExecEvent::Started { pid } => pid.try_into().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// All output, and the last event.
    async fn rest(host: &mut DuplexStream) -> (String, String, ExecEvent) {
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
            if nix::sys::signal::kill(Pid::from_raw(pid), None).is_err() {
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
        let (out, _, event) = tokio::time::timeout(Duration::from_secs(10), rest(&mut host)).await.unwrap();
        assert_eq!(event, ExecEvent::Exited { status: 0 });
        let left = Pid::from_raw(out.trim().parse().unwrap());
        nix::sys::signal::kill(left, Signal::SIGKILL).expect("it was ended");
    }

    #[tokio::test]
    async fn vs8_a_lost_connection_ends_the_whole_group() {
        // The shell ignores SIGHUP, and so does the child that it prints.
        let (mut host, task) = start(&["sh", "-c", "trap '' HUP; sleep 300 & echo $!; wait"]);
        let leader = started(&mut host).await;
        let mut payload = Vec::new();
        frame::read(&mut host, &mut payload).await.unwrap();
        let child: i32 = std::str::from_utf8(&payload).unwrap().trim().parse().unwrap();
        drop(host);
        assert!(task.await.unwrap().is_err());
        assert!(is_gone(leader).await && is_gone(child).await, "the command outlived its connection");
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
