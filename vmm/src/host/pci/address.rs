//! Where a PCI device is: `domain:bus:device.function`, as the kernel writes it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A PCI address such as `0000:01:00.0`. There is one text for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\\.[0-7]$", "format" = "pci-address"))]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a PCI address, which is DOMAIN:BUS:DEVICE.FUNCTION in lower-case hexadecimal, such as 0000:01:00.0{}",
    .meant.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default()
)]
pub struct NotAnAddress {
    text: String,
    meant: Option<Address>,
}

impl Address {
    /// That of function 0 of a device on a machine's first bus; none where no bus has so many.
    pub fn on_the_first_bus(device: u8) -> Option<Self> {
        (device < 32).then_some(Self { domain: 0, bus: 0, device, function: 0 })
    }

    /// The number of the function.
    pub fn function(self) -> u8 {
        self.function
    }

    /// Whether both are functions of one card.
    pub fn same_card(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Padded as a whole.
        let text = format!("{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function);
        f.pad(&text)
    }
}

impl FromStr for Address {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        if let Some(address) = parse(text) {
            return Ok(address);
        }
        let lower = text.trim().to_ascii_lowercase();
        let meant = parse(&lower).or_else(|| parse(&format!("0000:{lower}")));
        // Whoever wrote it need not see all of it again.
        Err(NotAnAddress { text: text.chars().take(40).collect(), meant })
    }
}

fn parse(text: &str) -> Option<Address> {
    // The longest has a domain of eight digits.
    if text.len() > 16 {
        return None;
    }
    let mut parts = text.splitn(3, ':');
    let (domain, bus, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let (device, function) = rest.split_once('.')?;
    let address = Address {
        domain: u32::from_str_radix(domain, 16).ok()?,
        bus: u8::from_str_radix(bus, 16).ok()?,
        device: u8::from_str_radix(device, 16).ok().filter(|device| *device < 32)?,
        function: u8::from_str_radix(function, 16).ok().filter(|function| *function < 8)?,
    };
    // Other texts of the same numbers (`+1`, `001`, capitals) would be other names of the same device.
    (address.to_string() == text).then_some(address)
}

impl TryFrom<String> for Address {
    type Error = NotAnAddress;

    fn try_from(text: String) -> Result<Self, NotAnAddress> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn vf1_only_the_kernels_own_writing_is_an_address() {
        for good in ["0000:00:00.0", "0000:ff:1f.7", "10000:00:05.0", "7fffffff:00:00.0"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "0000:00:00",
            "0000:00:20.0",
            "0000:00:00.8",
            "0000:100:00.0",
            "000:00:00.0",
            "00000:00:00.0",
            "0000:00:0.0",
            "0000:+1:00.0",
            "0000:00:00.00",
            "0000:00:00.0 ",
            "0000:00:00.0\n",
            "0000:00:00.0/../x",
            "../0000:00:00.0",
            "0000:00:00.0:0",
            "100000000:00:00.0",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn vf1_an_address_that_is_nearly_one_is_told_with_what_was_meant() {
        let said = |text: &str| text.parse::<Address>().unwrap_err().to_string();
        insta::assert_snapshot!(said("01:00.0"), @r#""01:00.0" is not a PCI address, which is DOMAIN:BUS:DEVICE.FUNCTION in lower-case hexadecimal, such as 0000:01:00.0; did you mean 0000:01:00.0?"#);
        assert!(said("0000:0A:00.0").ends_with("did you mean 0000:0a:00.0?"));
        assert!(said("GPU-0").ends_with("such as 0000:01:00.0"));
        assert!(said(&"x".repeat(10_000)).len() < 200);
    }

    #[test]
    fn it_is_a_string_in_json() {
        let address: Address = "0000:01:00.1".parse().unwrap();
        assert_eq!(serde_json::to_string(&address).unwrap(), "\"0000:01:00.1\"");
        assert_eq!(serde_json::from_str::<Address>("\"0000:01:00.1\"").unwrap(), address);
        assert!(serde_json::from_str::<Address>("\"01:00.1\"").is_err());
    }

    #[test]
    fn functions_of_a_card() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        assert!(address("0000:01:00.0").same_card(address("0000:01:00.3")));
        assert!(!address("0000:01:00.0").same_card(address("0001:01:00.0")));
        assert!(!address("0000:01:00.0").same_card(address("0000:01:01.0")));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_each_address_has_one(text in "\\PC{0,24}|[0-9a-f:.]{0,18}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string(), text);
            }
        }
    }
}
