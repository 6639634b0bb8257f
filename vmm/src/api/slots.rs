//! How many connections each user may have: the oldest that has not asked for anything gives way. Pure, but for the word that it
//! sends to the one that gives way.

use super::limits::Limits;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// One connection that is open.
#[derive(Debug)]
struct Open {
    uid: u32,
    /// Whether its request has come; its answer may take as long as it takes.
    busy: bool,
    /// Dropped to close it.
    _alive: oneshot::Sender<()>,
}

/// The connections that are open, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Slots {
    next: u64,
    open: BTreeMap<u64, Open>,
    /// How many gave way.
    pub(super) dropped: u64,
    /// How many were not taken.
    pub(super) refused: u64,
}

impl Slots {
    /// A slot for a connection of `uid`, with what says that it has to give way; `None` if there is none. `owner` says that it is
    /// root or `laird`'s own user, for whom there is always one more.
    pub(super) fn take(
        &mut self,
        uid: u32,
        owner: bool,
        limits: &Limits,
    ) -> Option<(u64, oneshot::Receiver<()>)> {
        let extra = if owner { limits.reserved } else { 0 };
        let mine = self.open.values().filter(|open| open.uid == uid).count();
        if mine >= limits.per_uid && !self.give_way(|open| open.uid == uid) && mine >= limits.per_uid + extra
        {
            self.refused = self.refused.saturating_add(1);
            return None;
        }
        let most = limits.total.saturating_sub(limits.reserved - extra);
        if self.open.len() >= most && !self.give_way(|open| owner || open.uid == uid) {
            self.refused = self.refused.saturating_add(1);
            return None;
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let (alive, ended) = oneshot::channel();
        self.open.insert(id, Open { uid, busy: false, _alive: alive });
        Some((id, ended))
    }

    /// Closes the oldest idle connection of those meant; `false` if there is none.
    fn give_way(&mut self, meant: impl Fn(&Open) -> bool) -> bool {
        let oldest = self.open.iter().find(|(_, open)| !open.busy && meant(open)).map(|(id, _)| *id);
        let dropped = oldest.is_some_and(|id| self.open.remove(&id).is_some());
        self.dropped = self.dropped.saturating_add(u64::from(dropped));
        dropped
    }

    /// Says that a connection's request has come.
    pub(super) fn busy(&mut self, id: u64) {
        if let Some(open) = self.open.get_mut(&id) {
            open.busy = true;
        }
    }

    /// Gives a slot back.
    pub(super) fn leave(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u32 = 0;

    fn limits() -> Limits {
        Limits { per_uid: 128, total: 1024, reserved: 16, ..Limits::default() }
    }

    #[test]
    fn cl5_of_10_000_idle_connections_of_a_user_the_newest_128_stay() {
        let mut slots = Slots::default();
        let mut taken: Vec<_> = (0..10_000).map(|_| slots.take(4000, false, &limits()).unwrap()).collect();
        assert_eq!((slots.len(), slots.dropped, slots.refused), (128, 9872, 0));
        for (index, (_, ended)) in taken.iter_mut().enumerate() {
            let closed = ended.try_recv() == Err(oneshot::error::TryRecvError::Closed);
            assert_eq!(closed, index < 9872, "{index}");
        }
        // Neither another user nor root is touched by it.
        assert!(slots.take(4001, false, &limits()).is_some() && slots.take(ROOT, true, &limits()).is_some());
        assert_eq!((slots.len(), slots.dropped), (130, 9872));
    }

    #[test]
    fn cl5_what_is_busy_does_not_give_way_and_root_has_a_slot_left() {
        let mut slots = Slots::default();
        let mut busy = |uid, owner, count| {
            let mut ids = Vec::new();
            for _ in 0..count {
                let Some((id, ended)) = slots.take(uid, owner, &limits()) else { break };
                slots.busy(id);
                ids.push((id, ended));
            }
            ids
        };
        // Nine users would need more than there is.
        let taken: Vec<_> = (0..9).map(|user| busy(4000 + user, false, 200)).collect();
        let counts: Vec<_> = taken.iter().map(Vec::len).collect();
        assert_eq!(counts, [128, 128, 128, 128, 128, 128, 128, 112, 0]);
        let root = busy(ROOT, true, 200);
        assert_eq!(root.len(), 16);
        assert!(slots.take(4000, false, &limits()).is_none() && slots.take(ROOT, true, &limits()).is_none());
        slots.leave(taken[0][0].0);
        assert!(slots.take(4000, false, &limits()).is_none(), "that one is reserved");
        assert!(slots.take(ROOT, true, &limits()).is_some());
    }

    #[test]
    fn cl5_root_may_have_more_than_others() {
        let mut slots = Slots::default();
        for number in 0..300 {
            let taken = slots.take(ROOT, true, &limits());
            assert_eq!(taken.is_some(), number < 144, "{number}");
            if let Some((id, ended)) = taken {
                slots.busy(id);
                std::mem::forget(ended);
            }
        }
    }
}
