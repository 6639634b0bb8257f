//! Carries one open connection from its start to its end and records it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    audit::{Attempt, Outcome},
    links::{Counters, InUse},
    note::chain,
    parting::leave_halves,
    state::Shim,
};
use lair_guest::wire::relay::{End, Form, relay};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// Both directions of a unix stream.
pub(super) fn end(stream: UnixStream, form: Form) -> End<OwnedReadHalf, OwnedWriteHalf> {
    let (reader, writer) = stream.into_split();
    End { reader, writer, form }
}

/// Counts a connection as open as long as it lives.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: &Arc<Counters>) -> Self {
        counters.connections.fetch_add(1, Relaxed);
        counters.open.fetch_add(1, Relaxed);
        Self(counters.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Relays between the two ends until they are done, the link is removed, the guest reboots or the shim stops. `link` is `None` where an
/// operator connects to a port.
pub(super) async fn carry<OR, OW>(
    shim: &Shim,
    attempt: Attempt,
    link: Option<&InUse>,
    mut opener: End<OR, OW>,
    mut target: End<OwnedReadHalf, OwnedWriteHalf>,
) where
    OR: AsyncRead + Unpin,
    OW: AsyncWrite + Unpin,
{
    let started = Instant::now();
    let counters = link.map(|link| link.counters.clone()).unwrap_or_default();
    let open = Open::new(&counters);
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = |own: &AtomicU64, link: &AtomicU64, bytes| {
        own.fetch_add(bytes, Relaxed);
        link.fetch_add(bytes, Relaxed);
    };
    let removed = async {
        match link {
            Some(link) => link.removed().await,
            None => std::future::pending().await,
        }
    };
    let reason = tokio::select! {
        done = relay(
            &mut opener,
            &mut target,
            |bytes| count(&out, &counters.bytes_out, bytes),
            |bytes| count(&back, &counters.bytes_in, bytes),
        ) => done.err().map(|error| chain(&error)),
        () = removed => Some("The link was removed".into()),
        () = shim.rebooted() => Some("The guest was started anew".into()),
        () = shim.stopped() => Some("The shim was stopped".into()),
    };
    drop(open);
    let outcome = Outcome {
        reason,
        bytes_out: out.into_inner(),
        bytes_in: back.into_inner(),
        duration: started.elapsed(),
        ..Outcome::default()
    };
    shim.audit.ended(attempt, outcome);
    // Either may be a guest.
    tokio::join!(
        leave_halves(&mut opener.reader, &mut opener.writer),
        leave_halves(&mut target.reader, &mut target.writer),
    );
}
