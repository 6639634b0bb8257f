//! Whole fleet files, and what is said of them.

mod hostile;
mod sense;
mod shape;

use super::{limits::HostFacts, load, schema::Fleet, units::Size};

/// A fleet with all that a fleet may have.
pub(super) const EXAMPLE: &str = include_str!("example.toml");

/// A host for it.
pub(super) const HOST: HostFacts = HostFacts { cpus: 16, memory: Size(64 << 30) };

/// What is said of a text; `fine` and the warnings if it is a fleet.
pub(super) fn said(name: &str, text: &[u8]) -> String {
    match load(name, text, &HOST) {
        Ok(loaded) if loaded.warnings.problems.is_empty() => "fine".into(),
        Ok(loaded) => format!("fine, but\n{}", loaded.warnings),
        Err(problems) => problems.to_string(),
    }
}

/// The example with `old` replaced, which must be there.
pub(super) fn changed(old: &str, new: &str) -> String {
    assert!(EXAMPLE.contains(old), "the example has no {old}");
    EXAMPLE.replacen(old, new, 1)
}

/// What is said of the example after each change, one below the other for a snapshot.
pub(super) fn said_of_changes(changes: &[(&str, &str)]) -> String {
    let said_of = |(old, new): &(&str, &str)| {
        let shown =
            if new.len() > 300 { format!("({} bytes)", new.len()) } else { new.replace('\n', "\n+++ ") };
        let said = said("fleet.toml", changed(old, new).as_bytes());
        format!("--- {}\n+++ {shown}\n{said}\n", old.replace('\n', "\n--- "))
    };
    changes.iter().map(said_of).collect::<Vec<_>>().join("\n")
}

fn example() -> Fleet {
    load("fleet.toml", EXAMPLE.as_bytes(), &HOST).unwrap().fleet
}

#[test]
fn the_example_is_fine_in_both_languages() {
    let fleet = example();
    assert_eq!((fleet.vms.len(), fleet.links.len(), fleet.store.sources.len()), (3, 5, 2));
    assert_eq!(said("fleet.toml", EXAMPLE.as_bytes()), "fine");
    let json = serde_json::to_string_pretty(&fleet).unwrap();
    let toml = toml::to_string(&fleet).unwrap();
    for (name, text) in [("fleet.json", &json), ("fleet.toml", &toml), ("fleet", &json), ("fleet", &toml)] {
        assert_eq!(load(name, text.as_bytes(), &HOST).unwrap().fleet, fleet, "{name}: {text}");
    }
}

#[test]
fn the_json_schema_is_what_was_reviewed() {
    insta::assert_snapshot!(super::json_schema());
}

#[test]
fn problems_are_data_too() {
    let text =
        changed("vcpus = 4", "vcpus = 0").replace("name = \"httpd\"", "name = \"httpd\"\nname = \"x\"");
    let twice = load("fleet.toml", text.as_bytes(), &HOST).unwrap_err();
    let zero = load("fleet.toml", changed("vcpus = 4", "vcpus = 0").as_bytes(), &HOST).unwrap_err();
    insta::assert_json_snapshot!((twice, zero));
}

#[test]
fn what_the_nixos_module_renders_is_fine() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../nixos/example.json");
    // Packages are built without that folder.
    let Ok(bytes) = std::fs::read(&path) else {
        return eprintln!("SKIPPED: the NixOS example, because {} is not here", path.display());
    };
    assert_eq!(said("example.json", &bytes), "fine");
}
