//! The health of a device over one lease: how it was when a VM got it, what was said against it, how it was when it came back. Pure.
//!
//! Windows (BARs) that have another size than before are noted and no fault: a resizable one may have been set to another size on purpose, by the
//! guest's driver or by the host's, and works in any of its sizes. A window that is gone is one: no driver can use the device without it.
//! The speed of a link is noted nowhere: an idle GPU lowers it by itself. Lanes that are lost are a quarantine anyway.

use super::{
    fault::Fault,
    machine::{Reason, State},
};
use crate::{
    fleet::units::Size,
    host::pci::{Address, AerCounts, Device, Speed},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The most kinds of messages that are kept of a lease: a guest can say what it wants.
pub const FAULTS_MAX: usize = 32;

/// The longest text of a message that is kept, in characters.
const TEXT_MAX: usize = 200;

/// One lease of devices that go together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Certificate {
    /// The VM.
    pub vm: String,
    /// When it got them.
    pub taken: jiff::Timestamp,
    /// When they were reset after it, or could not be.
    #[serde(default)]
    pub returned: Option<jiff::Timestamp>,
    /// Each function, by address.
    pub functions: Vec<FunctionHealth>,
    /// How long the last reset before it took, in milliseconds.
    #[serde(default)]
    pub reset_before_ms: Option<u64>,
    /// How long the reset after it took, in milliseconds.
    #[serde(default)]
    pub reset_after_ms: Option<u64>,
    /// What the guest's kernel said against them meanwhile, one for each function and kind.
    #[serde(default)]
    pub faults: Vec<FaultCount>,
    /// Whether there were more kinds than are kept.
    #[serde(default)]
    pub more_faults: bool,
    /// What came of it, once they are back.
    #[serde(default)]
    pub verdict: Option<Verdict>,
    /// Why nobody gets them.
    #[serde(default)]
    pub reason: Option<String>,
    /// The boot of the guest that told of its devices last. None where no guest did: then nobody knows what its kernel said.
    #[serde(default)]
    pub guest_boot: Option<String>,
    /// What a guest that ran already had said before the lease began: it tells sums, and what was in the same place before may have been another
    /// device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<Sums>,
}

/// What a guest has said since it booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sums {
    /// The boot.
    pub boot: String,
    /// How often, of each place and kind.
    pub counts: Vec<Sum>,
}

/// How often a guest has said one thing of one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sum {
    /// The address in the guest.
    pub place: String,
    /// What.
    #[serde(flatten)]
    pub fault: Fault,
    /// How often.
    pub count: u64,
}

/// One function of a device over a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FunctionHealth {
    /// Where it is.
    pub address: Address,
    /// How it was before.
    pub before: Measure,
    /// How it was after; none where it could not be looked at.
    #[serde(default)]
    pub after: Option<Measure>,
}

/// How a function is at one moment, after a reset.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Measure {
    /// Its windows.
    pub windows: Vec<Window>,
    /// How fast its link is.
    pub speed: Option<Speed>,
    /// How many lanes its link has.
    pub width: Option<u8>,
    /// The errors of PCI Express that the host's kernel has counted.
    pub aer: Option<AerCounts>,
}

/// A window through which a device is reached (base address register).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Window {
    /// Its number.
    pub index: u8,
    /// Its size in bytes.
    pub size: u64,
}

/// Messages of one kind about one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FaultCount {
    /// The function.
    pub address: Address,
    /// What they say.
    #[serde(flatten)]
    pub fault: Fault,
    /// How many there were.
    pub count: u64,
    /// How many of them in the guest's last boot.
    #[serde(default)]
    pub in_this_boot: u64,
    /// The first of them, in the guest's words.
    pub text: String,
}

/// What came of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All is as before, and nothing was said against it.
    Healthy,
    /// Something was said against it, or is not as before; the next VM gets it nevertheless.
    Noted,
    /// Nobody gets it.
    Quarantined,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Healthy => "healthy",
            Self::Noted => "noted",
            Self::Quarantined => "quarantined",
        })
    }
}

