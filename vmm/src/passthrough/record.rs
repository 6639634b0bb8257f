//! What is on disk of devices that are not the host's: a file for each whole, `STATE/devices/ADDRESS.json`, by the lowest address in it.

use super::{
    binding::Function,
    certificate::{Certificate, Measure},
    machine::{Life, Reason, State},
};
use crate::{
    host::pci::Address,
    hypervisor::ports::Place,
    state::file::{self, WriteError},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The version of the format.
const SCHEMA: u32 = 1;

/// The longest record that is read, in bytes: a group of more devices than any has.
const LENGTH_MAX: u64 = 1 << 20;

/// What is known of devices that go together.
///
/// A field that this `laird` does not know is a later one's word, and says nothing against the device: it is passed over, and lost once the record is
/// written again. What an earlier `laird` must not pass over has another `schema`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The version of the format.
    pub schema: u32,
    /// The boot of the host's kernel in which this is true. After another boot, all devices are the host's again.
    pub boot_id: String,
    /// All functions, as they were before they were taken; by address.
    pub functions: Vec<Function>,
    /// Where they are.
    pub life: Life,
    /// Since when.
    pub since: jiff::Timestamp,
    /// How long the last reset took, in milliseconds.
    pub reset_ms: Option<u64>,
    /// The lease that a VM has, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Certificate>,
    /// Where the guest of the VM that has them sees them. None of those that it does not see, or that are in a machine that an earlier `laird`
    /// started, whose ports are in slots that nobody knows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub places: BTreeMap<Address, Place>,
    /// How they were when they were looked at last, after a reset. A lease begins and ends with that.
    #[serde(skip)]
    pub look: Vec<(Address, Measure)>,
}

impl Holding {
    /// Devices that are the host's still.
    pub fn of(functions: Vec<Function>, boot_id: &str) -> Self {
        let life = Life::of_the_host();
        Self {
            schema: SCHEMA,
            boot_id: boot_id.into(),
            functions,
            life,
            since: jiff::Timestamp::now(),
            reset_ms: None,
            lease: None,
            places: BTreeMap::new(),
            look: vec![],
        }
    }

    /// Whether a device is among them.
    pub fn has(&self, address: Address) -> bool {
        self.functions.iter().any(|function| function.address == address)
    }

    /// The IOMMU groups that they are in.
    pub fn groups(&self) -> Vec<u32> {
        let mut groups: Vec<_> = self.functions.iter().filter_map(|function| function.group).collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

/// Where the record of a whole is.
fn path(directory: &Path, key: Address) -> PathBuf {
    directory.join(format!("{key}.json"))
}

/// Writes a record, or removes it where the device is the host's again.
pub fn write(directory: &Path, key: Address, holding: Option<&Holding>) -> Result<(), WriteError> {
    let path = path(directory, key);
    if let Some(holding) = holding {
        return file::replace_json(&path, holding, 0o600);
    }
    let removed = match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| File::open(directory)?.sync_all()),
    };
    removed.map_err(|source| WriteError { path, step: "removing it", source })
}

/// All records that still hold in this boot. A quarantine holds in any. One that cannot be understood is a quarantine as well: nobody
/// knows who has the device.
pub fn read(directory: &Path, boot_id: &str) -> BTreeMap<Address, Holding> {
    let mut held = BTreeMap::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(key) = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<Address>().ok())
        else {
            continue;
        };
        let mut holding = parse(&entry.path()).unwrap_or_else(|error| {
            tracing::error!(device = %key, error, "quarantined: what is recorded of it is damaged");
            damaged(key, boot_id, error)
        });
        // The host went down under a VM in which it had failed.
        if holding.boot_id != boot_id
            && let Some(reason) = holding.life.blame.take()
        {
            let lease = holding.lease.as_mut().filter(|lease| lease.is_open());
            lease.into_iter().for_each(|lease| lease.end(&[], None, Some(&reason), holding.since));
            holding.life.state = State::Quarantined { reason };
        }
        let holds = holding.boot_id == boot_id || matches!(holding.life.state, State::Quarantined { .. });
        if holds {
            held.insert(key, holding);
        } else if let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove what an earlier boot left");
        }
    }
    held
}

