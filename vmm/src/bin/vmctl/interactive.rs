//! A session on the operator's terminal: what is typed goes to the guest, except for escapes; so do changes of its size.

use crate::{
    escape::{Escapes, HELP, Typed},
    terminal::{self, Raw},
};
use lair_guest::wire::{
    frame::{self, CHUNK, FrameError, Kind},
    message::{ExecInput, TerminalSize},
};
use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    signal::unix::{Signal, SignalKind, signal},
    time::timeout,
};

/// How much that was typed waits for the guest, in bytes. Then no more is read: a paste is not cut.
const TYPED: usize = 1 << 20;

/// How long the guest may take for the last of it.
const PARTING: Duration = Duration::from_secs(1);

/// Why a session on a terminal ended before its other side did.
#[derive(Debug)]
pub(crate) enum Left {
    /// By the escape, or the terminal hung up.
    Asked,
    /// This signal came.
    Signal(i32),
}

impl Left {
    /// The exit status of a signal, as a shell says it; `asked` for the escape.
    pub(crate) fn status(&self, asked: u8) -> ExitCode {
        match self {
            Self::Asked => ExitCode::from(asked),
            Self::Signal(number) => crate::exec::killed(*number),
        }
    }
}

/// The signals that end a program. While this lives they do not: they must not leave the terminal raw.
#[derive(Debug)]
pub(crate) struct Signals(Vec<(i32, Signal)>);

impl Signals {
    /// Listens for them from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        let kinds =
            [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::terminate()];
        let signals = kinds.into_iter().map(|kind| Ok((kind.as_raw_value(), signal(kind)?)));
        Ok(Self(signals.collect::<io::Result<_>>()?))
    }

    /// Waits for the next, and says its number.
    pub(crate) async fn recv(&mut self) -> i32 {
        std::future::poll_fn(|cx| {
            for (number, signal) in &mut self.0 {
                if signal.poll_recv(cx).is_ready() {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

/// What comes in while the terminal is the guest's.
#[derive(Debug)]
pub(crate) struct Interactive {
    ends: Signals,
    resized: Signal,
    /// What the other side knows.
    size: TerminalSize,
    /// Only to be caught, so that a reader of our output that has left is an error and not our death.
    _pipe: Signal,
    _raw: Raw,
}

impl Interactive {
    /// Makes the terminal raw, of which the other side has been told that its size is `size`.
    pub(crate) fn begin(size: TerminalSize) -> io::Result<Self> {
        Ok(Self {
            ends: Signals::listen()?,
            resized: signal(SignalKind::window_change())?,
            size,
            _pipe: signal(SignalKind::pipe())?,
            _raw: Raw::enter()?,
        })
    }

    /// Sends what is typed, and sizes, to `to` until the operator leaves. When the other side is gone it does nothing: that shows in what
    /// comes from there.
    pub(crate) async fn send_input<W: AsyncWrite + Unpin>(&mut self, mut to: W) -> Result<Left, FrameError> {
        let (mut input, mut chunk) = (tokio::io::stdin(), vec![0; CHUNK]);
        let (mut escapes, mut gone) = (Escapes::new(), false);
        // Frames that wait: while the guest takes none, the escape must be heard nevertheless.
        let mut waiting = Vec::new();
        loop {
            let size = terminal::size();
            if size != self.size {
                self.size = size;
                frame::write_message(&mut waiting, &ExecInput::Resize(size)).await?;
            }
            tokio::select! {
                read = input.read(&mut chunk), if waiting.len() < TYPED => {
                    let read = chunk.get(..read.unwrap_or(0)).unwrap_or_default();
                    let Typed { send, help, leave } = escapes.take(read);
                    if !send.is_empty() {
                        frame::write(&mut waiting, Kind::Data, &send).await?;
                    }
                    if leave || read.is_empty() {
                        // What was typed before is for the guest, if it takes it.
                        let _ = timeout(PARTING, to.write_all(&waiting)).await;
                        return Ok(Left::Asked);
                    }
                    if help {
                        notice(&format!("\r\n{HELP}"));
                    }
                }
                _ = self.resized.recv() => {}
                number = self.ends.recv() => return Ok(Left::Signal(number)),
                written = to.write(&waiting), if !waiting.is_empty() && !gone => match written {
                    Ok(written @ 1..) => drop(waiting.drain(..written)),
                    _ => gone = true,
                }
            }
            if gone {
                waiting.clear();
            }
        }
    }
}

/// A line of vmctl's own on a raw terminal.
pub(crate) fn notice(text: &str) {
    // Not eprint: it panics where standard error is a closed pipe.
    let _ = write!(io::stderr(), "{text}\r\n");
}

/// The last line, on a terminal that is as before.
pub(crate) fn farewell(text: &str) {
    // Not eprintln: the terminal may have hung up.
    let _ = writeln!(io::stderr(), "\nvmctl: {text}");
}

/// Writes to standard output, on a thread of its own: a terminal that takes nothing must not keep signals from being heard.
pub(crate) async fn print(bytes: &[u8]) -> io::Result<()> {
    let mut out = tokio::io::stdout();
    out.write_all(bytes).await?;
    out.flush().await
}
