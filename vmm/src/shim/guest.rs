//! What is known of the guest besides its state: its figures, its clock, when it booted.
//!
//! All of it is the guest's own word: cut and escaped here, believed by nobody.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    clock::{Cause, ClockWatch, HostClocks, Sample},
    devices,
    note::foreign,
    protocol::Figures,
    state::unix_ms,
};
use crate::vm::trace::{self, Times};
use lair_guest::wire::message::{Moment, Phase, Statistics};

/// The most moments of a guest's trace.
const MOMENTS: usize = 64;

/// The most file systems in a guest's figures.
const DISKS: usize = 32;

/// What is known of the guest.
pub(super) struct Known {
    /// The boot that all of it is about.
    boot_id: Option<String>,
    pub(super) times: Times,
    pub(super) figures: Option<Box<Figures>>,
    clock: ClockWatch,
    /// When the present boot was lost, by the clock of moments: for the trace of the next one.
    lost_ms: Option<u64>,
    /// When the agent was heard last, milliseconds since 1970.
    pub(super) heard_unix_ms: Option<u64>,
    /// What it says of its devices.
    pub(super) devices: devices::Known,
}

impl Known {
    /// What a shim that starts now knows.
    pub(super) fn new() -> Self {
        let mut known = Self {
            boot_id: None,
            times: Times::default(),
            figures: None,
            clock: ClockWatch::default(),
            lost_ms: None,
            heard_unix_ms: None,
            devices: devices::Known::new(),
        };
        known.mark("shim");
        known
    }

    /// Notes what happened now on the host, the first time in a boot.
    pub(super) fn mark(&mut self, name: &str) {
        if !self.times.host.iter().any(|moment| moment.name == name) {
            self.times.mark(name, trace::now_ms());
        }
    }

    /// The guest answered a greeting. With another boot id than before everything begins anew.
    pub(super) fn contact(&mut self, boot_id: &str, phase: Phase) {
        if self.boot_id.as_ref().is_some_and(|known| known != boot_id) {
            self.times = Times::default();
            if let Some(at_ms) = self.lost_ms {
                self.times.mark("lost", at_ms);
            }
            self.figures = None;
            self.clock = ClockWatch::default();
            self.devices.forget();
        }
        self.boot_id = Some(boot_id.into());
        self.lost_ms = None;
        self.heard();
        self.mark(match phase {
            Phase::Init => "init",
            Phase::Agent => "agent",
        });
    }

    /// There is no channel to the guest any more, or still none.
    pub(super) fn lost(&mut self) {
        self.lost_ms.get_or_insert_with(trace::now_ms);
    }

    /// The agent said something.
    pub(super) fn heard(&mut self) {
        self.heard_unix_ms = Some(unix_ms());
    }

    /// The guest is ready, with this trace.
    pub(super) fn ready(&mut self, trace: Vec<Moment>, uptime_ms: u64) {
        self.mark("ready");
        let ready = Moment { name: "ready".into(), at_ms: uptime_ms };
        let trace = trace.into_iter().take(MOMENTS);
        let trace = trace.map(|moment| Moment { name: foreign(&moment.name), at_ms: moment.at_ms });
        self.times.guest = trace.chain([ready]).collect();
    }

    /// Takes figures that were asked for at `asked` and are here now. Returns by how many milliseconds the guest's clock is off, if it
    /// is to be set, and why.
    pub(super) fn answered(&mut self, mut figures: Statistics, asked: HostClocks) -> Option<(i64, Cause)> {
        let now = HostClocks::now();
        let sample = Sample::new(asked, now, figures.uptime_ms, figures.unix_ms);
        // The first answer of a boot tells it best: a pause later on would move it.
        self.times.guest_start_ms.get_or_insert(sample.guest_start_ms());
        figures.disks.truncate(DISKS);
        for disk in &mut figures.disks {
            disk.mount = foreign(&disk.mount);
        }
        self.figures = Some(Box::new(Figures {
            at_unix_ms: now.unix_ms,
            clock_skew_ms: sample.skew_ms(),
            round_trip_ms: sample.round_trip_ms,
            statistics: figures,
        }));
        let cause = self.clock.judge(sample)?;
        Some((sample.skew_ms(), cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::message::DiskUse;

    fn names(moments: &[Moment]) -> Vec<&str> {
        moments.iter().map(|moment| moment.name.as_str()).collect()
    }

    #[test]
    fn a_new_boot_begins_anew() {
        let mut known = Known::new();
        known.contact("one", Phase::Init);
        known.contact("one", Phase::Agent);
        known.contact("one", Phase::Agent);
        known.ready(vec![Moment { name: "kernel".into(), at_ms: 0 }], 2500);
        assert_eq!(names(&known.times.host), ["shim", "init", "agent", "ready"]);
        assert_eq!(names(&known.times.guest), ["kernel", "ready"]);
        let asked = HostClocks::now();
        let figures = Statistics { unix_ms: asked.unix_ms, uptime_ms: 1, ..Statistics::default() };
        assert_eq!(known.answered(figures, asked), None);
        assert!(known.figures.is_some() && known.times.guest_start_ms.is_some());

        // Lost for a moment, and then for good: a boot begins with the end of the one before.
        known.lost();
        known.contact("one", Phase::Agent);
        known.lost();
        known.lost();
        known.contact("two", Phase::Agent);
        assert_eq!(names(&known.times.host), ["lost", "agent"]);
        assert!(known.times.guest.is_empty() && known.figures.is_none());
        assert_eq!(known.times.guest_start_ms, None);
    }

    #[test]
    fn vs5_figures_and_traces_are_cut_and_escaped() {
        let mut known = Known::new();
        let disk = DiskUse { mount: "\u{1b}[2J".repeat(1000), total: u64::MAX, available: u64::MAX };
        let figures = Statistics { disks: vec![disk; 1000], ..Statistics::default() };
        let told = known.answered(figures, HostClocks::now());
        assert!(matches!(told, Some((1.., Cause::Off))), "A clock of 1970: {told:?}");
        let disks = &known.figures.as_ref().unwrap().statistics.disks;
        assert!(disks.len() == DISKS && disks[0].mount.starts_with("\\u{1b}[2J"));
        known.ready(vec![Moment { name: "\n".repeat(1000), at_ms: u64::MAX }; 1000], 7);
        assert_eq!(known.times.guest.len(), MOMENTS + 1);
        assert!(
            known.times.guest.iter().all(|moment| !moment.name.contains('\n') && moment.name.len() < 2000)
        );
    }
}
