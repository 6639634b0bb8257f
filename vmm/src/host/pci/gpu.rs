//! NVIDIA's GPUs: which chip a device number is, and what it can do.
//!
//! Which numbers belong to which chip is from the PCI ID Repository (<https://pci-ids.ucw.cz>, also what `names` has; a test compares the
//! two), where NVIDIA takes blocks of 64 or 128 for a chip. Compute capabilities are from NVIDIA's list of CUDA GPUs
//! (<https://developer.nvidia.com/cuda-gpus>). A number that is in no block is a GPU that is older or newer than this table.

use super::id::{Class, Id, NVIDIA};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Gpu {
    /// Its chip, such as `AD104`.
    pub chip: String,
    /// The generation that the chip is of.
    pub architecture: Architecture,
    /// What CUDA programs may ask of it, such as `8.9`.
    pub compute_capability: String,
}

/// NVIDIA's generations, from Pascal on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// 2016.
    Pascal,
    /// 2017.
    Volta,
    /// 2018.
    Turing,
    /// 2020.
    Ampere,
    /// 2022.
    Ada,
    /// 2022, for data centres.
    Hopper,
    /// 2024.
    Blackwell,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pascal => "Pascal",
            Self::Volta => "Volta",
            Self::Turing => "Turing",
            Self::Ampere => "Ampere",
            Self::Ada => "Ada Lovelace",
            Self::Hopper => "Hopper",
            Self::Blackwell => "Blackwell",
        })
    }
}

/// A block of device numbers.
struct Block(u16, u16, &'static str, Architecture, &'static str);

const BLOCKS: [Block; 36] = {
    use Architecture::{Ada, Ampere, Blackwell, Hopper, Pascal, Turing, Volta};
    [
        Block(0x15c0, 0x15ff, "GP100", Pascal, "6.0"),
        Block(0x1720, 0x172f, "GP100", Pascal, "6.0"),
        Block(0x1b00, 0x1b7f, "GP102", Pascal, "6.1"),
        Block(0x1b80, 0x1bff, "GP104", Pascal, "6.1"),
        Block(0x1c00, 0x1c7f, "GP106", Pascal, "6.1"),
        Block(0x1c80, 0x1cff, "GP107", Pascal, "6.1"),
        Block(0x1d00, 0x1d7f, "GP108", Pascal, "6.1"),
        Block(0x1d80, 0x1dff, "GV100", Volta, "7.0"),
        Block(0x1e00, 0x1e7f, "TU102", Turing, "7.5"),
        Block(0x1e80, 0x1eff, "TU104", Turing, "7.5"),
        Block(0x1f00, 0x1f7f, "TU106", Turing, "7.5"),
        Block(0x1f80, 0x1fff, "TU117", Turing, "7.5"),
        Block(0x2080, 0x20ff, "GA100", Ampere, "8.0"),
        Block(0x2180, 0x21ff, "TU116", Turing, "7.5"),
        Block(0x2200, 0x227f, "GA102", Ampere, "8.6"),
        Block(0x2300, 0x23ff, "GH100", Hopper, "9.0"),
        Block(0x2400, 0x247f, "GA103", Ampere, "8.6"),
        Block(0x2480, 0x24ff, "GA104", Ampere, "8.6"),
        Block(0x2500, 0x257f, "GA106", Ampere, "8.6"),
        Block(0x2580, 0x25ff, "GA107", Ampere, "8.6"),
        Block(0x2680, 0x26ff, "AD102", Ada, "8.9"),
        Block(0x2700, 0x277f, "AD103", Ada, "8.9"),
        Block(0x2780, 0x27ff, "AD104", Ada, "8.9"),
        Block(0x2800, 0x287f, "AD106", Ada, "8.9"),
        Block(0x2880, 0x28ff, "AD107", Ada, "8.9"),
        Block(0x2900, 0x297f, "GB100", Blackwell, "10.0"),
        Block(0x2980, 0x29ff, "GB102", Blackwell, "10.0"),
        Block(0x2b80, 0x2bff, "GB202", Blackwell, "12.0"),
        Block(0x2c00, 0x2c2b, "GB203", Blackwell, "12.0"),
        Block(0x2c2d, 0x2c7f, "GB203", Blackwell, "12.0"),
        Block(0x2d00, 0x2d2b, "GB206", Blackwell, "12.0"),
        Block(0x2d2d, 0x2d7f, "GB206", Blackwell, "12.0"),
        Block(0x2d80, 0x2dff, "GB207", Blackwell, "12.0"),
        Block(0x2e00, 0x2e7f, "GB20B", Blackwell, "12.1"),
        Block(0x2f00, 0x2f7f, "GB205", Blackwell, "12.0"),
        Block(0x3180, 0x31bf, "GB110", Blackwell, "10.3"),
    ]
};

