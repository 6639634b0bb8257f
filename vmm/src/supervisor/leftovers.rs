//! What an earlier `laird` left behind that belongs to no VM: processes that it had no time to write down, halves of files.

use crate::{
    fleet::schema::Fleet,
    host::thread,
    state::{dirs::Dirs, file},
    vm::{adopt, orphan, record::Record},
};
use std::{fs, time::Duration};

/// How long a process may take to end when told to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Removes it all. No VM's task runs yet.
pub(super) async fn remove(dirs: &Dirs, fleet: &Fleet) {
    let (in_thread, run) = (dirs.clone(), dirs.run.join("vms"));
    let found = thread::run(move || {
        let unnamed = orphan::unnamed(orphan::tagged(&run), &adopt::named_processes(&in_thread));
        // Where the record cannot be read, nothing is known and nothing is touched.
        unnamed.into_iter().filter(|one| is_readable(&in_thread, &one.vm)).collect::<Vec<_>>()
    });
    let orphans = found.await.unwrap_or_default();
    if !orphans.is_empty() {
        tracing::warn!(processes = ?orphans.iter().map(ToString::to_string).collect::<Vec<_>>(), "ending orphans");
        for left in orphan::end(orphans, PATIENCE).await {
            tracing::error!(vm = left.vm, process = %left, "an orphan is left");
        }
    }
    let (dirs, known) = (dirs.clone(), fleet.vms.keys().cloned().collect::<std::collections::BTreeSet<_>>());
    let files = thread::run(move || files(&dirs, |vm| known.contains(vm)));
    let _ = files.await;
}

fn is_readable(dirs: &Dirs, vm: &str) -> bool {
    dirs.vm(vm).is_ok_and(|vm_dirs| Record::read(&vm_dirs.record(), vm).is_ok())
}

fn files(dirs: &Dirs, known: impl Fn(&str) -> bool) {
    file::remove_leftovers(&dirs.run);
    file::remove_leftovers(&dirs.state);
    for generation in fs::read_dir(dirs.generations()).into_iter().flatten().flatten() {
        file::remove_leftovers(&generation.path());
    }
    for vm in adopt::run_directories(dirs) {
        file::remove_leftovers(&dirs.run.join("vms").join(vm));
    }
    for vm in adopt::state_directories(dirs) {
        let Ok(vm_dirs) = dirs.vm(&vm) else { continue };
        file::remove_leftovers(&vm_dirs.state);
        // Volumes that were being formatted. A VM that runs has none: they are made before it does.
        for entry in fs::read_dir(&vm_dirs.state).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "new") {
                let _ = fs::remove_file(entry.path());
            }
        }
        // What was wanted of a VM that is gone says nothing about a later one of its name.
        if !known(&vm) && !vm_dirs.run.exists() {
            let _ = fs::remove_file(vm_dirs.lasting());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sv4_halves_of_files_are_removed_and_the_rest_stays() {
        let directory = tempfile::tempdir().unwrap();
        let dirs = Dirs { state: directory.path().join("state"), run: directory.path().join("run") };
        dirs.create().unwrap();
        let known = dirs.vm("known").unwrap();
        let gone = dirs.vm("gone").unwrap();
        known.create().unwrap();
        fs::create_dir_all(&gone.state).unwrap();
        fs::create_dir_all(dirs.generations().join("g")).unwrap();
        let (halves, whole) = (
            [
                dirs.state.join(".x.new"),
                dirs.run.join(".x.new"),
                known.run.join(".state.json.new"),
                known.state.join(".life.json.new"),
                known.state.join("disk.new"),
                dirs.generations().join("g/.view.new"),
                gone.lasting(),
            ],
            [
                known.lasting(),
                known.volume("disk"),
                gone.volume("disk"),
                known.run.join("x"),
                dirs.generations().join("g/view"),
            ],
        );
        for file in halves.iter().chain(&whole) {
            fs::write(file, "x").unwrap();
        }
        let fleet = serde_json::from_value(serde_json::json!({
            "schema": 1, "store": { "sources": [] },
            "vms": { "known": { "vcpus": 1, "memory": "512MiB", "kernel": "/k", "modules": "/m", "roots": [] } },
        }));
        remove(&dirs, &fleet.unwrap()).await;
        assert!(halves.iter().all(|file| !file.exists()), "{halves:?}");
        assert!(whole.iter().all(|file| file.exists()), "{whole:?}");
    }
}
