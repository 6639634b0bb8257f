//! The PCI Express link of a device.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How fast and how wide the link is. An idle GPU lowers the speed to save power; lanes that are lost do not come back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Link {
    /// How fast it is now.
    pub speed: Option<Speed>,
    /// How fast it can be.
    pub max_speed: Option<Speed>,
    /// How many lanes it has now.
    pub width: Option<u8>,
    /// How many lanes it can have.
    pub max_width: Option<u8>,
}

/// A speed, in tenths of gigatransfers a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Speed(u32);

/// A text that is no speed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a speed, such as 8.0 GT/s")]
pub struct NotASpeed(String);

impl Speed {
    /// Releases of Linux write `8 GT/s`, `8.0 GT/s` or `8.0 GT/s PCIe`, and `Unknown` or `Unknown speed`.
    pub fn parse(text: &str) -> Option<Self> {
        let number = text.trim().split_once(" GT/s")?.0;
        let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
        let (whole, tenth): (u32, u32) = (whole.parse().ok()?, tenth.parse().ok().filter(|t| *t < 10)?);
        Some(Self(whole.checked_mul(10)?.checked_add(tenth)?))
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} GT/s", self.0 / 10, self.0 % 10)
    }
}

impl TryFrom<String> for Speed {
    type Error = NotASpeed;

    fn try_from(text: String) -> Result<Self, NotASpeed> {
        Self::parse(&text).ok_or(NotASpeed(text))
    }
}

impl From<Speed> for String {
    fn from(speed: Speed) -> Self {
        speed.to_string()
    }
}

/// A number of lanes; 0 and 255 are how Linux says that it does not know.
pub(super) fn width(text: &str) -> Option<u8> {
    text.trim().parse().ok().filter(|width| (1..=32).contains(width))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_release_writes_speeds_in_its_own_way() {
        for (text, speed) in [
            ("2.5 GT/s\n", Some("2.5 GT/s")),
            ("8 GT/s", Some("8.0 GT/s")),
            ("8.0 GT/s PCIe\n", Some("8.0 GT/s")),
            ("32.0 GT/s PCIe", Some("32.0 GT/s")),
            ("Unknown\n", None),
            ("Unknown speed", None),
            ("", None),
            ("4294967295 GT/s", None),
            ("2.55 GT/s", None),
            ("-1 GT/s", None),
        ] {
            assert_eq!(Speed::parse(text).map(|speed| speed.to_string()).as_deref(), speed, "{text:?}");
        }
        assert!(Speed::parse("8 GT/s") < Speed::parse("16.0 GT/s PCIe"));
    }

    #[test]
    fn a_width_that_the_kernel_does_not_know_is_none() {
        assert_eq!(
            ["16\n", "1", "0", "255", "x", ""].map(width),
            [Some(16), Some(1), None, None, None, None]
        );
    }
}
