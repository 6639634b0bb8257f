//! Whether a document has the shape of a fleet: known keys, all that are needed, values of the right kind. Pure.
//!
//! It walks the document beside the JSON Schema that is made from the types, so the two cannot differ, and reports everything at
//! once where serde would stop at the first. Of JSON Schema it knows what schemars makes of our types; what it does not
//! know it passes on to serde.

use super::{
    document::{Entry, Format, Node, Value},
    gpus::Vendor,
    problem::{Finding, Findings, Path, listed, nearest, quoted},
    units::Size,
};
use crate::host::pci::{Address, Id};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// All that is wrong with the shape of `root`, seen beside `schema`.
pub(super) fn check(root: &Node, schema: &Json, format: Format) -> Findings {
    let mut walk = Walk { schema, format, findings: Findings::default() };
    walk.value(root, schema, &Path::root());
    walk.findings
}

struct Walk<'a> {
    schema: &'a Json,
    format: Format,
    findings: Findings,
}

impl<'a> Walk<'a> {
    fn value(&mut self, node: &Node, shape: &'a Json, path: &Path) {
        if let Some(name) = shape.get("$ref").and_then(Json::as_str) {
            let name = name.trim_start_matches("#/$defs/");
            if name == "Size" {
                return self.size(node, path);
            }
            let definition = self.schema.get("$defs").and_then(|definitions| definitions.get(name));
            return definition.into_iter().for_each(|shape| self.value(node, shape, path));
        }
        if let Some(shapes) = shape.get("anyOf").or_else(|| shape.get("oneOf")).and_then(Json::as_array) {
            return self.alternatives(node, shapes, path);
        }
        let allowed = Allowed::of(shape);
        match (allowed.kind, &node.value) {
            (_, Value::Null) if allowed.null => {}
            ("object", Value::Table(entries)) => self.table(entries, shape, path),
            ("array", Value::List(nodes)) => {
                let Some(items) = shape.get("items") else { return };
                for (index, node) in nodes.iter().enumerate() {
                    self.value(node, items, &path.index(index));
                }
            }
            ("integer", Value::Integer(number)) => self.integer(*number, shape, path),
            ("string", Value::Text(text)) if shape.get("format").is_some() => {
                let format = shape.get("format").and_then(Json::as_str).unwrap_or_default();
                if let Err(message) = formatted(format, text) {
                    self.findings.push(Finding::at(path, message));
                }
            }
            ("string", Value::Text(_)) | ("boolean", Value::Boolean(_)) | ("", _) => {}
            (kind, value) => {
                let wanted = match kind {
                    "object" => self.format.table(),
                    "array" => "a list",
                    "integer" => "a whole number",
                    "boolean" => "true or false",
                    _ => "text in quotes",
                };
                self.mismatch(wanted, value, path);
            }
        }
    }

