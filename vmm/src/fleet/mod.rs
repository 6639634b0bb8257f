//! The fleet file: all that one host runs.
//!
//! Text becomes a tree with places (`document`), the tree is compared with the schema (`shape`), then it becomes the types
//! ([`schema`]), whose sense is checked (`validate`), and then, if asked for, whether the host has what they name (`present`). All that
//! is found wrong is told at once ([`problem`]). Only `file`, [`resolve`] and `present` look at the host's files.

// Text comes from files and from clients of the API.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

pub mod diff;
mod document;
mod file;
pub mod gpus;
pub mod limits;
mod names;
mod present;
pub mod problem;
pub mod resolve;
pub mod schema;
mod shape;
pub mod units;
mod validate;
pub mod view;

pub use file::{FileError, LIMIT};
pub use problem::{Place, Problem, Problems};

use document::{Document, Format, Value};
use limits::HostFacts;
use problem::{Finding, Findings, Path as At, quoted};
use schema::{Fleet, SCHEMA};
use std::path::Path;
use validate::Verdict;

/// A fleet that is in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The fleet.
    pub fleet: Fleet,
    /// What is better not so, such as more memory for VMs than the host has. The VMs start nevertheless, one by one.
    pub warnings: Problems,
}

/// Reads the text of a fleet file, after a look at who may write to it. What it says is not looked at.
pub fn read(path: &Path) -> Result<String, Problems> {
    let name = path.to_string_lossy();
    let bytes = file::read(path).map_err(|error| Problem::of_file(&name, error.to_string()))?;
    Ok(text(&name, &bytes)?.into())
}

/// Reads and checks a fleet file for a host, of which only the figures count.
pub fn load_file(path: &Path, host: &HostFacts) -> Result<Loaded, Problems> {
    load(&path.to_string_lossy(), read(path)?.as_bytes(), host)
}

/// Reads and checks a fleet file for this host: also whether it has what the file names.
pub fn check_file(path: &Path, host: &HostFacts) -> Result<Loaded, Problems> {
    check(&path.to_string_lossy(), read(path)?.as_bytes(), host)
}

/// Checks the text of a fleet file for a host; `name` is the file's name, for messages and for its extension. Pure.
pub fn load(name: &str, bytes: &[u8], host: &HostFacts) -> Result<Loaded, Problems> {
    judge(name, bytes, host, |_, _| {})
}

/// [`load`], and whether this host has what the fleet names: sources, kernels, roots and the like. It reads Nix's databases.
pub fn check(name: &str, bytes: &[u8], host: &HostFacts) -> Result<Loaded, Problems> {
    judge(name, bytes, host, present::check)
}

fn judge(
    name: &str,
    bytes: &[u8],
    host: &HostFacts,
    further: impl FnOnce(&Fleet, &mut Verdict),
) -> Result<Loaded, Problems> {
    let text = text(name, bytes)?;
    let tell = |finding: Finding, document: &Document<'_>| {
        let mut findings = Findings::default();
        findings.push(finding);
        findings.located(name, document)
    };
    let format = Format::of(name, text);
    let document = Document::parse(text, format).map_err(|finding| tell(finding, &Document::unread(text)))?;
    if let Some(finding) = version(&document) {
        return Err(tell(finding, &document));
    }
    let schema = schema_value();
    let findings = shape::check(&document.root, &schema, format);
    if !findings.is_empty() {
        return Err(findings.located(name, &document));
    }
    // The shape is right, so this does not fail; if it does, that is told without a place.
    let fleet: Fleet = serde_json::from_value(document.root.to_json())
        .map_err(|error| Problem::of_file(name, error.to_string()))?;
    let mut verdict = validate::fleet(&fleet, host);
    if verdict.errors.is_empty() {
        further(&fleet, &mut verdict);
    }
    if !verdict.errors.is_empty() {
        return Err(verdict.errors.located(name, &document));
    }
    Ok(Loaded { fleet, warnings: verdict.warnings.located(name, &document) })
}

fn text<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str, Problems> {
    if bytes.len() as u64 > LIMIT {
        return Err(Problem::of_file(name, FileError::TooLong.to_string()).into());
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let position = before.map(|before| document::position(before, before.len()));
        Problem::at_position(name, position, "is not UTF-8 from here on")
    })?;
    if text.starts_with('\u{feff}') {
        let message = "begins with a byte-order mark; save it as UTF-8 without one";
        return Err(Problem::at_position(name, Some((1, 1)), message).into());
    }
    Ok(text)
}

/// A file for another release is not measured by this one's keys.
fn version(document: &Document<'_>) -> Option<Finding> {
    let Value::Table(entries) = &document.root.value else { return None };
    let number = match &entries.get("schema")?.node.value {
        Value::Integer(number) if *number != i64::from(SCHEMA) => number.to_string(),
        Value::Number(number) => quoted(number),
        _ => return None,
    };
    let message = format!("is {number}; this release of Lair reads schema {SCHEMA} only");
    Some(Finding::at(&At::root().key("schema"), message))
}

fn schema_value() -> serde_json::Value {
    schemars::schema_for!(Fleet).to_value()
}

/// The JSON Schema of the fleet file, of the release that this is.
pub fn json_schema() -> String {
    format!("{:#}", schema_value())
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]
mod tests;
