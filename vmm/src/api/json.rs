//! JSON of a client's, taken strictly: a key that is given twice is an error, also where serde would take the last one. Pure.

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};
use std::fmt;

/// Reads a whole document. The message of an error says where it is.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    let Strict(value) = serde_json::from_slice(bytes)?;
    serde_json::from_value(value)
}

/// Any JSON, without repeated keys. serde_json bounds how deeply it may be nested.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Strict, E> {
        Number::from_f64(value).map(|n| Strict(n.into())).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Strict, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(value)) = from.next_element()? {
            list.push(value);
        }
        Ok(Strict(list.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Strict, A::Error> {
        let mut map = Map::new();
        while let Some(key) = from.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("duplicate field `{}`", key.escape_debug())));
            }
            let Strict(value) = from.next_value()?;
            map.insert(key, value);
        }
        Ok(Strict(map.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{ApplyRequest, SessionRequest};

    #[test]
    fn cl6_what_is_no_request_is_an_error_that_says_why() {
        let apply = |text: &str| parse::<ApplyRequest>(text.as_bytes()).unwrap_err().to_string();
        let session = |text: &str| parse::<SessionRequest>(text.as_bytes()).unwrap_err().to_string();
        let deep = "[".repeat(10_000);
        for (said, expected) in [
            (apply("{\"file\":null,"), "EOF while parsing a value"),
            (apply("{\"fiel\":null}"), "unknown field `fiel`"),
            (apply("{\"file\":null,\"file\":null}"), "duplicate field `file`"),
            (apply("{\"file\":3}"), "invalid type: integer `3`"),
            (apply("{\"file\":{\"name\":\"a\",\"text\":1e400}}"), "number out of range"),
            (apply("null null"), "trailing characters"),
            (apply("\u{feff}{}"), "expected value"),
            (apply(&deep), "recursion limit exceeded"),
            (session("{\"session\":\"dance\"}"), "unknown variant `dance`"),
            (session("{\"session\":{\"connect\":{\"port\":-1}}}"), "invalid value: integer `-1`"),
            // serde would take the last one.
            (
                session(
                    "{\"session\":{\"exec\":{\"command\":[\"a\"],\"environment\":{\"A\":\"1\",\"A\":\"2\"}}}}",
                ),
                "duplicate field `A`",
            ),
        ] {
            assert!(said.contains(expected), "{said}, not {expected}");
        }
        assert!(parse::<Value>(b"{\"a\":\xff}").is_err());
        let whole: Value = parse(b"{\"a\":[1,-2,3.5,null,true,\"x\"],\"b\":{\"a\":1}}").unwrap();
        assert_eq!(whole, serde_json::json!({"a": [1, -2, 3.5, null, true, "x"], "b": {"a": 1}}));
    }
}