    fn mismatch(&mut self, wanted: &str, value: &Value, path: &Path) {
        let found = match value {
            Value::Null => "null".into(),
            Value::Boolean(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Number(value) | Value::Date(value) => value.chars().take(40).collect(),
            Value::Text(text) => format!("the text {}", quoted(text)),
            Value::List(_) => "a list".into(),
            Value::Table(_) => self.format.table().into(),
        };
        self.findings.push(Finding::at(path, format!("must be {wanted}, not {found}")));
    }

    fn size(&mut self, node: &Node, path: &Path) {
        let Value::Text(text) = &node.value else {
            return self.mismatch("a size in quotes, such as \"512MiB\"", &node.value, path);
        };
        // No size is that long, and the error repeats it.
        let short: String = text.chars().take(40).filter(|c| !c.is_control()).collect();
        if let Err(error) = short.parse::<Size>() {
            self.findings.push(Finding::at(path, error.to_string()));
        } else if short != *text {
            self.findings.push(Finding::at(path, format!("{} is not a size", quoted(text))));
        }
    }

    fn integer(&mut self, number: i64, shape: &Json, path: &Path) {
        let (least, most) = match shape.get("format").and_then(Json::as_str) {
            Some("uint32") => (0, i64::from(u32::MAX)),
            _ => (i64::MIN, i64::MAX),
        };
        let limit = |key| shape.get(key).and_then(Json::as_i64);
        let (least, most) = (limit("minimum").unwrap_or(least), limit("maximum").unwrap_or(most));
        if !(least..=most).contains(&number) {
            self.findings.push(Finding::at(path, format!("must be {least} to {most}, not {number}")));
        }
    }

    fn table(&mut self, entries: &BTreeMap<String, Entry>, shape: &'a Json, path: &Path) {
        let Some(fields) = shape.get("properties").and_then(Json::as_object) else {
            let Some(values) = shape.get("additionalProperties") else { return };
            for (key, entry) in entries {
                self.value(&entry.node, values, &path.key(key));
            }
            return;
        };
        let required = texts(shape, "required");
        let mut meant = Vec::new();
        for (key, entry) in entries {
            let path = path.key(key);
            if let Some(shape) = fields.get(key) {
                self.value(&entry.node, shape, &path);
                continue;
            }
            self.findings.push_with(|| {
                let names = || fields.keys().map(String::as_str);
                let near = nearest(key, names());
                meant.extend(near);
                let near = near.map(|name| format!("; did you mean \"{name}\"?")).unwrap_or_default();
                Finding::at_key(&path, format!("unknown key{near}"))
                    .hint(format!("allowed here: {}", names().collect::<Vec<_>>().join(", ")))
            });
        }
        for name in required {
            if !entries.contains_key(name) && !meant.contains(&name) {
                let about =
                    fields.get(name).and_then(|shape| shape.get("description")).and_then(Json::as_str);
                let finding = Finding::at(path, format!("the key \"{name}\" is missing"));
                self.findings.push(match about {
                    Some(about) => finding.hint(format!("{name}: {about}")),
                    None => finding,
                });
            }
        }
    }

    /// One of several shapes: a choice of words, something that may be null, text in place of a table, or tables that are told apart by
    /// their keys.
    fn alternatives(&mut self, node: &Node, shapes: &'a [Json], path: &Path) {
        let is_null = |shape: &&Json| shape.get("type").and_then(Json::as_str) == Some("null");
        let null = shapes.iter().any(|shape| is_null(&shape));
        if null && matches!(node.value, Value::Null) {
            return;
        }
        let shapes: Vec<&'a Json> = shapes.iter().filter(|shape| !is_null(shape)).collect();
        let words: Vec<&str> =
            shapes.iter().filter_map(|shape| shape.get("const").and_then(Json::as_str)).collect();
        if words.len() == shapes.len() {
            return self.choice(node, &words, path);
        }
        if let [shape] = *shapes {
            return self.value(node, shape, path);
        }
        let is_text = |shape: &&'a Json| shape.get("type").and_then(Json::as_str) == Some("string");
        let shapes = shapes.into_iter().map(|shape| self.definition(shape));
        let (texts_in_place, tables): (Vec<&'a Json>, Vec<&'a Json>) = shapes.partition(is_text);
        let text = !texts_in_place.is_empty();
        let entries = match &node.value {
            Value::Table(entries) => entries,
            Value::Text(_) if text => return,
            value if text => {
                return self.mismatch(&format!("text in quotes or {}", self.format.table()), value, path);
            }
            value => return self.mismatch(self.format.table(), value, path),
        };
        if let [table] = *tables {
            return self.table(entries, table, path);
        }
        let known = |shape: &Json, key: &str| {
            shape.get("properties").and_then(Json::as_object).is_some_and(|fields| fields.contains_key(key))
        };
        // For each shape a key that only it has.
        let mut own = tables.iter().filter_map(|shape| {
            let only = |key: &&String| tables.iter().filter(|other| known(other, key)).count() == 1;
            entries.keys().filter(only).find(|key| known(shape, key)).map(|key| (*shape, key))
        });
        match (own.next(), own.next()) {
            (Some((shape, _)), None) => self.table(entries, shape, path),
            (Some((_, one)), Some((_, other))) => {
                self.findings.push(Finding::at(
                    path,
                    format!("\"{one}\" and \"{other}\" exclude each other; give one"),
                ));
            }
            (None, _) => {
                let ways: Vec<String> = tables
                    .iter()
                    .map(|shape| listed(texts(shape, "required")).replace(", ", " with "))
                    .collect();
                let finding = Finding::at(path, format!("must have {}", ways.join(", or ")));
                let all = || tables.iter().flat_map(|shape| texts(shape, "required"));
                let meant = entries.keys().find_map(|key| Some((key, nearest(key, all())?)));
                self.findings.push(match meant {
                    Some((key, name)) => {
                        finding.hint(format!("{} is unknown; did you mean \"{name}\"?", quoted(key)))
                    }
                    None => finding,
                });
            }
        }
    }

    fn choice(&mut self, node: &Node, words: &[&str], path: &Path) {
        let Value::Text(text) = &node.value else {
            return self.mismatch(&format!("one of {}", listed(words.iter().copied())), &node.value, path);
        };
        if !words.contains(&text.as_str()) {
            let meant = nearest(text, words.iter().copied());
            let meant = meant.map(|word| format!("; did you mean \"{word}\"?")).unwrap_or_default();
            let message = format!("{} is not allowed here{meant}", quoted(text));
            let hint = format!("allowed: {}", listed(words.iter().copied()));
            self.findings.push(Finding::at(path, message).hint(hint));
        }
    }

    /// What a reference refers to; anything else is itself.
    fn definition(&self, shape: &'a Json) -> &'a Json {
        let name = shape.get("$ref").and_then(Json::as_str).map(|name| name.trim_start_matches("#/$defs/"));
        name.and_then(|name| self.schema.get("$defs")?.get(name)).unwrap_or(shape)
    }
}

/// Whether a text is what it stands for.
fn formatted(format: &str, text: &str) -> Result<(), String> {
    let text = text.to_owned();
    match format {
        "pci-address" => Address::try_from(text).map(drop).map_err(|error| error.to_string()),
        "pci-id" => Id::try_from(text).map(drop).map_err(|error| error.to_string()),
        "pci-vendor" => Vendor::try_from(text).map(drop).map_err(|error| error.to_string()),
        _ => Ok(()),
    }
}

fn texts<'a>(shape: &'a Json, key: &str) -> Vec<&'a str> {
    shape.get(key).and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str).collect()
}

/// The `type` of a shape.
struct Allowed<'a> {
    kind: &'a str,
    null: bool,
}

impl<'a> Allowed<'a> {
    fn of(shape: &'a Json) -> Self {
        match shape.get("type") {
            Some(Json::String(kind)) => Self { kind, null: false },
            Some(Json::Array(kinds)) => {
                let mut kinds = kinds.iter().filter_map(Json::as_str);
                Self {
                    null: kinds.clone().any(|kind| kind == "null"),
                    kind: kinds.find(|kind| *kind != "null").unwrap_or(""),
                }
            }
            _ => Self { kind: "", null: false },
        }
    }
}
