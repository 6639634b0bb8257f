//! Finding again what an earlier `laird` started in this boot of the host.
//!
//! A recorded process id is a hint only: it counts if the process has the recorded start time and this boot has the recorded id.

use super::{
    actor::Beginning,
    machine::{Part, State},
    plan::plan,
    record::Record,
    steps::Instance,
};
use crate::{
    error::chain,
    fleet::schema::Fleet,
    host::{Host, process::Process},
    state::dirs::Dirs,
};
use std::{collections::BTreeMap, sync::Arc};

/// The parts without which a guest does not run.
const PARTS: [Part; 4] = [Part::Hypervisor, Part::StoreBackend, Part::VsockDevice, Part::Shim];

/// The names of VMs that have a directory for runtime state.
pub fn recorded(dirs: &Dirs) -> Vec<String> {
    let entries = std::fs::read_dir(dirs.run.join("vms")).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().join("state.json").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// What to begin with for the VM `name`.
pub async fn adopt(name: &str, fleet: &Fleet, dirs: &Dirs, host: &Host) -> Beginning {
    let begin = |state, since, instance| Beginning { state, since, instance };
    let now = jiff::Timestamp::now();
    let nothing = || begin(State::Stopped, now, Instance::default());
    let quarantine = |reason: String| {
        tracing::error!(vm = name, reason, "quarantined");
        begin(State::Quarantined(reason), now, Instance::default())
    };
    let vm_dirs = match dirs.vm(name) {
        Ok(vm_dirs) => vm_dirs,
        Err(error) => return quarantine(error.to_string()),
    };
    let record = match Record::read(&vm_dirs.record(), name) {
        Ok(None) => return nothing(),
        Ok(Some(record)) => record,
        Err(error) => return quarantine(error.to_string()),
    };
    if record.boot_id != host.boot_id {
        // The host has been started anew: nothing can be left of it but files.
        let _ = std::fs::remove_dir_all(&vm_dirs.run);
        return nothing();
    }
    let processes: BTreeMap<_, _> = record
        .processes
        .iter()
        .filter_map(|(part, id)| Some((*part, Arc::new(Process::adopt(*id).ok()?))))
        .collect();
    let plan = match plan(name, &record.vm, fleet, dirs, record.engine, record.generation) {
        Ok(plan) => plan,
        Err(error) => return quarantine(format!("it cannot be adopted: {}", chain(&error))),
    };
    let whole = PARTS.iter().all(|part| processes.contains_key(part));
    let mut instance =
        Instance::adopted(plan, processes, host.cgroups.as_ref().map(|cgroups| cgroups.vm(name)));
    match record.state {
        // What the guest has become meanwhile, its shim will say.
        state @ (State::Booting | State::Ready) if whole => {
            tracing::info!(vm = name, "adopted");
            begin(state, record.since, instance)
        }
        // A start or a stop that was cut short, or a VM that lost a part: undone, so that it can begin anew.
        _ => {
            tracing::info!(vm = name, "cleaning up what is left of it");
            instance.clean_up().await;
            nothing()
        }
    }
}
