//! The numbers by which a device says what it is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A vendor's or a device's number, in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[0-9a-f]{4}$", "format" = "pci-id"))]
pub struct Id(pub u16);

/// What kind of device it is: class, subclass and programming interface, in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[0-9a-f]{6}$"))]
pub struct Class(pub u32);

/// A text that is no such number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not {1} hexadecimal digits")]
pub struct NotANumber(String, usize);

/// NVIDIA.
pub const NVIDIA: Id = Id(0x10de);
/// AMD, which was ATI: GPUs have this number, chipsets another.
pub const AMD: Id = Id(0x1002);

/// A number of so many digits, as sysfs (`0x10de`) or JSON (`10de`) writes it.
fn number(text: &str, digits: usize) -> Option<u32> {
    let text = text.trim();
    let text = text.strip_prefix("0x").unwrap_or(text);
    let well_formed = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u32::from_str_radix(text, 16).ok().filter(|_| well_formed)
}

impl Id {
    /// Reads four digits.
    pub fn parse(text: &str) -> Option<Self> {
        number(text, 4).and_then(|number| u16::try_from(number).ok()).map(Self)
    }
}

impl Class {
    /// Reads six digits.
    pub fn parse(text: &str) -> Option<Self> {
        number(text, 6).map(Self)
    }

    /// Class and subclass.
    pub fn pair(self) -> (u8, u8) {
        let [_, class, subclass, _] = self.0.to_be_bytes();
        (class, subclass)
    }

    /// A GPU: a controller of displays, or of the same kind without any.
    pub fn is_display(self) -> bool {
        self.pair().0 == 0x03
    }

    /// What it is, in a few words, for the kinds that come with a GPU or stand in its way.
    pub fn word(self) -> &'static str {
        match self.pair() {
            (0x01, 0x06) => "SATA controller",
            (0x01, 0x08) => "NVMe controller",
            (0x01, _) => "storage controller",
            (0x02, 0x00) => "Ethernet controller",
            (0x02, _) => "network controller",
            (0x03, 0x00) => "VGA controller",
            (0x03, 0x02) => "3D controller",
            (0x03, _) => "display controller",
            (0x04, 0x03) => "audio device",
            (0x04, _) => "multimedia device",
            (0x05, _) => "memory controller",
            (0x06, 0x00) => "host bridge",
            (0x06, 0x01) => "ISA bridge",
            (0x06, 0x04) => "PCI bridge",
            (0x06, _) => "bridge",
            (0x07, _) => "communication controller",
            (0x08, _) => "system peripheral",
            (0x0c, 0x03) => "USB controller",
            (0x0c, 0x05) => "SMBus",
            (0x0c, _) => "serial bus controller",
            (0x10, _) => "encryption controller",
            (0x12, _) => "accelerator",
            _ => "device",
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl TryFrom<String> for Id {
    type Error = NotANumber;

    fn try_from(text: String) -> Result<Self, NotANumber> {
        Self::parse(&text).ok_or(NotANumber(text, 4))
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for Class {
    type Error = NotANumber;

    fn try_from(text: String) -> Result<Self, NotANumber> {
        Self::parse(&text).ok_or(NotANumber(text, 6))
    }
}

impl From<Class> for String {
    fn from(class: Class) -> Self {
        class.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_digits_and_no_others() {
        assert_eq!(Id::parse("0x10de\n"), Some(NVIDIA));
        assert_eq!(Id::parse("10de"), Some(NVIDIA));
        assert_eq!(Class::parse("0x030200\n"), Some(Class(0x03_02_00)));
        for bad in ["", "0x", "10d", "0x10de0", "+10d", "10dg"] {
            assert_eq!(Id::parse(bad), None, "{bad}");
        }
        assert_eq!(Class::parse("0x0302"), None);
    }

    #[test]
    fn classes_in_words() {
        let word = |class: u32| Class(class).word();
        assert_eq!(word(0x03_00_00), "VGA controller");
        assert_eq!(word(0x03_02_00), "3D controller");
        assert_eq!(word(0x0c_80_00), "serial bus controller");
        assert_eq!(word(0xff_ff_ff), "device");
        assert!(Class(0x03_80_00).is_display() && !Class(0x04_03_00).is_display());
    }
}
