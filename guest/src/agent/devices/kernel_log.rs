//! What the kernel's log says against devices.
//!
//! A record of `/dev/kmsg` is `PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;TEXT`, and perhaps lines of fields, each of which begins with a blank
//! (Linux, Documentation/ABI/testing/dev-kmsg). Control characters in the text are escaped by the kernel. A program of the guest can write
//! records as well, but none that the kernel gives the facility 0, which is its own.
//!
//! | who | what |
//! |---|---|
//! | NVIDIA's driver | `NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.`; older ones without `PCI:`; of a part of a GPU (MIG) with ` GPU-I:05` behind the address |
//! | the kernel, of the device | `nvme 0000:01:00.0: PCIe Bus Error: severity=Uncorrectable (Fatal), type=…`; some releases have `AER: ` before it and `Uncorrected` in it |
//! | the kernel, of a port | `pcieport 0000:00:1c.0: AER: Multiple Corrected error received: 0000:01:00.0`; since 6.9 `error message received from 0000:01:00.0` |
//!
//! Of one error of PCI Express the kernel mostly says both, so a message of a port is not counted.

use super::pci;
use lair_guest::wire::message::{AerSeverity, DeviceFault, Fault};

/// The longest text of a message that is told, in bytes.
pub(super) const TEXT_MAX: usize = 160;

/// The most kinds of messages that are told.
pub(super) const FAULTS_MAX: usize = 32;

/// A message against a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    /// The device.
    pub(super) address: String,
    /// What it says.
    pub(super) fault: Fault,
    /// Whether it is one more, or only says that there is one.
    pub(super) counts: bool,
    /// The text.
    pub(super) text: String,
}

/// Reads one line of `/dev/kmsg`. `None` if it is not against a device.
pub(super) fn parse(line: &[u8]) -> Option<Said> {
    let line = String::from_utf8_lossy(line);
    let (prefix, text) = line.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    let is_the_kernels = priority < 8;
    if !is_the_kernels {
        return None;
    }
    let (address, fault, counts) = xid(text).or_else(|| bus_error(text)).or_else(|| received(text))?;
    Some(Said { address, fault, counts, text: pci::cut(text, TEXT_MAX) })
}

type Parsed = (String, Fault, bool);

fn xid(text: &str) -> Option<Parsed> {
    let (place, rest) = text.strip_prefix("NVRM: Xid (")?.split_once("): ")?;
    let place = place.split(' ').next()?;
    let address = pci::address(place.strip_prefix("PCI:").unwrap_or(place))?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((address, Fault::Xid { number: digits.parse().ok()? }, true))
}

fn bus_error(text: &str) -> Option<Parsed> {
    let (who, said) = text.split_once(": ")?;
    let said = said.strip_prefix("AER: ").unwrap_or(said).strip_prefix("PCIe Bus Error: severity=")?;
    let severity = severity(said.split(',').next()?)?;
    Some((pci::address(who.rsplit(' ').next()?)?, Fault::Aer { severity }, true))
}

fn received(text: &str) -> Option<Parsed> {
    let (_, said) = text.split_once(": AER: ")?;
    let (what, from) =
        said.split_once(" error received: ").or_else(|| said.split_once(" error message received from "))?;
    let severity = severity(what.strip_prefix("Multiple ").unwrap_or(what))?;
    Some((pci::address(from.split_ascii_whitespace().next()?)?, Fault::Aer { severity }, false))
}

/// Words of the kernel, which were others until 6.9.
fn severity(words: &str) -> Option<AerSeverity> {
    match words {
        "Corrected" | "Correctable" => Some(AerSeverity::Corrected),
        "Uncorrected (Non-Fatal)" | "Uncorrectable (Non-Fatal)" => Some(AerSeverity::Nonfatal),
        "Uncorrected (Fatal)" | "Uncorrectable (Fatal)" => Some(AerSeverity::Fatal),
        _ => None,
    }
}

