//! The control socket: a client sends one command, gets one answer, and is hung up on.
//!
//! A command is a line; `grant` and `revoke` have store paths after it, one a line, and end with an empty line. One client at a
//! time, in a thread of its own that shares nothing with serving but counters and the tree that is served. A client that
//! dawdles has little time, so that the next one gets its turn.

use crate::{
    error::chain,
    index::{Added, Index, IndexError, Origin},
    stats::prometheus,
    throttle::Throttle,
    vhost::Service,
    view::{FILE_MAX, ParseError, View},
};
use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};
use thiserror::Error;
use tracing::{info, warn};

/// The longest first line, with its newline.
const LINE_MAX: usize = 64;

/// How long a client may take to send its command, and as long again to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a client controls.
#[derive(Debug)]
pub struct Control<'a> {
    /// What is served.
    pub service: &'a Service,
    /// The index from which its tree was built.
    pub index: Option<Index>,
}

/// Why a command was not carried out. Nothing has changed.
#[derive(Debug, Error)]
enum Refused {
    #[error("unknown command {0:?}; there are stats, denied, grant and revoke")]
    Unknown(String),
    #[error("cannot use the list of store paths")]
    List(#[from] ParseError),
    #[error("cannot read the metadata")]
    Index(#[from] IndexError),
    #[error("the view would have more than {FILE_MAX} bytes as a file")]
    TooLarge,
}

/// Answers clients, one after the other, for ever.
pub fn serve(listener: &UnixListener, control: &mut Control<'_>) {
    let throttle = Throttle::new();
    loop {
        let result = listener.accept().and_then(|(client, _)| answer(&client, control));
        if let Err(error) = result {
            if let Some(skipped) = throttle.admit() {
                warn!(%error, skipped, "A client of the control socket got no answer");
            }
            // Also where accept() fails again and again, as for want of descriptors.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn answer(mut client: &UnixStream, control: &mut Control<'_>) -> io::Result<()> {
    let mut input = Input { client, deadline: Instant::now() + PATIENCE, bytes: Vec::new() };
    let line = input.line()?;
    let result = match line.as_slice() {
        b"stats" => Ok(prometheus(control.service)),
        b"denied" => Ok(control.denied()),
        b"grant" => control.grant(input.list(&line)?),
        b"revoke" => control.revoke(input.list(&line)?),
        _ => Err(Refused::Unknown(String::from_utf8_lossy(&line).into_owned())),
    };
    let text = result.unwrap_or_else(|refused| format!("error: {}\n", chain(&refused)));
    let deadline = Instant::now() + PATIENCE;
    let mut left = text.as_bytes();
    while !left.is_empty() {
        client.set_write_timeout(Some(until(deadline)?))?;
        let written = client.write(left)?;
        left = left.get(written..).unwrap_or_default();
    }
    Ok(())
}

impl Control<'_> {
    /// Adds store paths to what is served: all of them, or none if one cannot be had.
    fn grant(&mut self, list: &[u8]) -> Result<String, Refused> {
        let view = View::parse(list)?;
        let paths = view.paths();
        let service = self.service;
        let origin = Origin { stores: service.files.stores(), index: self.index.as_ref() };
        let Added { paths: added, unindexed } = service.server.replace(|tree| {
            let (tree, added) = tree.with(origin, paths)?;
            // With more, this program could not be started again.
            let bytes: u64 = tree.entries().iter().map(|entry| View::line_length(&entry.path)).sum();
            if bytes > FILE_MAX { Err(Refused::TooLarge) } else { Ok((tree, added)) }
        })?;
        unindexed.log();
        // Asked after they can be seen: what the guest is told from now on is that they are there.
        let refresh = if self.service.server.denied().needs_refresh(paths) { "yes" } else { "no" };
        info!(added, refresh, "Granted store paths");
        Ok(format!("granted {added}, refresh {refresh}\n"))
    }

    fn revoke(&mut self, list: &[u8]) -> Result<String, Refused> {
        let view = View::parse(list)?;
        let removed = self.service.server.replace(|tree| Ok::<_, Refused>(tree.without(view.paths())))?;
        info!(removed, "Revoked store paths");
        Ok(format!("revoked {removed}, pages that the guest has cached stay\n"))
    }

    fn denied(&self) -> String {
        let (names, complete) = self.service.server.denied().list();
        let complete = if complete { "yes" } else { "no" };
        let list: String = names.iter().map(|path| format!("{path}\n")).collect();
        format!("denied {}, complete {complete}\n{list}", names.len())
    }
}

/// What a client sends.
struct Input<'a> {
    client: &'a UnixStream,
    deadline: Instant,
    bytes: Vec<u8>,
}

impl Input<'_> {
    /// The first line, without its newline.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let end = self.find(b"\n", 0, LINE_MAX)?;
        Ok(self.bytes.get(..end).unwrap_or_default().to_vec())
    }

    /// The lines behind the first one, up to an empty line.
    fn list(&mut self, line: &[u8]) -> io::Result<&[u8]> {
        let limit = usize::try_from(FILE_MAX).unwrap_or(usize::MAX);
        let end = self.find(b"\n\n", line.len(), limit)?;
        Ok(self.bytes.get(line.len().saturating_add(1)..=end).unwrap_or_default())
    }

    /// Where `what` is, from `from` on, if it comes within `limit` bytes.
    fn find(&mut self, what: &[u8], from: usize, limit: usize) -> io::Result<usize> {
        let mut from = from;
        loop {
            let new = self.bytes.get(from..).unwrap_or_default();
            match new.windows(what.len()).position(|window| window == what) {
                Some(position) if from.saturating_add(position) < limit => {
                    return Ok(from.saturating_add(position));
                }
                None if self.bytes.len() < limit => {}
                _ => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("More than {limit} bytes"),
                    ));
                }
            }
            from = from.max(self.bytes.len().saturating_sub(what.len()));
            self.more()?;
        }
    }

    fn more(&mut self) -> io::Result<()> {
        let mut piece = [0; 16 << 10];
        self.client.set_read_timeout(Some(until(self.deadline)?))?;
        let count = self.client.read(&mut piece)?;
        self.bytes.extend_from_slice(piece.get(..count).unwrap_or_default());
        if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

fn until(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}