/// What a guest says, for one function.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// The boot in which it was counted.
    pub boot: &'a str,
    /// Where that is in the guest.
    pub place: &'a str,
    /// The function of the host's.
    pub address: Address,
    /// What.
    pub fault: Fault,
    /// How often in this boot.
    pub count: u64,
    /// The first of them.
    pub text: &'a str,
}

impl Measure {
    /// That of a device.
    pub fn of(device: &Device, aer: Option<AerCounts>) -> Self {
        let windows = device.bars.iter().map(|bar| Window { index: bar.index, size: bar.size });
        Self { windows: windows.collect(), speed: device.link.speed, width: device.link.width, aer }
    }

    fn window(&self, index: u8) -> Option<u64> {
        self.windows.iter().find(|window| window.index == index && window.size > 0).map(|window| window.size)
    }
}

impl Certificate {
    /// A lease that begins.
    pub fn begin(
        vm: &str,
        functions: &[(Address, Measure)],
        reset_ms: Option<u64>,
        earlier: Option<Sums>,
        now: jiff::Timestamp,
    ) -> Self {
        let function = |(address, before): &(Address, Measure)| FunctionHealth {
            address: *address,
            before: before.clone(),
            after: None,
        };
        Self {
            vm: vm.into(),
            taken: now,
            returned: None,
            functions: functions.iter().map(function).collect(),
            reset_before_ms: reset_ms,
            reset_after_ms: None,
            faults: vec![],
            more_faults: false,
            verdict: None,
            reason: None,
            guest_boot: None,
            earlier,
        }
    }

    /// Whether the VM has the devices still.
    pub fn is_open(&self) -> bool {
        self.returned.is_none()
    }

    /// A guest tells of its devices; whether it is the first time in this lease.
    pub fn hear(&mut self, boot: &str) -> bool {
        let is_first = self.guest_boot.is_none();
        if self.guest_boot.as_deref() != Some(boot) {
            self.guest_boot = Some(boot.into());
            self.faults.iter_mut().for_each(|known| known.in_this_boot = 0);
        }
        is_first
    }

    /// Takes what a guest says; whether it was not said before in this lease. A guest tells sums of its boot, so that it may say the same
    /// thing again; sums of earlier boots stay, and what was said before the lease is none of its.
    pub fn note(&mut self, said: Said<'_>) -> bool {
        self.hear(said.boot);
        let earlier = self.earlier.iter().filter(|sums| sums.boot == said.boot).flat_map(|sums| &sums.counts);
        let mut same = earlier.filter(|sum| sum.place == said.place && sum.fault == said.fault);
        // At least one, where only a port has told of it.
        let count = said.count.max(1).saturating_sub(same.next().map_or(0, |sum| sum.count.max(1)));
        if count == 0 {
            return false;
        }
        let same = |known: &&mut FaultCount| known.address == said.address && known.fault == said.fault;
        if let Some(known) = self.faults.iter_mut().find(same) {
            let more = count.saturating_sub(known.in_this_boot);
            known.count = known.count.saturating_add(more);
            known.in_this_boot = known.in_this_boot.max(count);
            return false;
        }
        if self.faults.len() >= FAULTS_MAX {
            self.more_faults = true;
            return false;
        }
        let text = said.text.chars().take(TEXT_MAX).collect();
        let Said { address, fault, .. } = said;
        self.faults.push(FaultCount { address, fault, count, in_this_boot: count, text });
        true
    }

    /// The lease is over. `quarantined` says why nobody gets the devices, if nobody does.
    pub fn end(
        &mut self,
        functions: &[(Address, Measure)],
        reset_ms: Option<u64>,
        quarantined: Option<&Reason>,
        now: jiff::Timestamp,
    ) {
        for function in &mut self.functions {
            let after = functions.iter().find(|(address, _)| *address == function.address);
            function.after = after.map(|(_, measure)| measure.clone());
        }
        self.reset_after_ms = reset_ms;
        self.returned = Some(now);
        self.reason = quarantined.map(ToString::to_string);
        self.verdict = Some(match quarantined {
            Some(_) => Verdict::Quarantined,
            None if self.findings().is_empty() => Verdict::Healthy,
            None => Verdict::Noted,
        });
    }