/// Adds a message to those that there were; whether that is news to who knows them. `left_out` counts those for which there is no room. Where
/// there is none, a device of which much is told makes room for one of which less is: the last word of a GPU is not to be lost for what
/// others have said before.
pub(super) fn add(faults: &mut Vec<DeviceFault>, left_out: &mut u64, said: Said) -> bool {
    let is_known = |known: &DeviceFault| known.address == said.address && known.fault == said.fault;
    if faults.len() >= FAULTS_MAX && !faults.iter().any(is_known) {
        let of = |address: &str| faults.iter().filter(|known| known.address == address).count();
        let most = faults.iter().map(|known| of(&known.address)).max().unwrap_or_default();
        let last = faults.iter().rposition(|known| of(&known.address) == most);
        if let Some(last) = last.filter(|_| of(&said.address).saturating_add(1) < most) {
            faults.remove(last);
            *left_out = left_out.saturating_add(1);
        }
    }
    let has_room = faults.len() < FAULTS_MAX;
    match faults.iter_mut().find(|known| known.address == said.address && known.fault == said.fault) {
        Some(known) if said.counts => known.count = known.count.saturating_add(1),
        Some(_) => return false,
        None if has_room => {
            let Said { address, fault, text, counts } = said;
            faults.push(DeviceFault { address, fault, count: u64::from(counts), text });
        }
        None => *left_out = left_out.saturating_add(1),
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(text: &str) -> String {
        match parse(format!("3,1234,5678901,-;{text}").as_bytes()) {
            None => "-".into(),
            Some(Said { address, fault: Fault::Xid { number }, .. }) => format!("{address} Xid {number}"),
            Some(Said { address, fault: Fault::Aer { severity }, counts, .. }) => {
                format!("{address} {severity:?}{}", if counts { "" } else { " announced" })
            }
            Some(said) => panic!("{said:?}"),
        }
    }

    #[test]
    fn messages_of_each_release_are_understood() {
        for (text, expected) in [
            ("NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.", "0000:01:00.0 Xid 79"),
            (
                "NVRM: Xid (PCI:0000:c1:00): 13, pid='<unknown>', name=<unknown>, Graphics SM Warp Exception",
                "0000:c1:00.0 Xid 13",
            ),
            ("NVRM: Xid (0000:03:00): 14, Channel 00000001", "0000:03:00.0 Xid 14"),
            ("NVRM: Xid (PCI:0000:01:00.0): 154, GPU recovery action changed", "0000:01:00.0 Xid 154"),
            ("NVRM: Xid (PCI:0000:01:00): 79", "0000:01:00.0 Xid 79"),
            ("NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7, Contained", "0000:01:00.0 Xid 94"),
            ("NVRM: Xid (PCI:0000:01:00 GPU-I:05 GPU-CI:02): 13, pid=7", "0000:01:00.0 Xid 13"),
            ("NVRM: Xid (PCI:0000:01:00): GPU has fallen off the bus.", "-"),
            ("NVRM: Xid (43, pid: 5678): ROBUST_CHANNEL", "-"),
            ("NVRM: Xid (PCI:0000:01:00): 99999999999, too much", "-"),
            ("NVRM: GPU at PCI:0000:01:00: GPU-b850f46d-d5ea-c752-ddf3-c4453e44d3f7", "-"),
            (" NVRM: Xid (PCI:0000:01:00): 79, not at the beginning", "-"),
            (
                "nvme 0000:01:00.0: PCIe Bus Error: severity=Uncorrectable (Fatal), type=Inaccessible, (Unregistered Agent ID)",
                "0000:01:00.0 Fatal",
            ),
            (
                "nvidia 0000:03:00.0: AER: PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)",
                "0000:03:00.0 Corrected",
            ),
            (
                "snd_hda_intel 0000:03:00.1: PCIe Bus Error: severity=Uncorrected (Non-Fatal), type=Transaction Layer, id=0301(Requester ID)",
                "0000:03:00.1 Nonfatal",
            ),
            (
                "pcieport 0000:00:1c.0: AER: Uncorrected (Fatal) error received: 0000:01:00.0",
                "0000:01:00.0 Fatal announced",
            ),
            (
                "pcieport 0000:00:1c.0: AER: Multiple Uncorrectable (Non-Fatal) error message received from 0000:73:00.1",
                "0000:73:00.1 Nonfatal announced",
            ),
            (
                "pcieport 0000:00:1c.0: AER: Correctable error message received from 0000:01:00.0",
                "0000:01:00.0 Corrected announced",
            ),
            ("pcieport 0000:00:1c.5: AER: Multiple Corrected error received: id=00e5", "-"),
            ("nvme 0000:01:00.0: PCIe Bus Error: severity=Strange, type=None", "-"),
            ("nvidia 0000:03:00.0: AER: can't recover (no error_detected callback)", "-"),
            ("EXT4-fs (vda): mounted filesystem", "-"),
        ] {
            assert_eq!(told(text), expected, "{text}");
        }
    }

    #[test]
    fn vs3_what_a_program_of_the_guest_writes_into_the_kernels_log_is_nothing() {
        let text = "NVRM: Xid (PCI:0000:01:00): 79, pid=1, forged";
        let line = |priority: &str| parse(format!("{priority},1,2,-;{text}").as_bytes());
        assert_eq!(line("7").unwrap().text, text);
        for others in ["8", "12", "4294967296", "-1", "", "x"] {
            assert_eq!(line(others), None, "{others:?}");
        }
    }

    #[test]
    fn vs5_kinds_are_counted_and_bounded() {
        let (mut faults, mut left_out) = (Vec::new(), 0);
        let mut add = |text: &str| {
            let said = parse(format!("3,1,2,-;{text}").as_bytes()).unwrap();
            super::add(&mut faults, &mut left_out, said)
        };
        // An error of which port and device speak is one; the device's message may be missing.
        assert!(add("pcieport 0000:00:1c.0: AER: Corrected error received: 0000:01:00.0"));
        assert!(!add("pcieport 0000:00:1c.0: AER: Corrected error received: 0000:01:00.0"));
        assert!(add(
            "nvme 0000:01:00.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)"
        ));
        for number in 0..100 {
            let text = format!("NVRM: Xid (PCI:0000:01:00): {}, {}", number % 50, "\u{1b}x".repeat(1000));
            assert!(add(&text));
        }
        assert_eq!((faults.len(), faults[0].count, left_out), (FAULTS_MAX, 1, 38));
        assert!(faults[1..].iter().all(|fault| fault.count == 2 && !fault.text.contains('\u{1b}')));
        // A report of the worst is a message that the host takes: 32 of these, with devices and GPUs.
        faults[1].text = "\"".repeat(TEXT_MAX);
        assert!(serde_json::to_vec(&vec![faults[1].clone(); FAULTS_MAX]).unwrap().len() < 20 << 10);
    }

    #[test]
    fn vs5_the_last_word_of_a_gpu_is_not_lost_for_what_others_have_said() {
        let (mut faults, mut left_out) = (Vec::new(), 0);
        let mut add = |gpu: u32, xid: u32| {
            let said =
                parse(format!("3,1,2,-;NVRM: Xid (PCI:0000:{gpu:02x}:00): {xid}, x").as_bytes()).unwrap();
            super::add(&mut faults, &mut left_out, said)
        };
        for (gpu, xid) in (1..9).flat_map(|gpu| [13, 31, 43, 45].map(|xid| (gpu, xid))) {
            add(gpu, xid);
        }
        add(9, 79);
        add(9, 79);
        add(10, 48);
        let count = |gpu: u32| faults.iter().filter(|f| f.address == format!("0000:{gpu:02x}:00.0")).count();
        assert_eq!((faults.len(), count(9), count(10), left_out), (FAULTS_MAX, 1, 1, 2));
        assert!((1..9).all(|gpu| count(gpu) >= 3), "{faults:?}");
        assert_eq!(faults.iter().find(|f| f.address == "0000:09:00.0").unwrap().count, 2);
    }

    proptest! {
        #[test]
        fn vs4_no_line_panics_and_no_text_is_longer_than_it_may_be(
            line in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..300),
                "[0-9]{0,3},1,2,-;(NVRM: Xid \\(|nvme |pcieport )(PCI:)?[0-9a-f:.]{0,14}(\\): |: AER: |: PCIe Bus Error: severity=)\\PC{0,200}"
                    .prop_map(String::into_bytes),
            ],
        ) {
            if let Some(said) = parse(&line) {
                prop_assert!(said.text.len() <= 3 * TEXT_MAX && !said.text.contains(char::is_control));
                prop_assert_eq!(pci::address(&said.address), Some(said.address));
            }
        }
    }
}
