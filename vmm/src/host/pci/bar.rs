//! The windows through which a device is reached (base address registers), from the file `resource` of sysfs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

// Flags of the kernel's resources (Linux, include/linux/ioport.h).
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCHABLE: u64 = 0x2000;
const WIDE: u64 = 0x10_0000;

/// One window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Bar {
    /// Its number, 0 to 5. One of 64 bits takes the next number as well.
    pub index: u8,
    /// What it is a window of.
    pub space: Space,
    /// Whether it may be above 4 GiB.
    pub is_64bit: bool,
    /// Whether reading from it changes nothing.
    pub prefetchable: bool,
    /// Its size in bytes.
    pub size: u64,
    /// The sizes that it could have, in bytes, from small to large; absent if it has one for ever (no Resizable BAR, or a kernel before 6.1).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sizes: Vec<u64>,
}

/// What a window is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// Memory.
    Memory,
    /// Ports.
    Io,
}

/// The windows in a file `resource`: a line for each, `start end flags`; zeros where there is none. What follows the first six lines are
/// the ROM and the windows of bridges.
pub(super) fn bars(resource: &str) -> Vec<Bar> {
    (0..6).zip(resource.lines()).filter_map(|(index, line)| bar(index, line)).collect()
}

fn bar(index: u8, line: &str) -> Option<Bar> {
    let mut numbers =
        line.split_ascii_whitespace().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    let space = match (flags & MEMORY != 0, flags & IO != 0) {
        (true, _) => Space::Memory,
        (false, true) => Space::Io,
        (false, false) => return None,
    };
    let size = end.checked_sub(start)?.checked_add(1)?;
    let (is_64bit, prefetchable) = (flags & WIDE != 0, flags & PREFETCHABLE != 0);
    Some(Bar { index, space, is_64bit, prefetchable, size, sizes: vec![] })
}

/// The sizes in a file `resourceN_resize`: a number whose lowest bit stands for 1 MiB, the next for twice that, and so on.
pub(super) fn sizes(text: &str) -> Option<Vec<u64>> {
    let set = u64::from_str_radix(text.trim(), 16).ok()?;
    // None has more than half of all addresses.
    Some((0..43).filter(|bit| set >> bit & 1 == 1).map(|bit| 1 << (20 + bit)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_and_flags_of_each_window() {
        let text = "0x00000000d7000000 0x00000000d7ffffff 0x0000000000040200\n\
                    0x00000000c0000000 0x00000000cfffffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000000000 0x0000001fffffffff 0x000000002014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x000000000000b000 0x000000000000b07f 0x0000000000040101\n\
                    0x00000000d8000000 0x00000000d807ffff 0x0000000000046200\n";
        let memory = |index, size, wide| Bar {
            index,
            space: Space::Memory,
            is_64bit: wide,
            prefetchable: wide,
            size,
            sizes: vec![],
        };
        let io = Bar {
            index: 5,
            space: Space::Io,
            is_64bit: false,
            prefetchable: false,
            size: 128,
            sizes: vec![],
        };
        // The last is the ROM.
        assert_eq!(
            bars(text),
            [memory(0, 16 << 20, false), memory(1, 256 << 20, true), memory(3, 128 << 30, true), io]
        );
    }

    #[test]
    fn lines_that_make_no_sense_are_no_windows() {
        assert_eq!(bars(""), []);
        assert_eq!(bars("0x2 0x1 0x200\nx y z\n0x0 0xffffffffffffffff 0x200\n0x1 0x2\n1 2 0x200\n"), []);
    }

    #[test]
    fn vf13_the_sizes_that_a_window_could_have() {
        // 256 MiB and what is between it and 32 GiB.
        let expected: Vec<u64> = (28..=35).map(|bit| 1 << bit).collect();
        assert_eq!(sizes("000000000000ff00\n"), Some(expected));
        assert_eq!(sizes("0000000000000001"), Some(vec![1 << 20]));
        assert_eq!(sizes("ffffffffffffffff").unwrap().last(), Some(&(1 << 62)));
        assert_eq!(sizes("0000000000000000"), Some(vec![]));
        assert_eq!((sizes(""), sizes("0xff"), sizes("10000000000000000")), (None, None, None));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\PC|\n){0,200}") {
            prop_assert!(bars(&text).len() <= 6);
            sizes(&text);
        }
    }
}