    /// Why the device cannot be used any more, by how it is after the lease.
    pub fn lost_window(&self, functions: &[(Address, Measure)]) -> Option<Reason> {
        self.functions.iter().find_map(|function| {
            let (address, after) = functions.iter().find(|(address, _)| *address == function.address)?;
            let lost = function
                .before
                .windows
                .iter()
                .find(|window| window.size > 0 && after.window(window.index).is_none())?;
            let what = format!("its window {} of {} is gone", lost.index, Size(lost.size));
            Some(Reason::Faulty { address: address.to_string(), what })
        })
    }

    /// All that was said, or is not as before, in words.
    pub fn findings(&self) -> Vec<String> {
        let several = self.functions.len() > 1;
        let of = |address: Address| if several { format!("{address}: ") } else { String::new() };
        let mut findings = Vec::new();
        for fault in &self.faults {
            let times = if fault.count > 1 { format!(", {} times", fault.count) } else { String::new() };
            findings.push(format!("{}{}{times}", of(fault.address), fault.fault));
        }
        if self.more_faults {
            findings.push(format!("more than {FAULTS_MAX} kinds of messages"));
        }
        for function in &self.functions {
            let Some(after) = &function.after else { continue };
            for before in &function.before.windows {
                let what = match after.window(before.index) {
                    Some(size) if size == before.size => continue,
                    Some(size) => format!("has {}, had {}", Size(size), Size(before.size)),
                    None if before.size == 0 => continue,
                    None => format!("of {} is gone", Size(before.size)),
                };
                findings.push(format!("{}window {} {what}", of(function.address), before.index));
            }
            if let (Some(before), Some(width)) = (function.before.width, after.width)
                && width != before
            {
                findings.push(format!("{}link has {width} lanes, had {before}", of(function.address)));
            }
            if let Some(counts) = function.aer() {
                for (count, kind) in
                    [(counts.corrected, "corrected"), (counts.nonfatal, "non-fatal"), (counts.fatal, "fatal")]
                {
                    if count > 0 {
                        findings.push(format!(
                            "{}{count} {kind} PCIe errors counted by the host",
                            of(function.address)
                        ));
                    }
                }
            }
        }
        findings
    }

    /// How many messages of NVIDIA's driver there were.
    pub fn xids(&self) -> u64 {
        let xids = self.faults.iter().filter(|fault| matches!(fault.fault, Fault::Xid { .. }));
        xids.fold(0, |sum, fault| sum.saturating_add(fault.count))
    }

    /// How many errors of PCI Express there were, as the host counts them where it does, otherwise as the guest says.
    pub fn aer_errors(&self) -> u64 {
        let counted = self.functions.iter().filter_map(FunctionHealth::aer);
        let counted = counted.map(|c| c.corrected.saturating_add(c.nonfatal).saturating_add(c.fatal));
        let said = self.faults.iter().filter(|fault| matches!(fault.fault, Fault::Aer { .. }));
        let said = said.fold(0, |sum: u64, fault| sum.saturating_add(fault.count));
        counted.fold(0, u64::saturating_add).max(said)
    }

    /// One line about a lease that is over, for the audit log.
    pub fn summary(&self) -> String {
        let verdict = self.verdict.map_or_else(|| "open".into(), |verdict| verdict.to_string());
        let reason = self.reason.as_ref().map(|reason| format!(", as {reason}")).unwrap_or_default();
        let returned = self.returned.unwrap_or(self.taken);
        let seconds = returned.as_second().saturating_sub(self.taken.as_second());
        let reset = |ms: Option<u64>| ms.map_or_else(|| "none".into(), |ms| format!("{ms} ms"));
        let findings = match self.findings() {
            findings if findings.is_empty() => "windows and link as before".into(),
            findings => findings.join("; "),
        };
        format!(
            "{verdict} after {seconds} s{reason}; resets {} before, {} after; {}; {findings}",
            reset(self.reset_before_ms),
            reset(self.reset_after_ms),
            self.errors(),
        )
    }

    /// How many errors there were, in words.
    pub fn errors(&self) -> String {
        let xids = match self.guest_boot {
            Some(_) => format!("{} Xids", self.xids()),
            None => "no word from the guest".into(),
        };
        format!("{xids}, {} PCIe errors", self.aer_errors())
    }
}

