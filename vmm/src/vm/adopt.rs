//! Finding again what an earlier `laird` started in this boot of the host.
//!
//! A recorded process id is a hint only: it counts if the process has the recorded start time and this boot has the recorded id. All
//! that is decided here follows from the record; neither the fleet file of today nor the store is looked at.

use super::{
    actor::Beginning,
    lasting::{self, Lasting},
    machine::{Found, Life, Part, State, Wanted},
    record::{Record, RecordError},
    restart::Moment,
    running::Running,
};
use crate::{
    error::chain,
    host::process::{Process, ProcessError, ProcessId},
    state::dirs::{Dirs, VmDirs},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// What came of looking for a VM that an earlier `laird` recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All of it runs, and goes on.
    Adopt,
    /// Some or all of its processes have ended; what is left is undone.
    Missing,
    /// The record contradicts the host: nothing of it is touched.
    Quarantine,
    /// The record cannot be understood: nothing of it is touched.
    Unparseable,
}

impl Verdict {
    /// One word, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Adopt => "adopt",
            Self::Missing => "missing",
            Self::Quarantine => "quarantine",
            Self::Unparseable => "unparseable",
        }
    }
}

/// The names of VMs that have a directory below `RUN/vms`, with runtime state or without.
pub fn run_directories(dirs: &Dirs) -> Vec<String> {
    names(&dirs.run)
}

/// The names of VMs that have a directory below `STATE/vms`.
pub fn state_directories(dirs: &Dirs) -> Vec<String> {
    names(&dirs.state)
}

fn names(parent: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(parent.join("vms")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The process ids that the readable records name. What has our tag and is in none of these groups has no owner.
pub fn named_processes(dirs: &Dirs) -> std::collections::BTreeSet<i32> {
    let records = run_directories(dirs).into_iter().filter_map(|name| {
        let path = dirs.vm(&name).ok()?.record();
        Record::read(&path, &name).ok()?
    });
    records.flat_map(|record| record.processes.into_values()).map(|id| id.pid).collect()
}

/// What to begin with for the VM `name`, of which the fleet says whether it starts by itself.
pub fn adopt(name: &str, autostart: bool, dirs: &Dirs, boot_id: &str, moment: Moment) -> Beginning {
    let Ok(vm_dirs) = dirs.vm(name) else {
        // With such a name nothing of it can ever have run.
        return Beginning::stopped(lasting::wanted(None, autostart));
    };
    let lasting = Lasting::read(&vm_dirs.lasting());
    let record = match Record::read(&vm_dirs.record(), name) {
        Ok(record) => record,
        Err(error) => return distrust(name, &error),
    };
    match record.filter(|record| record.boot_id == boot_id) {
        // Whatever is wrong with the other file: it runs.
        Some(record) => from_record(name, record, lasting.ok().flatten().as_ref(), moment),
        None => match lasting {
            Ok(lasting) => from_lasting(&vm_dirs, lasting, autostart, boot_id, moment),
            Err(error) => distrust(name, &error),
        },
    }
}

fn distrust(name: &str, error: &RecordError) -> Beginning {
    let verdict = if error.is_unparseable() { Verdict::Unparseable } else { Verdict::Quarantine };
    quarantine(name, verdict, error.to_string())
}

fn quarantine(name: &str, verdict: Verdict, reason: String) -> Beginning {
    tracing::error!(vm = name, verdict = verdict.word(), reason, "quarantined");
    let life = Life { state: State::Quarantined(reason), ..Life::stopped(Wanted::Stopped) };
    Beginning { verdict: Some(verdict), ..Beginning::of(life) }
}

/// Nothing of it was recorded to run in this boot.
fn from_lasting(
    dirs: &VmDirs,
    lasting: Option<Lasting>,
    autostart: bool,
    boot_id: &str,
    moment: Moment,
) -> Beginning {
    // Of an earlier boot, or of a start that had not come to its record.
    let _ = std::fs::remove_dir_all(&dirs.run);
    let wanted = lasting::wanted(lasting.as_ref(), autostart);
    let Some(lasting) = lasting else { return Beginning::stopped(wanted) };
    let life = lasting.life_in(boot_id);
    let (life, actions) = life.resume(&Found { missing: Part::ALL.into() }, wanted, moment);
    Beginning { actions, ..Beginning::of(life) }
}

fn from_record(name: &str, record: Record, lasting: Option<&Lasting>, moment: Moment) -> Beginning {
    let mut processes = BTreeMap::new();
    for (part, id) in &record.processes {
        match Process::adopt(*id) {
            Ok(process) => {
                processes.insert(*part, Arc::new(process));
            }
            Err(ProcessError::Gone(_)) => {
                let ProcessId { pid, start_time } = id;
                let reason = format!(
                    "process {pid}, recorded as {part} with start time {start_time}, is another process now"
                );
                return quarantine(name, Verdict::Quarantine, reason);
            }
            Err(error) if error.is_end() => {}
            // It may well run: for want of descriptors, say, nobody can tell.
            Err(error) => {
                let reason = format!("{part} cannot be looked at: {}", chain(&error));
                return quarantine(name, Verdict::Quarantine, reason);
            }
        }
    }
    let missing: Vec<_> = Part::ALL.into_iter().filter(|part| !processes.contains_key(part)).collect();
    let running = matches!(record.life.state, State::Booting | State::Ready | State::Stopping(_));
    let verdict = if missing.is_empty() && running { Verdict::Adopt } else { Verdict::Missing };
    tracing::info!(vm = name, verdict = verdict.word(), state = record.life.state.word(), ?missing, "found");
    // Written before the record, so at least as new.
    let wanted = lasting.map_or(record.life.wanted, |lasting| lasting.life.wanted);
    let before = record.life.state.clone();
    let (life, actions) = record.life.resume(&Found { missing }, wanted, moment);
    let since = if life.state == before { record.since } else { jiff::Timestamp::now() };
    Beginning {
        life,
        since,
        running: Running::adopted(record.plan, processes, record.start),
        actions,
        verdict: Some(verdict),
    }
}

#[cfg(test)]
mod tests;
