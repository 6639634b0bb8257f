//! A fleet file as a tree in which every key and value knows its place. Pure.

mod json;
mod toml;

use super::problem::{Finding, Path, Spot, Step};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// The language of a fleet file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// What the NixOS module writes.
    Json,
    /// What people write.
    Toml,
}

impl Format {
    /// By the file's name; where that does not say, by whether the text begins as a JSON object does.
    pub(super) fn of(name: &str, text: &str) -> Self {
        match std::path::Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("json") => Self::Json,
            Some("toml") => Self::Toml,
            _ if text.trim_start().starts_with('{') => Self::Json,
            _ => Self::Toml,
        }
    }

    /// What this language calls keys with values.
    pub(super) fn table(self) -> &'static str {
        match self {
            Self::Json => "an object",
            Self::Toml => "a table",
        }
    }
}

/// A value and where it begins, in bytes.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: usize,
    pub(super) value: Value,
}

/// A value with its key.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key_at: usize,
    pub(super) node: Node,
}

/// A value of either language.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Boolean(bool),
    Integer(i64),
    /// Any other number, as it is written: a schema without fractions needs no more to refuse it.
    Number(String),
    Date(String),
    Text(String),
    List(Vec<Node>),
    Table(BTreeMap<String, Entry>),
}

/// A fleet file's text as a tree.
#[derive(Debug)]
pub(super) struct Document<'a> {
    text: &'a str,
    pub(super) root: Node,
}

impl<'a> Document<'a> {
    /// Reads `text`; the first error of syntax ends it.
    pub(super) fn parse(text: &'a str, format: Format) -> Result<Self, Finding> {
        let root = match format {
            Format::Json => json::parse(text)?,
            Format::Toml => toml::parse(text)?,
        };
        Ok(Self { text, root })
    }

    /// A document of which nothing is known, for places in its text.
    pub(super) fn unread(text: &'a str) -> Self {
        Self { text, root: Node { at: 0, value: Value::Null } }
    }

    /// The line and column of `spot`, or of the nearest thing around it that the file has.
    pub(super) fn place(&self, spot: &Spot) -> (usize, usize) {
        match spot {
            Spot::Offset(offset, _) => position(self.text, *offset),
            Spot::Key(path) => position(self.text, self.root.find(path).0),
            Spot::Value(path) => position(self.text, self.root.find(path).1),
        }
    }
}

/// The line and column of a byte of `text`, both from 1; columns are characters.
pub(super) fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..text.floor_char_boundary(offset)).unwrap_or(text);
    let line = before.bytes().filter(|byte| *byte == b'\n').count();
    let column = before.chars().rev().take_while(|c| *c != '\n').count();
    (line.saturating_add(1), column.saturating_add(1))
}

impl Node {
    /// Where the key and the value of `path` begin, or those of the last step that exists.
    fn find(&self, path: &Path) -> (usize, usize) {
        let (mut key_at, mut node) = (self.at, self);
        for step in path.steps() {
            match (step, &node.value) {
                (Step::Key(key), Value::Table(entries)) => match entries.get(key) {
                    Some(entry) => (key_at, node) = (entry.key_at, &entry.node),
                    None => break,
                },
                (Step::Index(index), Value::List(nodes)) => match nodes.get(*index) {
                    Some(element) => (key_at, node) = (element.at, element),
                    None => break,
                },
                _ => break,
            }
        }
        (key_at, node.at)
    }

    /// The same as JSON, without places. Numbers that are no integers and dates become null: the schema has none.
    pub(super) fn to_json(&self) -> Json {
        match &self.value {
            Value::Null | Value::Number(_) | Value::Date(_) => Json::Null,
            Value::Boolean(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::List(nodes) => nodes.iter().map(Node::to_json).collect(),
            Value::Table(entries) => {
                entries.iter().map(|(key, entry)| (key.clone(), entry.node.to_json())).collect()
            }
        }
    }
}
