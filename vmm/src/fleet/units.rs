//! Sizes with units.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr};

/// A size in bytes, written as `512MiB` or `8GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

/// Why a size was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// There is no unit.
    #[error("\"{0}\" has no unit; write KiB, MiB, GiB or TiB, such as \"{0}MiB\"")]
    NoUnit(String),
    /// The unit is none of those allowed.
    #[error("\"{0}\" has the unknown unit \"{1}\"; allowed are KiB, MiB, GiB and TiB")]
    UnknownUnit(String, String),
    /// There is no whole number before the unit.
    #[error("\"{0}\" is not a whole number with a unit, such as \"512MiB\"")]
    NotANumber(String),
    /// More than 2^63 bytes.
    #[error("\"{0}\" is more than this program can count (8 EiB)")]
    TooLarge(String),
}

const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        if number.is_empty() {
            return Err(SizeError::NotANumber(text.into()));
        }
        if unit.is_empty() {
            return Err(SizeError::NoUnit(text.into()));
        }
        let Some((_, shift)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(SizeError::UnknownUnit(text.into(), unit.into()));
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .filter(|bytes| *bytes <= i64::MAX as u64)
            .map(Size)
            .ok_or_else(|| SizeError::TooLarge(text.into()))
    }
}

impl fmt::Display for Size {
    /// The largest unit in which the size is a whole number; bytes if there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS.iter().rev().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match whole {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl schemars::JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9]+ *(KiB|MiB|GiB|TiB)$",
            "description": "A size with its unit, such as 512MiB or 8GiB",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_trip() {
        for (text, bytes) in [("1KiB", 1024), ("512MiB", 512 << 20), ("8GiB", 8 << 30), ("3 TiB", 3 << 40)] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size, Size(bytes));
            assert_eq!(size.to_string().parse::<Size>().unwrap(), size);
        }
    }

    #[test]
    fn a_size_without_a_unit_is_refused_with_advice() {
        assert_eq!(
            "512".parse::<Size>().unwrap_err().to_string(),
            r#""512" has no unit; write KiB, MiB, GiB or TiB, such as "512MiB""#
        );
        for text in ["", "MiB", "-1MiB", "1e3MiB", "1.5GiB", "5MB", "99999999999999999999GiB", "9000000TiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
