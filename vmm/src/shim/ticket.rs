//! Tickets: 32 random bytes as 64 hexadecimal digits. Those of a boot prove that root in the guest speaks; those of
//! a grant admit one session.

use super::{limits, protocol::Grant};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// A secret that is only ever compared in constant time, and never shown.
#[derive(Clone)]
pub(super) struct Ticket(String);

impl Ticket {
    /// A new one, from the kernel's random numbers.
    pub(super) fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The text that a peer repeats.
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Whether `other` is this ticket. How long it takes does not tell how much of it was right.
    pub(super) fn is(&self, other: &str) -> bool {
        let (a, b) = (self.0.as_bytes(), other.as_bytes());
        let difference = a.iter().zip(b).fold(0, |sum, (a, b)| black_box(sum | (a ^ b)));
        (a.len() == b.len()) & (difference == 0)
    }
}

/// The tickets of the guest's present boot.
///
/// Each control channel gets a fresh one, because it is sent before the guest has told its boot id. The one before
/// stays good in the same boot: the agent may be opening a link with it when the channel is replaced. Another boot
/// id ends both.
#[derive(Default)]
pub(super) struct BootTickets {
    boot_id: Option<String>,
    offered: Option<Ticket>,
    current: Option<Ticket>,
    previous: Option<Ticket>,
}

impl BootTickets {
    /// A ticket that goes into a greeting now. The agent may use it before its answer has come back.
    pub(super) fn offer(&mut self, ticket: Ticket) {
        self.offered = Some(ticket);
    }

    /// The agent has taken the offered ticket. Returns whether the guest has been started anew since the last one.
    pub(super) fn taken(&mut self, boot_id: &str) -> bool {
        let same = self.boot_id.as_deref() == Some(boot_id);
        self.previous = self.current.take().filter(|_| same);
        self.current = self.offered.take();
        self.boot_id.replace(boot_id.into()).is_some() && !same
    }

    /// Whether a guest that repeats `ticket` has it from a control channel of this boot.
    pub(super) fn admit(&self, ticket: &str) -> bool {
        // No short cut between the three.
        [&self.offered, &self.current, &self.previous]
            .into_iter()
            .flatten()
            .fold(false, |found, known| found | known.is(ticket))
    }
}

/// Why a grant was not taken or not accepted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum GrantError {
    #[error("The ticket is unknown, or was used already")]
    Unknown,
    #[error("The ticket has expired")]
    Expired,
    #[error("A ticket has 64 hexadecimal digits")]
    Malformed,
    #[error("Limit of {} grants that are not used yet is reached", limits::GRANTS)]
    TooMany,
}

/// Sessions that `laird` has allowed and nobody has opened yet.
#[derive(Default)]
pub(super) struct Grants(Vec<(Ticket, Grant, Instant)>);

