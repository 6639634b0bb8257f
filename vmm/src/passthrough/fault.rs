//! What is said against a device, and whether it is given to nobody else because of it. Pure.

use lair_guest::wire::message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is said against a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// A message of NVIDIA's driver.
    Xid {
        /// Its number in NVIDIA's catalogue.
        number: u32,
    },
    /// An error that PCI Express itself reports (Advanced Error Reporting).
    Aer {
        /// How bad it is.
        severity: AerSeverity,
    },
    /// Errors in a GPU's memory that could not be corrected (ECC). Those that matter to the next VM have a message of the driver's as well.
    Ecc,
    /// What a later `laird` has written down or says.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// How bad an error of PCI Express is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AerSeverity {
    /// The hardware has corrected it.
    Corrected,
    /// A transaction is lost, and the link works.
    Nonfatal,
    /// The link cannot be relied upon.
    Fatal,
}

/// What a message of NVIDIA's driver means for the next one who gets the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// Nobody gets it before an operator has looked at it.
    Fatal,
    /// It is kept in mind. A program can bring it about, or the reset between two VMs mends it.
    Noted,
}

/// Those messages that there are words for.
///
/// The weight follows NVIDIA's "Xid Catalog" (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, looked at in November 2026).
/// Fatal is what it answers with a restart of the machine (79), with a look at the hardware (48, 74), or with a reset of the GPU together with
/// support (62, 64, 140, 143, 158), and the two after which all that the GPU holds is in doubt or it obeys nobody any more (95; 119 and 120): whether our
/// own reset has mended those, nobody would see before the next tenant. 46 and 109 are answered with a reset as well; but a program that never
/// ends brings them about, and the reset is what each device gets between two VMs.
const XIDS: [(u32, Weight, &str); 26] = [
    (13, Weight::Noted, "exception of the graphics engine"),
    (31, Weight::Noted, "memory page fault"),
    (32, Weight::Noted, "corrupted push buffer"),
    (43, Weight::Noted, "a program's work was stopped"),
    (45, Weight::Noted, "a program's channels were removed"),
    (46, Weight::Noted, "the GPU stopped processing"),
    (48, Weight::Fatal, "double-bit memory error"),
    (54, Weight::Noted, "a power cable is missing"),
    (62, Weight::Fatal, "its internal micro-controller halted"),
    (63, Weight::Noted, "memory is about to be remapped"),
    (64, Weight::Fatal, "memory could not be remapped"),
    (69, Weight::Noted, "class error of the graphics engine"),
    (74, Weight::Fatal, "NVLink error"),
    (79, Weight::Fatal, "the GPU has fallen off the bus"),
    (92, Weight::Noted, "many single-bit memory errors"),
    (94, Weight::Noted, "memory error, contained"),
    (95, Weight::Fatal, "memory error, not contained"),
    (109, Weight::Noted, "a context switch timed out"),
    (119, Weight::Fatal, "its system processor does not answer"),
    (120, Weight::Fatal, "its system processor failed"),
    (140, Weight::Fatal, "unrecovered memory error"),
    (143, Weight::Fatal, "the GPU could not be initialised"),
    (154, Weight::Noted, "another recovery is asked for"),
    (156, Weight::Noted, "a part of it was retired"),
    (157, Weight::Noted, "a part of it could not be retired"),
    (158, Weight::Fatal, "fatal timeout"),
];

impl Fault {
    /// What a guest said, if it is known here.
    pub fn of(fault: message::Fault) -> Option<Self> {
        use message::AerSeverity as Theirs;
        match fault {
            message::Fault::Xid { number } => Some(Self::Xid { number }),
            message::Fault::Aer { severity } => Some(Self::Aer {
                severity: match severity {
                    Theirs::Corrected => AerSeverity::Corrected,
                    Theirs::Nonfatal => AerSeverity::Nonfatal,
                    Theirs::Fatal => AerSeverity::Fatal,
                },
            }),
            message::Fault::Unknown => None,
        }
    }

    /// Whether nobody else gets the device before an operator has looked at it.
    pub fn is_fatal(self) -> bool {
        match self {
            Self::Xid { number } => {
                XIDS.iter().any(|(known, weight, _)| *known == number && *weight == Weight::Fatal)
            }
            Self::Aer { severity } => severity == AerSeverity::Fatal,
            Self::Ecc | Self::Unknown => false,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xid { number } => {
                write!(f, "Xid {number}")?;
                match XIDS.iter().find(|(known, ..)| known == number) {
                    Some((_, _, words)) => write!(f, " ({words})"),
                    None => Ok(()),
                }
            }
            Self::Aer { severity } => f.write_str(match severity {
                AerSeverity::Corrected => "corrected PCIe error (AER)",
                AerSeverity::Nonfatal => "non-fatal PCIe error (AER)",
                AerSeverity::Fatal => "fatal PCIe error (AER)",
            }),
            Self::Ecc => f.write_str("uncorrected memory error (ECC)"),
            Self::Unknown => f.write_str("something that this release does not know"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vf11_what_is_fatal_is_told_from_what_a_program_can_bring_about() {
        let fatal = |numbers: &[u32]| numbers.iter().all(|number| Fault::Xid { number: *number }.is_fatal());
        assert!(fatal(&[48, 62, 64, 74, 79, 95, 119, 120, 140, 143, 158]));
        for number in [0, 13, 31, 43, 45, 46, 63, 92, 94, 109, 154, 9999, u32::MAX] {
            assert!(!Fault::Xid { number }.is_fatal(), "{number}");
        }
        let aer = |severity| Fault::Aer { severity };
        assert!(aer(AerSeverity::Fatal).is_fatal() && !aer(AerSeverity::Nonfatal).is_fatal());
        assert!(XIDS.windows(2).all(|pair| pair[0].0 < pair[1].0), "in order, none twice");
        assert_eq!(Fault::Xid { number: 79 }.to_string(), "Xid 79 (the GPU has fallen off the bus)");
        assert_eq!(Fault::Xid { number: 7 }.to_string(), "Xid 7");
        assert_eq!(Fault::of(message::Fault::Unknown), None);
    }
}