/// What a device is, if it is a GPU of NVIDIA's that the table knows. Audio, USB and bridges of its have numbers of their own.
pub(super) fn gpu(vendor: Id, device: Id, class: Class) -> Option<Gpu> {
    if vendor != NVIDIA || !class.is_display() {
        return None;
    }
    let Block(_, _, chip, architecture, compute) =
        BLOCKS.iter().find(|Block(first, last, ..)| (*first..=*last).contains(&device.0))?;
    Some(Gpu { chip: (*chip).into(), architecture: *architecture, compute_capability: (*compute).into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pci_ids::{FromId, Vendor};

    const VGA: Class = Class(0x03_00_00);

    fn told(device: u16) -> String {
        let gpu = gpu(NVIDIA, Id(device), VGA);
        gpu.map_or("-".into(), |gpu| format!("{} {} {}", gpu.chip, gpu.architecture, gpu.compute_capability))
    }

    #[test]
    fn the_cards_of_the_farm_and_one_of_each_generation() {
        assert_eq!(told(0x1b80), "GP104 Pascal 6.1"); // GTX 1080
        assert_eq!(told(0x27b0), "AD104 Ada Lovelace 8.9"); // RTX 4000 SFF Ada
        assert_eq!(told(0x1db1), "GV100 Volta 7.0"); // V100
        assert_eq!(told(0x1e84), "TU104 Turing 7.5"); // RTX 2070 SUPER
        assert_eq!(told(0x20b0), "GA100 Ampere 8.0"); // A100
        assert_eq!(told(0x2204), "GA102 Ampere 8.6"); // RTX 3090
        assert_eq!(told(0x2330), "GH100 Hopper 9.0"); // H100
        assert_eq!(told(0x2901), "GB100 Blackwell 10.0"); // B200
        assert_eq!(told(0x2b85), "GB202 Blackwell 12.0"); // RTX 5090
        assert_eq!(told(0x1401), "-"); // Maxwell
        assert_eq!(told(0xffff), "-");
    }

    #[test]
    fn only_nvidias_display_controllers_are_looked_up() {
        assert_eq!(gpu(Id(0x1002), Id(0x1b80), VGA), None);
        assert_eq!(gpu(NVIDIA, Id(0x1b80), Class(0x04_03_00)), None);
        assert!(gpu(NVIDIA, Id(0x2330), Class(0x03_02_00)).is_some());
    }

    #[test]
    fn blocks_are_in_order_and_apart() {
        for pair in BLOCKS.windows(2) {
            assert!(pair[0].0 <= pair[0].1 && pair[0].1 < pair[1].0, "{:04x}", pair[0].0);
        }
    }

    /// `GP104GLM [Quadro P5000 Mobile]` is GP104; names without brackets are of audio, USB and bridges.
    #[test]
    fn the_table_says_the_chip_that_the_repository_says() {
        let generations = ["GP1", "GV1", "TU1", "GA1", "GH1", "AD1", "GB1", "GB2"];
        let mut compared = 0;
        for device in Vendor::from_id(NVIDIA.0).unwrap().devices() {
            let name = device.name();
            let ours = generations.iter().any(|generation| name.starts_with(generation));
            // NVSwitches have the name of the chip that they come with.
            if !ours || !name.contains('[') || name.contains("Switch") {
                continue;
            }
            assert_eq!(told(device.id()).get(..5), name.get(..5), "{:04x} {name}", device.id());
            compared += 1;
        }
        assert!(compared > 300, "{compared}");
    }
}