impl Grants {
    /// Keeps a grant until it is used or expired. `unix_ms` and `now` are the same moment. From here on only the monotonic clock
    /// counts: the host's may be set meanwhile.
    pub(super) fn add(&mut self, grant: Grant, unix_ms: u64, now: Instant) -> Result<(), GrantError> {
        self.0.retain(|(_, _, until)| *until > now);
        if grant.ticket.len() != 64 || !grant.ticket.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(GrantError::Malformed);
        }
        let left = Duration::from_millis(grant.expires_unix_ms.saturating_sub(unix_ms)).min(limits::GRANT);
        if left.is_zero() {
            return Err(GrantError::Expired);
        }
        if self.0.len() >= limits::GRANTS {
            return Err(GrantError::TooMany);
        }
        let until = now.checked_add(left).ok_or(GrantError::Expired)?;
        self.0.push((Ticket(grant.ticket.clone()), grant, until));
        Ok(())
    }

    /// The grant of a ticket, for its one use.
    pub(super) fn take(&mut self, ticket: &str, now: Instant) -> Result<Grant, GrantError> {
        let found = self.0.iter().enumerate().fold(
            None,
            |found, (at, (known, _, _))| {
                if known.is(ticket) { Some(at) } else { found }
            },
        );
        let (_, grant, until) = self.0.remove(found.ok_or(GrantError::Unknown)?);
        if until <= now {
            return Err(GrantError::Expired);
        }
        Ok(grant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::protocol::Session;

    #[test]
    fn tickets_are_random_and_compare_whole() {
        let (a, b) = (Ticket::random().unwrap(), Ticket::random().unwrap());
        assert_eq!(a.text().len(), 64);
        assert!(a.is(a.text()) && !a.is(b.text()));
        assert!(!a.is(&a.text()[..63]) && !a.is("") && !a.is(&format!("{}0", a.text())));
    }

    #[test]
    fn vs9_tickets_of_an_earlier_boot_are_worthless() {
        let tickets: Vec<_> = (0..4).map(|_| Ticket::random().unwrap()).collect();
        let mut boot = BootTickets::default();
        assert!(!boot.admit(tickets[0].text()));
        boot.offer(tickets[0].clone());
        assert!(boot.admit(tickets[0].text()), "The agent may be faster than its answer");
        boot.taken("boot-1");
        boot.offer(tickets[1].clone());
        boot.taken("boot-1");
        assert!(boot.admit(tickets[0].text()) && boot.admit(tickets[1].text()));
        boot.offer(tickets[2].clone());
        boot.taken("boot-1");
        assert!(!boot.admit(tickets[0].text()), "Only the one before stays good");
        boot.offer(tickets[3].clone());
        boot.taken("boot-2");
        assert!(boot.admit(tickets[3].text()));
        assert!(!boot.admit(tickets[1].text()) && !boot.admit(tickets[2].text()));
    }

    fn grant(digit: char, expires_unix_ms: u64) -> Grant {
        let ticket = digit.to_string().repeat(64);
        Grant { ticket, expires_unix_ms, uid: 1000, session: Session::Connect { port: 22 } }
    }

    #[test]
    fn vs11_a_grant_is_good_for_one_use_in_its_time() {
        let mut grants = Grants::default();
        let now = Instant::now();
        let later = |ms| now + Duration::from_millis(ms);
        grants.add(grant('a', 100), 50, now).unwrap();
        grants.add(grant('b', 100), 50, now).unwrap();
        assert_eq!(grants.take(&"c".repeat(64), later(10)).unwrap_err(), GrantError::Unknown);
        assert_eq!(grants.take(&"a".repeat(64), later(10)).unwrap().ticket, "a".repeat(64));
        assert_eq!(grants.take(&"a".repeat(64), later(10)).unwrap_err(), GrantError::Unknown);
        assert_eq!(grants.take(&"b".repeat(64), later(50)).unwrap_err(), GrantError::Expired);
        assert_eq!(grants.take(&"b".repeat(64), later(10)).unwrap_err(), GrantError::Unknown);
    }

    #[test]
    fn sv6_a_clock_that_is_set_neither_ends_a_grant_nor_prolongs_it() {
        let mut grants = Grants::default();
        let now = Instant::now();
        grants.add(grant('a', 10_000), 0, now).unwrap();
        // Given an hour ago by a clock that was set back since.
        grants.add(grant('b', 3_610_000), 0, now).unwrap();
        // Whatever the date is by now.
        assert!(grants.take(&"a".repeat(64), now + Duration::from_secs(9)).is_ok());
        assert_eq!(grants.take(&"b".repeat(64), now + limits::GRANT).unwrap_err(), GrantError::Expired);
    }

    #[test]
    fn grants_are_checked_and_bounded() {
        let mut grants = Grants::default();
        let now = Instant::now();
        assert_eq!(grants.add(grant('g', 100), 0, now), Err(GrantError::Malformed));
        assert_eq!(grants.add(grant('a', 100), 100, now), Err(GrantError::Expired));
        for _ in 0..limits::GRANTS {
            grants.add(grant('a', 100), 0, now).unwrap();
        }
        assert_eq!(grants.add(grant('b', 100), 0, now), Err(GrantError::TooMany));
        grants.add(grant('b', 300), 200, now + Duration::from_millis(200)).unwrap();
        assert_eq!(grants.0.len(), 1, "Expired ones make room");
    }
}
