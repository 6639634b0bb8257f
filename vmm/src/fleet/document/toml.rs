//! TOML with places.

use super::{Entry, Node, Value};
use crate::fleet::problem::{Finding, Path, Spot, Step};
use std::ops::Range;
use toml::{
    Spanned,
    de::{DeTable, DeValue, Error},
};

/// Stands in for a repeated key, so that the file can be read once more. Not a key of the schema.
const STAND_IN: &str = "lair-key-that-was-given-twice";

pub(super) fn parse(text: &str) -> Result<Node, Finding> {
    let table = DeTable::parse(text).map_err(|error| explain(text, &error))?;
    let at = table.span().start;
    Ok(Node { at, value: convert_table(table.get_ref()) })
}

fn explain(text: &str, error: &Error) -> Finding {
    let span = error.span().unwrap_or_default();
    if error.message() == "duplicate key"
        && let Some(finding) = explain_duplicate(text, span.clone())
    {
        return finding;
    }
    Finding::new(Spot::Offset(span.start, Path::root()), error.message().to_owned())
}

/// The parser says where the second key of two is. With another key in its place the file reads on, which shows what table it is
/// in, and so where the first is.
fn explain_duplicate(text: &str, second: Range<usize>) -> Option<Finding> {
    let (key, before, after) =
        (text.get(second.clone())?, text.get(..second.start)?, text.get(second.end..)?);
    let key = DeTable::parse(&format!("{key} = 0")).ok()?.get_ref().keys().next()?.get_ref().to_string();
    let changed = [before, STAND_IN, after].concat();
    // Later duplicates are not in the way.
    let (table, _) = DeTable::parse_recoverable(&changed);
    let first = sibling(table.get_ref(), &key)?;
    Some(Finding::new(Spot::Offset(second.start, first.path().clone()), "is given twice").other(first))
}

/// The key `key` of the table that has [`STAND_IN`].
fn sibling(table: &DeTable<'_>, key: &str) -> Option<Spot> {
    if table.contains_key(STAND_IN) {
        let (first, _) = table.iter().find(|(name, _)| name.get_ref() == key)?;
        return Some(Spot::Offset(first.span().start, Path::root().key(key)));
    }
    table.iter().find_map(|(name, value)| {
        sibling_below(value, key).map(|spot| spot.below(Step::Key(name.get_ref().to_string())))
    })
}

fn sibling_below(value: &Spanned<DeValue<'_>>, key: &str) -> Option<Spot> {
    match value.get_ref() {
        DeValue::Table(table) => sibling(table, key),
        DeValue::Array(array) => array.iter().enumerate().find_map(|(index, element)| {
            sibling_below(element, key).map(|spot| spot.below(Step::Index(index)))
        }),
        _ => None,
    }
}

fn convert(value: &Spanned<DeValue<'_>>) -> Node {
    let at = value.span().start;
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(integer) => Value::Integer(integer),
            Err(_) => Value::Number(integer.to_string()),
        },
        DeValue::Float(float) => Value::Number(float.to_string()),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Datetime(date) => Value::Date(date.to_string()),
        DeValue::Array(array) => Value::List(array.iter().map(convert).collect()),
        DeValue::Table(table) => convert_table(table),
    };
    Node { at, value }
}

fn convert_table(table: &DeTable<'_>) -> Value {
    let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
        let key: &Spanned<std::borrow::Cow<'_, str>> = key;
        (key.get_ref().to_string(), Entry { key_at: key.span().start, node: convert(value) })
    };
    Value::Table(table.iter().map(entry).collect())
}
