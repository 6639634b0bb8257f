//! JSON with places.

use super::{Entry, Node, Value};
use crate::fleet::problem::{Finding, Path, Spot, Step};
use jsonc_parser::{
    CollectOptions, ParseOptions,
    ast::{Object, Value as Ast},
    common::{Range, Ranged},
};
use serde::de::IgnoredAny;
use std::collections::BTreeMap;

/// serde_json decides what is JSON, and says best what is not. It keeps no places and takes repeated keys for one, so
/// another parser makes the tree.
pub(super) fn parse(text: &str) -> Result<Node, Finding> {
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| {
        let said = error.to_string();
        let message = said.split(" at line ").next().unwrap_or(&said);
        Finding::new(Spot::Offset(offset(text, error.line(), error.column()), Path::root()), message)
    })?;
    let options = ParseOptions {
        allow_comments: false,
        allow_loose_object_property_names: false,
        allow_trailing_commas: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let failed = |range: Range, message: String| {
        Finding::new(Spot::Offset(range.start, Path::root()), message.to_lowercase())
    };
    let tree = jsonc_parser::parse_to_ast(text, &CollectOptions::default(), &options)
        .map_err(|error| failed(error.range(), error.kind().to_string()))?;
    let Some(root) = tree.value else {
        return Err(Finding::new(Spot::Offset(0, Path::root()), "the file is empty"));
    };
    convert(root)
}

/// The byte at a line and a column in bytes, both from 1; column 0 is the end of the line before.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    start.saturating_add(column.saturating_sub(1)).min(text.len())
}

fn convert(ast: Ast<'_>) -> Result<Node, Finding> {
    let at = ast.range().start;
    let value = match ast {
        Ast::NullKeyword(_) => Value::Null,
        Ast::BooleanLit(literal) => Value::Boolean(literal.value),
        Ast::NumberLit(literal) => match literal.value.parse() {
            Ok(integer) => Value::Integer(integer),
            Err(_) => Value::Number(literal.value.into()),
        },
        Ast::StringLit(literal) => Value::Text(literal.value.into_owned()),
        Ast::Array(array) => Value::List(
            array
                .elements
                .into_iter()
                .enumerate()
                .map(|(index, element)| convert(element).map_err(|found| found.below(Step::Index(index))))
                .collect::<Result<_, _>>()?,
        ),
        Ast::Object(object) => Value::Table(convert_object(object)?),
    };
    Ok(Node { at, value })
}

fn convert_object(object: Object<'_>) -> Result<BTreeMap<String, Entry>, Finding> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    for property in object.properties {
        let key_at = property.name.range().start;
        let key = property.name.into_string();
        if let Some(first) = entries.get(&key) {
            let spot = |at| Spot::Offset(at, Path::root().key(&key));
            return Err(Finding::new(spot(key_at), "is given twice").other(spot(first.key_at)));
        }
        let node = convert(property.value).map_err(|found| found.below(Step::Key(key.clone())))?;
        entries.insert(key, Entry { key_at, node });
    }
    Ok(entries)
}
