//! The boot trace of a VM: what happened when, on the host and in the guest, on one time line.
//!
//! Each machine notes moments by its own CLOCK_BOOTTIME, which nobody can set: all processes of the host share one. The guest's
//! begins with its kernel; when that was on the host's clock follows from an answer of the agent that told both.

use lair_guest::wire::message::Moment;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Which machine saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A process of the host.
    Host,
    /// The guest, in its own words.
    Guest,
}

/// One point of a boot trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// What happened.
    pub name: String,
    /// Who saw it.
    pub source: Source,
    /// Milliseconds since the first point.
    pub at_ms: u64,
}

/// What is known of a boot, each machine's moments by its own clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// The host's, milliseconds of its CLOCK_BOOTTIME.
    pub host: Vec<Moment>,
    /// The guest's, milliseconds since its kernel's start.
    pub guest: Vec<Moment>,
    /// When the guest's kernel started by the host's clock, once that is known.
    pub guest_start_ms: Option<u64>,
}

impl Times {
    /// Adds a moment of the host.
    pub fn mark(&mut self, name: &str, at_ms: u64) {
        self.host.push(Moment { name: name.into(), at_ms });
    }

    /// All of it on one time line, see [`merge`].
    pub fn merged(&self) -> Vec<Point> {
        merge(&self.host, &self.guest, self.guest_start_ms)
    }
}

/// Puts both machines' moments on one time line that begins with the first of them. Without the time of the guest's start
/// its moments have no place and are left out. Equal times keep the host's before the guest's, each in its order.
pub fn merge(host: &[Moment], guest: &[Moment], guest_start_ms: Option<u64>) -> Vec<Point> {
    let point = |source, start: u64| {
        move |moment: &Moment| Point {
            name: moment.name.clone(),
            source,
            at_ms: start.saturating_add(moment.at_ms),
        }
    };
    let guest = guest_start_ms.into_iter().flat_map(|start| guest.iter().map(point(Source::Guest, start)));
    let mut points: Vec<_> = host.iter().map(point(Source::Host, 0)).chain(guest).collect();
    points.sort_by_key(|point| point.at_ms);
    let first = points.first().map_or(0, |point| point.at_ms);
    for point in &mut points {
        point.at_ms = point.at_ms.saturating_sub(first);
    }
    points
}

/// The host's clock for moments: milliseconds since its kernel's start.
pub fn now_ms() -> u64 {
    // Linux has had this clock since 2.6.39, and no privilege is needed to read it.
    let since = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(of: &[(&str, u64)]) -> Vec<Moment> {
        of.iter().map(|(name, at_ms)| Moment { name: (*name).into(), at_ms: *at_ms }).collect()
    }

    fn told(points: &[Point]) -> Vec<(&str, Source, u64)> {
        points.iter().map(|point| (point.name.as_str(), point.source, point.at_ms)).collect()
    }

    #[test]
    fn two_machines_share_a_time_line() {
        let host = moments(&[("shim", 10_000), ("ready", 12_600), ("agent", 11_000)]);
        let guest = moments(&[("kernel", 0), ("init", 300), ("ready", 2_100)]);
        let points = merge(&host, &guest, Some(10_400));
        assert_eq!(
            told(&points),
            [
                ("shim", Source::Host, 0),
                ("kernel", Source::Guest, 400),
                ("init", Source::Guest, 700),
                ("agent", Source::Host, 1_000),
                ("ready", Source::Guest, 2_500),
                ("ready", Source::Host, 2_600),
            ]
        );
    }

    #[test]
    fn without_the_guests_start_only_the_hosts_moments_have_a_place() {
        let (host, guest) = (moments(&[("shim", 7)]), moments(&[("kernel", 0)]));
        assert_eq!(told(&merge(&host, &guest, None)), [("shim", Source::Host, 0)]);
        // A guest whose hypervisor was started before this shim.
        let points = merge(&host, &guest, Some(3));
        assert_eq!(told(&points), [("kernel", Source::Guest, 0), ("shim", Source::Host, 4)]);
        assert!(merge(&[], &[], Some(3)).is_empty());
    }

    #[test]
    fn vs10_times_that_make_no_sense_are_only_the_guests_own() {
        let (host, guest) = (moments(&[("shim", 5), ("ready", 9)]), moments(&[("forged", u64::MAX)]));
        let points = merge(&host, &guest, Some(u64::MAX));
        assert_eq!(told(&points)[..2], [("shim", Source::Host, 0), ("ready", Source::Host, 4)]);
        assert_eq!(points.len(), 3);
    }
}