impl FunctionHealth {
    /// The errors of PCI Express in this lease, as the host has counted them.
    pub fn aer(&self) -> Option<AerCounts> {
        Some(self.after.as_ref()?.aer?.since(self.before.aer?))
    }
}

/// What a change of state means for the lease: one begins, or the one that is open is over.
pub fn follow(
    lease: &mut Option<Certificate>,
    before: &State,
    after: &State,
    look: &[(Address, Measure)],
    reset_ms: Option<u64>,
    earlier: impl FnOnce(&str) -> Option<Sums>,
    now: jiff::Timestamp,
) -> Option<Certificate> {
    match (before, after) {
        (State::Bound { .. }, State::Leased { vm }) => {
            *lease = Some(Certificate::begin(vm, look, reset_ms, earlier(vm), now));
            None
        }
        (State::Resetting, State::Free | State::Quarantined { .. }) => {
            let lease = lease.as_mut().filter(|lease| lease.is_open())?;
            let quarantined = match after {
                State::Quarantined { reason } => Some(reason),
                _ => None,
            };
            // Without a look at it there was no reset that worked.
            let reset_ms = reset_ms.filter(|_| !look.is_empty());
            lease.end(look, reset_ms, quarantined, now);
            Some(lease.clone())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passthrough::fault::AerSeverity;
    use proptest::prelude::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    const GPU: &str = "0000:01:00.0";
    const SOUND: &str = "0000:01:00.1";

    fn at(seconds: i64) -> jiff::Timestamp {
        jiff::Timestamp::from_second(seconds).unwrap()
    }

    fn measure(size: u64, width: u8, corrected: u64) -> Measure {
        let aer = AerCounts { corrected, ..AerCounts::default() };
        Measure {
            windows: vec![Window { index: 0, size: 16 << 20 }, Window { index: 1, size }],
            speed: Speed::parse("16.0 GT/s PCIe"),
            width: Some(width),
            aer: Some(aer),
        }
    }

    fn whole(size: u64, width: u8, corrected: u64) -> Vec<(Address, Measure)> {
        vec![(address(GPU), measure(size, width, corrected)), (address(SOUND), Measure::default())]
    }

    fn begun() -> Certificate {
        Certificate::begin("builder", &whole(256 << 20, 16, 3), Some(120), None, at(1000))
    }

    fn xid(number: u32, count: u64) -> Said<'static> {
        let text = "NVRM: Xid";
        Said {
            boot: "one",
            place: "0000:05:00.0",
            address: address(GPU),
            fault: Fault::Xid { number },
            count,
            text,
        }
    }

    #[test]
    fn a_lease_without_anything_to_tell_is_healthy() {
        let mut lease = begun();
        assert!(lease.is_open() && lease.verdict.is_none());
        // An idle GPU has lowered its link's speed.
        let mut after = whole(256 << 20, 16, 3);
        after[0].1.speed = Speed::parse("2.5 GT/s PCIe");
        assert_eq!(lease.lost_window(&after), None);
        assert!(lease.summary().contains("no word from the guest, 0 PCIe errors"));
        assert!(lease.hear("one") && !lease.hear("one"));
        lease.end(&after, Some(130), None, at(1600));
        assert_eq!(lease.verdict, Some(Verdict::Healthy));
        insta::assert_snapshot!(lease.summary(), @"healthy after 600 s; resets 120 ms before, 130 ms after; 0 Xids, 0 PCIe errors; windows and link as before");
        let text = serde_json::to_string(&lease).unwrap();
        assert_eq!(serde_json::from_str::<Certificate>(&text).unwrap(), lease);
    }

    #[test]
    fn what_was_said_and_what_is_not_as_before_is_noted() {
        let mut lease = begun();
        assert!(lease.note(xid(31, 2)));
        lease.end(&whole(512 << 20, 16, 5), Some(130), None, at(1600));
        assert_eq!(lease.verdict, Some(Verdict::Noted));
        insta::assert_snapshot!(lease.summary(), @"noted after 600 s; resets 120 ms before, 130 ms after; 2 Xids, 2 PCIe errors; 0000:01:00.0: Xid 31 (memory page fault), 2 times; 0000:01:00.0: window 1 has 512MiB, had 256MiB; 0000:01:00.0: 2 corrected PCIe errors counted by the host");
    }

    #[test]
    fn vf11_a_window_that_is_gone_is_a_fault_and_one_of_another_size_is_none() {
        let lease = begun();
        assert_eq!(lease.lost_window(&whole(1 << 20, 16, 3)), None);
        let reason = lease.lost_window(&whole(0, 16, 3)).unwrap();
        assert_eq!(
            reason.to_string(),
            "0000:01:00.0 failed while a VM had it: its window 1 of 256MiB is gone"
        );
        let mut gone = whole(256 << 20, 16, 3);
        gone[0].1.windows.pop();
        assert_eq!(lease.lost_window(&gone), Some(reason));
    }

    #[test]
    fn counts_follow_the_guests_over_repetitions_and_reboots() {
        let mut lease = begun();
        let count = |lease: &Certificate| lease.faults[0].count;
        assert!(lease.note(xid(31, 1)));
        for (said, sum) in [(1, 1), (4, 4), (2, 4), (0, 4), (5, 5)] {
            assert!(!lease.note(xid(31, said)), "said before");
            assert_eq!(count(&lease), sum);
        }
        let again = Said { boot: "two", ..xid(31, 2) };
        assert!(!lease.note(again) && !lease.note(again));
        assert_eq!((count(&lease), lease.xids(), lease.faults.len()), (7, 7, 1));
        // Of another function it is something else; and what only a port has told of is one.
        let aer = Fault::Aer { severity: AerSeverity::Corrected };
        assert!(lease.note(Said { address: address(SOUND), fault: aer, ..xid(0, 0) }));
        assert_eq!((lease.faults[1].count, lease.aer_errors()), (1, 1));
    }

    #[test]
    fn a_lease_begins_and_ends_with_its_states_and_once() {
        let vm = || "a".to_owned();
        let (mut lease, look) = (None, whole(1, 16, 0));
        let mut step = |before: State, after: State, look: &[(Address, Measure)]| {
            let told = follow(&mut lease, &before, &after, look, Some(7), |_| None, at(5));
            (told.and_then(|lease| lease.verdict), lease.clone())
        };
        assert_eq!(step(State::Host, State::Probed { vm: vm() }, &look), (None, None));
        let (told, open) = step(State::Bound { vm: vm() }, State::Leased { vm: vm() }, &look);
        assert!(told.is_none() && open.unwrap().is_open());
        step(State::Leased { vm: vm() }, State::Resetting, &[]);
        let (told, closed) = step(State::Resetting, State::Free, &look);
        assert_eq!(told, Some(Verdict::Healthy));
        let closed = closed.unwrap();
        // It stays until the next one, and does not end again.
        let reason = Reason::Dead { address: GPU.into() };
        let (told, still) = step(State::Resetting, State::Quarantined { reason: reason.clone() }, &[]);
        assert_eq!((told, still), (None, Some(closed)));
        step(State::Bound { vm: vm() }, State::Leased { vm: vm() }, &look);
        let (told, dead) = step(State::Resetting, State::Quarantined { reason }, &[]);
        let dead = dead.unwrap();
        assert_eq!(told, Some(Verdict::Quarantined));
        assert_eq!((dead.reset_before_ms, dead.reset_after_ms), (Some(7), None));
        assert!(dead.functions.iter().all(|function| function.after.is_none()));
    }

    proptest! {
        /// Whatever a guest says: what is kept is bounded, and news come a bounded number of times.
        #[test]
        fn vs5_a_guest_that_lies_fills_nothing(
            said in prop::collection::vec((0_u32..200, any::<u64>(), 0_usize..3, "\\PC{0,300}"), 0..300),
        ) {
            let mut lease = begun();
            let mut news = 0;
            for (number, count, boot, text) in &said {
                let boot = ["one", "two", "three"][*boot];
                news += usize::from(lease.note(Said { boot, text, ..xid(*number, *count) }));
            }
            prop_assert!(news <= FAULTS_MAX && lease.faults.len() == news);
            prop_assert!(lease.faults.iter().all(|fault| fault.text.chars().count() <= TEXT_MAX));
            prop_assert!(serde_json::to_vec(&lease).unwrap().len() < 64 << 10);
        }
    }
}
