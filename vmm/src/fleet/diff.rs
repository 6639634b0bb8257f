//! What becoming another fleet changes, VM by VM, link by link, key by key. Pure.

use super::schema::{Fleet, Vm};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A value in a difference is no longer than this, in characters.
const SHOWN: usize = 60;

/// What is about to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Change {
    /// A VM, a link, or a table of the fleet file.
    pub what: What,
    /// Its name.
    pub name: String,
    /// What is done.
    pub action: Action,
    /// Which keys differ.
    pub keys: Vec<Difference>,
}

/// What changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A VM.
    Vm,
    /// A link.
    Link,
    /// What concerns all VMs: `host`, `store`, `access`, `metrics`.
    Table,
}

/// What is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The VM is new and starts.
    Start,
    /// The VM is new and waits for `vmctl start`.
    Add,
    /// The VM is gone from the fleet, and stops.
    Stop,
    /// The VM is gone from the fleet, and does not run.
    Remove,
    /// The VM runs on as it is, and follows when it is restarted.
    PendingRestart,
    /// The VM runs, and gets and loses devices at once.
    Devices,
    /// It follows at once: nothing of it runs, or it needs no restart.
    Change,
    /// It is read when `laird` starts.
    PendingLaird,
}

/// A key that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// Its path below what changes.
    pub key: String,
    /// The value before, where there was one.
    pub before: Option<String>,
    /// The value after, where there is one.
    pub after: Option<String>,
}

/// What becoming `after` changes where `before` is the fleet. `running` are the VMs that run, with what they were started with.
pub fn changes(before: &Fleet, after: &Fleet, running: &BTreeMap<String, Vm>) -> Vec<Change> {
    let mut changes = Vec::new();
    let names: BTreeSet<_> = before.vms.keys().chain(after.vms.keys()).chain(running.keys()).collect();
    for name in names {
        let runs = running.get(name);
        let known = runs.or_else(|| before.vms.get(name));
        let action = match (known, after.vms.get(name)) {
            (None, Some(new)) if new.autostart => Action::Start,
            (None, Some(_)) => Action::Add,
            (Some(_), None) if runs.is_some() => Action::Stop,
            (_, None) => Action::Remove,
            (Some(old), Some(new)) if old == new => continue,
            (Some(old), Some(new)) if runs.is_some() && !needs_restart(old, new) => Action::Devices,
            (Some(_), Some(_)) if runs.is_some() => Action::PendingRestart,
            (Some(_), Some(_)) => Action::Change,
        };
        let keys = match (known, after.vms.get(name)) {
            (Some(old), Some(new)) => differences(old, new),
            _ => vec![],
        };
        changes.push(Change { what: What::Vm, name: name.clone(), action, keys });
    }
    let names: BTreeSet<_> = before.links.keys().chain(after.links.keys()).collect();
    for name in names {
        let (action, keys) = match (before.links.get(name), after.links.get(name)) {
            (Some(old), Some(new)) if old == new => continue,
            (Some(old), Some(new)) => (Action::Change, differences(old, new)),
            (None, _) => (Action::Add, vec![]),
            (_, None) => (Action::Remove, vec![]),
        };
        changes.push(Change { what: What::Link, name: name.clone(), action, keys });
    }
    for (name, keys, action) in [
        ("host", differences(&before.host, &after.host), Action::PendingLaird),
        ("store", differences(&before.store, &after.store), Action::Change),
        ("access", differences(&before.access, &after.access), Action::Change),
        ("metrics", differences(&before.metrics, &after.metrics), Action::Change),
    ] {
        if !keys.is_empty() {
            changes.push(Change { what: What::Table, name: name.into(), action, keys });
        }
    }
    changes
}

/// Whether a VM that runs, started as `old`, has to be restarted to be `new`: all but its devices is as it was at its start.
pub fn needs_restart(old: &Vm, new: &Vm) -> bool {
    Vm { gpus: new.gpus.clone(), ..old.clone() } != *new
}

/// The keys in which two values differ.
fn differences(before: &impl Serialize, after: &impl Serialize) -> Vec<Difference> {
    // These types come from such values.
    let [before, after] =
        [serde_json::to_value(before), serde_json::to_value(after)].map(Result::unwrap_or_default);
    let mut found = Vec::new();
    compare(String::new(), Some(&before), Some(&after), &mut found);
    found
}

fn compare(key: String, before: Option<&Value>, after: Option<&Value>, found: &mut Vec<Difference>) {
    match (before, after) {
        (before, after) if before == after => {}
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
            for name in names {
                let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(path, old.get(name), new.get(name), found);
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                compare(format!("{key}[{index}]"), Some(old), Some(new), found);
            }
        }
        _ => {
            let [before, after] = [before, after].map(|value| value.filter(|v| !v.is_null()).map(shown));
            found.push(Difference { key, before, after });
        }
    }
}

fn shown(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), Into::into);
    let mut end = text.char_indices().skip(SHOWN);
    match end.next() {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{
        load,
        tests::{EXAMPLE, HOST},
    };

    fn fleet(text: &str) -> Fleet {
        load("fleet.toml", text.as_bytes(), &HOST).unwrap().fleet
    }

    #[test]
    fn each_difference_is_told_once_with_what_is_done_about_it() {
        let before = fleet(EXAMPLE);
        let mut text = EXAMPLE.to_owned();
        for (old, new) in [
            ("memory = \"8GiB\"", "memory = \"9GiB\""),
            (
                "volumes = [{ name = \"state\", size = \"40GiB\"",
                "volumes = [{ name = \"state\", size = \"50GiB\"",
            ),
            ("TZ = \"UTC\"", "TZ = \"CET\", LANG = \"C\""),
            (
                "[links.build]",
                "[vms.new]\nvcpus = 1\nmemory = \"1GiB\"\nkernel = \"/k\"\nmodules = \"/m\"\n\
              roots = [\"/nix/store/1123456789abcdfghijklmnpqrsvwxyz-x\"]\n[links.rebuild]",
            ),
            ("listen = \"127.0.0.1:9198\"", "listen = \"127.0.0.1:9199\""),
            ("accel = \"auto\"", "accel = \"tcg\""),
        ] {
            assert!(text.contains(old), "{old}");
            text = text.replacen(old, new, 1);
        }
        let after = fleet(&text);
        // `gone` was removed by an earlier apply and is stopping; `builder` runs with fewer CPUs than the fleet has.
        let mut running =
            BTreeMap::from(["hydra", "builder"].map(|name| (name.to_owned(), before.vms[name].clone())));
        running.insert("gone".into(), before.vms["cache"].clone());
        running.get_mut("builder").unwrap().vcpus = 2;
        insta::assert_json_snapshot!(changes(&before, &after, &running));
        assert_eq!(changes(&after, &after, &BTreeMap::new()), []);
    }
}
