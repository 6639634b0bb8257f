//! What happens, as a stream: a ring of the newest events that all readers share, so that no reader costs memory.
//!
//! A reader that is too slow finds that the ring has gone on without it, and gets an event that says how many it missed.

use super::{
    audit::now,
    limits,
    types::{Event, EventKind},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;

/// The events of one `laird`.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    next: u64,
    events: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self::beginning_at(first_id(jiff::Timestamp::now()))
    }
}

/// Ids rise from one `laird` to the next as well, as long as the clock does: nobody makes a thousand events in a millisecond.
fn first_id(now: jiff::Timestamp) -> u64 {
    u64::try_from(now.as_millisecond()).unwrap_or_default().saturating_mul(1000)
}

impl Events {
    fn beginning_at(id: u64) -> Self {
        Self { ring: Mutex::new(Ring { next: id, events: VecDeque::new() }), newest: watch::channel(id).0 }
    }

    /// Tells an event to whoever reads.
    pub fn publish(&self, kind: EventKind) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ring.next;
        ring.next = ring.next.saturating_add(1);
        if ring.events.len() >= limits::EVENTS {
            ring.events.pop_front();
        }
        ring.events.push_back(Event { id, time: now(), kind });
        self.newest.send_replace(ring.next);
    }

    /// A reader of events with larger ids than `after`, beginning with the oldest that is still known.
    pub fn reader(self: &Arc<Self>, after: Option<u64>) -> Reader {
        let (oldest, newest) = {
            let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            (ring.next.saturating_sub(u64::try_from(ring.events.len()).unwrap_or(u64::MAX)), ring.next)
        };
        // An id that is yet to come is of another `laird`, whose clock was ahead.
        let next = after.map(|id| id.saturating_add(1)).filter(|next| *next <= newest).unwrap_or(oldest);
        Reader { events: Arc::clone(self), next, newest: self.newest.subscribe() }
    }
}

/// Reads events at its own pace.
#[derive(Debug)]
pub struct Reader {
    events: Arc<Events>,
    next: u64,
    newest: watch::Receiver<u64>,
}

impl Reader {
    /// The next event, if it has happened.
    pub fn try_next(&mut self) -> Option<Event> {
        self.newest.borrow_and_update();
        let ring = self.events.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = ring.events.front()?;
        if self.next < oldest.id {
            let count = oldest.id.saturating_sub(self.next);
            // Its id is that of the last one that is missing.
            let id = oldest.id.saturating_sub(1);
            self.next = oldest.id;
            return Some(Event { id, time: now(), kind: EventKind::Dropped { count } });
        }
        let index = usize::try_from(self.next.saturating_sub(oldest.id)).unwrap_or(usize::MAX);
        let event = ring.events.get(index)?.clone();
        self.next = event.id.saturating_add(1);
        Some(event)
    }

    /// The next event, once it happens.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            if self.newest.changed().await.is_err() {
                // Not while this reader holds its sender.
                return std::future::pending().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(count: usize, events: &Events) {
        for _ in 0..count {
            events.publish(EventKind::Dropped { count: 0 });
        }
    }

    #[tokio::test]
    async fn cl12_a_reader_that_is_too_slow_is_told_how_much_it_missed() {
        let events = Arc::new(Events::beginning_at(1000));
        let (mut fast, mut slow) = (events.reader(None), events.reader(None));
        for _ in 0..3000 {
            started(1, &events);
            assert_eq!(fast.next().await.kind, EventKind::Dropped { count: 0 });
        }
        let missed = 3000 - u64::try_from(limits::EVENTS).unwrap();
        let first = slow.next().await;
        assert_eq!((first.id, first.kind), (1000 + missed - 1, EventKind::Dropped { count: missed }));
        for id in 1000 + missed..4000 {
            assert_eq!(slow.next().await.id, id);
        }
        assert_eq!((slow.try_next(), fast.try_next()), (None, None));
        assert_eq!(events.ring.lock().unwrap().events.len(), limits::EVENTS);
    }

    #[tokio::test]
    async fn a_reader_begins_where_it_is_told_and_waits_for_what_comes() {
        let events = Arc::new(Events::beginning_at(10));
        started(3, &events);
        assert_eq!(events.reader(None).try_next().unwrap().id, 10);
        assert_eq!(events.reader(Some(11)).try_next().unwrap().id, 12);
        let mut reader = events.reader(Some(12));
        let waiting = tokio::spawn(async move { reader.next().await.id });
        tokio::task::yield_now().await;
        started(1, &events);
        assert_eq!(waiting.await.unwrap(), 13);
    }

    #[test]
    fn ids_rise_over_restarts() {
        let id = |ms| first_id(jiff::Timestamp::from_millisecond(ms).unwrap());
        assert!(id(1_800_000_000_001) - id(1_800_000_000_000) == 1000 && id(4_000_000_000_000) < 1 << 53);
    }
}
