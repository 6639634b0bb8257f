//! Links: the guest's ends of the connections that the host permits.
//!
//! The host says with each greeting which links there are. Listeners follow; connections that are open stay.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

mod incoming;
mod outgoing;
mod relay;

use super::{bucket::Bucket, log::Log};
use lair_guest::wire::message::{IncomingLink, OutgoingLink};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
};

/// The most connections of all links together that may be open.
const MAX_CONNECTIONS: usize = 1024;

/// The links of this VM and their listeners.
pub(super) struct Links {
    shared: Shared,
    outgoing: Vec<(OutgoingLink, Tasks)>,
    incoming: Vec<(IncomingLink, Tasks)>,
}

/// What every connection needs.
#[derive(Clone)]
struct Shared {
    log: Log,
    /// Bounds the lines about links, whatever clients do.
    bucket: Arc<Mutex<Bucket>>,
    connections: Arc<Semaphore>,
    /// The ticket of this boot.
    ticket: watch::Sender<String>,
}

impl Shared {
    fn say(&self, line: &str) {
        let passes = self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        match passes {
            Some(0) => self.log.say(line),
            Some(dropped) => {
                self.log.say(&format!("{line} ({dropped} lines about links were dropped before)"))
            }
            None => {}
        }
    }

    /// The right to one more connection.
    fn permit(&self, link: &str) -> Option<OwnedSemaphorePermit> {
        let permit = self.connections.clone().try_acquire_owned().ok();
        if permit.is_none() {
            self.say(&format!("link `{link}`: refused, {MAX_CONNECTIONS} connections are open"));
        }
        permit
    }
}

/// The listening tasks of one link.
struct Tasks(Vec<JoinHandle<()>>);

impl Tasks {
    /// Ends them; when this returns, what they listened on is free.
    async fn end(self) {
        for task in self.0 {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Links {
    pub(super) fn new(log: Log) -> Self {
        let bucket = Bucket::new(5, Duration::from_secs(1), Instant::now());
        Self {
            shared: Shared {
                log,
                bucket: Arc::new(Mutex::new(bucket)),
                connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
                ticket: watch::Sender::new(String::new()),
            },
            outgoing: Vec::new(),
            incoming: Vec::new(),
        }
    }

    /// Makes the listeners those of these links. What can not listen is logged and tried again at the next greeting.
    pub(super) async fn apply(
        &mut self,
        ticket: String,
        outgoing: Vec<OutgoingLink>,
        incoming: Vec<IncomingLink>,
    ) {
        self.shared.ticket.send_replace(ticket);

        // All that goes first: a link may take over another one's name or port.
        let new_outgoing = retain(&mut self.outgoing, outgoing, |link| outgoing::clean_up(&link.name)).await;
        let new_incoming = retain(&mut self.incoming, incoming, |_| ()).await;
        for link in new_outgoing {
            match outgoing::listen(&self.shared, &link) {
                Ok(tasks) => self.outgoing.push((link, tasks)),
                Err(error) => {
                    self.shared.log.say(&format!("link `{}`: {}", link.name, super::report::chain(&error)))
                }
            }
        }
        for link in new_incoming {
            match incoming::listen(&self.shared, &link) {
                Ok(tasks) => self.incoming.push((link, tasks)),
                Err(error) => {
                    self.shared.log.say(&format!("link `{}`: {}", link.name, super::report::chain(&error)))
                }
            }
        }
    }
}

/// Ends the listeners of what is no longer wanted, or not as it was; what is wanted and not there.
async fn retain<L: PartialEq>(running: &mut Vec<(L, Tasks)>, wanted: Vec<L>, ended: impl Fn(&L)) -> Vec<L> {
    for (link, tasks) in std::mem::take(running) {
        if wanted.contains(&link) {
            running.push((link, tasks));
        } else {
            tasks.end().await;
            ended(&link);
        }
    }
    wanted.into_iter().filter(|link| running.iter().all(|(there, _)| there != link)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn shared() -> Shared {
        Links::new(Log::start().unwrap()).shared
    }

    #[tokio::test]
    async fn only_what_changed_is_stopped_or_started() {
        let task = || Tasks(vec![tokio::spawn(std::future::pending())]);
        let mut running = vec![("kept", task()), ("gone", task())];
        let ended = std::cell::RefCell::new(Vec::new());
        let new = retain(&mut running, vec!["new", "kept"], |link| ended.borrow_mut().push(*link)).await;
        assert_eq!(new, ["new"]);
        assert_eq!(*ended.borrow(), ["gone"]);
        assert_eq!(running.len(), 1);
        assert!(running[0].0 == "kept" && !running[0].1.0[0].is_finished());
    }

    #[tokio::test]
    async fn vs1_connections_have_a_cap() {
        let shared = shared();
        let open: Vec<_> = (0..MAX_CONNECTIONS).map(|_| shared.permit("x").unwrap()).collect();
        assert!(shared.permit("x").is_none());
        drop(open);
        assert!(shared.permit("x").is_some());
    }
}
