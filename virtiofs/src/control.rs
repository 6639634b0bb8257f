//! The control socket: a client sends one line, gets one answer, and is hung up on.
//!
//! One client at a time, in a thread of its own that shares nothing with serving but counters. A client that dawdles has
//! little time, so that the next one gets its turn.

use crate::{fuse::Server, stats::prometheus, throttle::Throttle};
use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};
use tracing::warn;

/// The longest command line, with its newline.
const LINE_MAX: usize = 64;

/// How long a client may take to send its line, and as long again to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers clients, one after the other, for ever.
pub fn serve(listener: &UnixListener, server: &Server) {
    let throttle = Throttle::new();
    loop {
        let result = listener.accept().and_then(|(client, _)| answer(&client, server));
        if let Err(error) = result {
            if let Some(skipped) = throttle.admit() {
                warn!(%error, skipped, "A client of the control socket got no answer");
            }
            // Also where accept() fails again and again, as for want of descriptors.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn answer(mut client: &UnixStream, server: &Server) -> io::Result<()> {
    let line = read_line(client, Instant::now() + PATIENCE)?;
    let text = match line.as_slice() {
        b"stats" => prometheus(server),
        _ => format!("error: unknown command {:?}; the only one is stats\n", String::from_utf8_lossy(&line)),
    };
    let deadline = Instant::now() + PATIENCE;
    let mut left = text.as_bytes();
    while !left.is_empty() {
        client.set_write_timeout(Some(until(deadline)?))?;
        let written = client.write(left)?;
        left = left.get(written..).unwrap_or_default();
    }
    Ok(())
}

fn read_line(mut client: &UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        client.set_read_timeout(Some(until(deadline)?))?;
        let mut piece = [0; LINE_MAX];
        let count = client.read(&mut piece)?;
        line.extend_from_slice(piece.get(..count).unwrap_or_default());
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok(line);
        }
        if count == 0 || line.len() >= LINE_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "No newline within the first 64 bytes"));
        }
    }
}

fn until(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}
