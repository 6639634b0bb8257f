//! The links of one VM as they are configured now, with their counters.
//!
//! A connection outlives a reload as long as its link is still there and means the same; otherwise it is closed.

use super::{
    config::{Incoming, Outgoing, OutgoingTarget, ShimConfig},
    protocol::LinkCounters,
};
use lair_guest::wire::message::{IncomingLink, OutgoingLink};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use tokio::sync::watch;

/// The name under which the host opens links.
pub(super) const HOST: &str = "host";

/// What went over one link, while connections are at it.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) connections: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) bytes_in: AtomicU64,
}

/// A link in use: its counters, and word of its end.
#[derive(Debug, Clone)]
pub(super) struct InUse {
    pub(super) counters: Arc<Counters>,
    present: watch::Receiver<()>,
}

impl InUse {
    /// Waits until the link is taken from the configuration.
    pub(super) async fn removed(&self) {
        let mut present = self.present.clone();
        while present.changed().await.is_ok() {}
    }
}

struct Entry<T> {
    link: T,
    counters: Arc<Counters>,
    /// Dropped with the entry: every connection of the link sees that.
    present: watch::Sender<()>,
}

impl<T> Entry<T> {
    fn new(link: T) -> Self {
        Self { link, counters: Arc::default(), present: watch::Sender::new(()) }
    }

    fn in_use(&self) -> InUse {
        InUse { counters: self.counters.clone(), present: self.present.subscribe() }
    }
}

#[derive(Default)]
struct Table {
    outgoing: Vec<Entry<Outgoing>>,
    incoming: Vec<Entry<Incoming>>,
}

/// All links of one VM.
#[derive(Default)]
pub(super) struct Links(Mutex<Table>);

impl Links {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the links of a configuration in place of those there were.
    pub(super) fn apply(&self, config: &ShimConfig) {
        let mut table = self.table();
        let old = std::mem::take(&mut *table);
        table.outgoing =
            renew(old.outgoing, &config.outgoing, |a, b| a.link.name == b.link.name && a.to == b.to);
        table.incoming = renew(old.incoming, &config.incoming, |a, b| {
            let from_host = |link: &Incoming| link.from.iter().any(|from| from == HOST);
            (&a.name, a.port, &a.connect, from_host(a)) == (&b.name, b.port, &b.connect, from_host(b))
        });
    }

    /// A link that the guest may open.
    pub(super) fn outgoing(&self, name: &str) -> Option<(OutgoingTarget, InUse)> {
        let table = self.table();
        let entry = table.outgoing.iter().find(|entry| entry.link.link.name == name)?;
        Some((entry.link.to.clone(), entry.in_use()))
    }

    /// A link that ends in the guest.
    pub(super) fn incoming(&self, name: &str) -> Option<(Incoming, InUse)> {
        let table = self.table();
        let entry = table.incoming.iter().find(|entry| entry.link.name == name)?;
        Some((entry.link.clone(), entry.in_use()))
    }

    /// Whether the agent answers at a port of the guest, in frames.
    pub(super) fn is_framed(&self, port: u32) -> bool {
        self.table().incoming.iter().any(|entry| entry.link.port == port && entry.link.connect.is_some())
    }

    /// What the agent is told.
    pub(super) fn for_agent(&self) -> (Vec<OutgoingLink>, Vec<IncomingLink>) {
        let table = self.table();
        let outgoing = table.outgoing.iter().map(|entry| entry.link.link.clone()).collect();
        let incoming = table.incoming.iter().filter_map(|entry| entry.link.for_agent()).collect();
        (outgoing, incoming)
    }

    /// The links with a listener on the host: name and place.
    pub(super) fn host_listeners(&self) -> Vec<(String, String)> {
        let table = self.table();
        let open = table.incoming.iter().filter(|entry| entry.link.from.iter().any(|from| from == HOST));
        open.filter_map(|entry| Some((entry.link.name.clone(), entry.link.host_listen.clone()?))).collect()
    }

    /// The counters of `vm`'s links: those that the guest opens, and those that the host opens into it.
    pub(super) fn counters(&self, vm: &str) -> Vec<LinkCounters> {
        let table = self.table();
        let outgoing = table
            .outgoing
            .iter()
            .map(|entry| read(&entry.counters, &entry.link.link.name, vm, &target_name(&entry.link.to)));
        let from_host = table.incoming.iter().filter(|entry| entry.link.from.iter().any(|from| from == HOST));
        let incoming = from_host.map(|entry| read(&entry.counters, &entry.link.name, HOST, vm));
        outgoing.chain(incoming).collect()
    }
}

/// What an outgoing link reaches, for logs.
pub(super) fn target_name(to: &OutgoingTarget) -> String {
    match to {
        OutgoingTarget::Vm { vm, .. } => vm.clone(),
        OutgoingTarget::Host { socket } => socket.display().to_string(),
    }
}

fn read(counters: &Counters, link: &str, from: &str, to: &str) -> LinkCounters {
    LinkCounters {
        link: link.into(),
        from: from.into(),
        to: to.into(),
        connections: counters.connections.load(Relaxed),
        open: counters.open.load(Relaxed),
        refused: counters.refused.load(Relaxed),
        bytes_out: counters.bytes_out.load(Relaxed),
        bytes_in: counters.bytes_in.load(Relaxed),
    }
}

fn renew<T: Clone>(mut old: Vec<Entry<T>>, new: &[T], same: impl Fn(&T, &T) -> bool) -> Vec<Entry<T>> {
    let keep = |link: &T| match old.iter().position(|entry| same(&entry.link, link)) {
        Some(at) => Entry { link: link.clone(), ..old.swap_remove(at) },
        None => Entry::new(link.clone()),
    };
    new.iter().map(keep).collect()
}