fn damaged(key: Address, boot_id: &str, error: String) -> Holding {
    let function = Function {
        address: key,
        vendor: crate::host::pci::Id(0),
        device: crate::host::pci::Id(0),
        driver: None,
        driver_override: None,
        d3cold: None,
        width: None,
        group: None,
        bars: vec![],
    };
    let state = State::Quarantined { reason: Reason::Damaged { error } };
    Holding {
        life: Life { state, clean: false, last: None, blame: None },
        ..Holding::of(vec![function], boot_id)
    }
}

fn parse(path: &Path) -> Result<Holding, String> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(LENGTH_MAX).read_to_end(&mut text).map_err(|error| error.to_string())?;
    let holding: Holding = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if holding.schema != SCHEMA {
        return Err(format!("it has schema {}, this laird reads {SCHEMA}", holding.schema));
    }
    if holding.functions.is_empty() {
        return Err("it names no device".into());
    }
    Ok(holding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> Address {
        "0000:01:00.0".parse().unwrap()
    }

    fn holding(state: State) -> Holding {
        let function = damaged(address(), "boot", String::new()).functions;
        Holding {
            life: Life { state, clean: false, last: None, blame: None },
            ..Holding::of(function, "boot")
        }
    }

    #[test]
    fn vf8_a_quarantine_holds_over_boots_and_all_else_ends_with_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let reason = Reason::Dead { address: "0000:01:00.0".into() };
        for (state, later) in [
            (State::Leased { vm: "a".into() }, false),
            (State::Free, false),
            (State::Probed { vm: "a".into() }, false),
            (State::Quarantined { reason }, true),
        ] {
            let written = holding(state);
            write(directory.path(), address(), Some(&written)).unwrap();
            assert_eq!(read(directory.path(), "boot"), BTreeMap::from([(address(), written.clone())]));
            assert_eq!(read(directory.path(), "next").len(), usize::from(later));
            assert_eq!(directory.path().join("0000:01:00.0.json").exists(), later);
        }
        write(directory.path(), address(), None).unwrap();
        write(directory.path(), address(), None).unwrap();
        assert!(read(directory.path(), "boot").is_empty());
    }

    /// As after a step back to an earlier release.
    #[test]
    fn sv3_what_a_later_laird_has_written_besides_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place { port: "0000:00:1a.0".parse().unwrap(), function: 0 };
        let places = BTreeMap::from([(address(), place)]);
        let known = Holding { places, ..holding(State::Leased { vm: "a".into() }) };
        let mut later = serde_json::to_value(&known).unwrap();
        for within in ["", "/functions/0", "/life", "/places/0000:01:00.0"] {
            let part = later.pointer_mut(within).unwrap();
            part["weather"] = serde_json::json!({ "is": "fine" });
        }
        fs::write(directory.path().join("0000:01:00.0.json"), later.to_string()).unwrap();
        assert_eq!(read(directory.path(), "boot"), BTreeMap::from([(address(), known)]));
    }

    #[test]
    fn sv3_what_cannot_be_understood_is_a_quarantine_and_other_files_are_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let whole = serde_json::to_string(&holding(State::Free)).unwrap();
        for text in ["", "{", "[]", &whole.replace("\"schema\":1", "\"schema\":9"), &whole[..whole.len() - 2]]
        {
            fs::write(directory.path().join("0000:01:00.0.json"), text).unwrap();
            let held = read(directory.path(), "boot");
            let State::Quarantined { reason: Reason::Damaged { .. } } = &held[&address()].life.state else {
                panic!("{held:?}")
            };
        }
        fs::write(directory.path().join("../0000:02:00.0.json.new"), "x").unwrap_or_default();
        fs::write(directory.path().join("notes"), "x").unwrap();
        assert_eq!(read(directory.path(), "boot").len(), 1);
    }
}
