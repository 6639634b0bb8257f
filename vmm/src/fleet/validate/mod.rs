//! Whether a fleet that has the right shape makes sense. Pure: what the host has comes in, files are looked at elsewhere.
//!
//! Everything wrong is found in one go.

mod access;
mod link;
mod vm;

use super::{
    gpus::Gpu,
    limits::{HostFacts, Need},
    problem::{Finding, Findings, Path},
    schema::{Fleet, IdRange, Source, Store},
    units::Size,
};
use crate::host::ids;
use std::collections::BTreeMap;

/// The host's own name in `from` of a link.
pub(super) const HOST: &str = "host";

/// The most sources: each is looked up in turn.
const SOURCES_MAX: usize = 16;

/// What must not be, and what is better not.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub(super) errors: Findings,
    pub(super) warnings: Findings,
}

impl Verdict {
    fn error(&mut self, finding: Finding) {
        self.errors.push(finding);
    }

    /// Reports what a check of the value at `path` says.
    fn value(&mut self, path: &Path, checked: Result<(), String>) {
        if let Err(message) = checked {
            self.error(Finding::at(path, message));
        }
    }

    /// Reports what a check of the key at `path` says.
    fn key(&mut self, path: &Path, checked: Result<(), String>) {
        if let Err(message) = checked {
            self.error(Finding::at_key(path, message));
        }
    }
}

/// Things of which there may be only one, and where each was.
struct Unique<K> {
    seen: BTreeMap<K, Path>,
}

impl<K: Ord> Unique<K> {
    fn new() -> Self {
        Self { seen: BTreeMap::new() }
    }

    /// Where `thing` was before.
    fn insert(&mut self, thing: K, path: &Path) -> Option<Path> {
        if let Some(first) = self.seen.get(&thing) {
            return Some(first.clone());
        }
        self.seen.insert(thing, path.clone());
        None
    }
}

/// Checks all of a fleet.
pub(super) fn fleet(fleet: &Fleet, host: &HostFacts) -> Verdict {
    let mut verdict = Verdict::default();
    let root = Path::root();
    if let Some(range) = fleet.host.ids {
        verdict.value(&root.key("host").key("ids"), ids(range));
    }
    store(&fleet.store, &root.key("store").key("sources"), &mut verdict);
    for (name, vm) in &fleet.vms {
        vm::check(name, vm, &root.key("vms").key(name), host, &mut verdict);
    }
    devices(fleet, &root.key("vms"), &mut verdict);
    link::check_all(fleet, &root.key("links"), &mut verdict);
    access::check(&fleet.access, &root.key("access"), &mut verdict);
    if let Some(listen) = &fleet.metrics.listen {
        let checked = super::names::loopback(listen).map(drop);
        verdict.value(&root.key("metrics").key("listen"), checked);
    }
    memory(fleet, &root.key("vms"), host, &mut verdict);
    verdict
}

/// Numbers that belong to nobody: not root's or those of the system's own users, and not 65534 and 65535, which mean nobody and none.
fn ids(range: IdRange) -> Result<(), String> {
    const FIRST: u32 = 1000;
    let IdRange { first, count } = range;
    if count < ids::PER_VM {
        return Err(format!("{count} numbers are not enough for one VM, which takes {}", ids::PER_VM));
    }
    // The last two numbers mean "unchanged" to the kernel, in 16 and in 32 bits.
    let Some(last) =
        first.checked_add(count).map(|end| end.saturating_sub(1)).filter(|last| *last < u32::MAX)
    else {
        return Err(format!("{count} numbers from {first} on go beyond {}, the last there is", u32::MAX - 1));
    };
    if first < FIRST {
        return Err(format!("begins at {first}; numbers below {FIRST} belong to the system"));
    }
    if first <= 65535 && last >= 65534 {
        return Err(format!("{first} to {last} contains 65534 and 65535, which mean nobody and none"));
    }
    Ok(())
}

fn store(store: &Store, path: &Path, verdict: &mut Verdict) {
    if !(1..=SOURCES_MAX).contains(&store.sources.len()) {
        let message = format!("has {} sources; 1 to {SOURCES_MAX} are allowed", store.sources.len());
        verdict.error(Finding::at(path, message));
    }
    let mut seen = Unique::new();
    for (index, source) in store.sources.iter().enumerate().take(SOURCES_MAX) {
        let path = path.index(index);
        match source {
            Source::Store(source) => {
                verdict.value(&path.key("store"), file(&source.store));
                verdict.value(&path.key("database"), file(&source.database));
            }
            Source::Root(source) => verdict.value(&path.key("root"), file(&source.root)),
        }
        if let Some(first) = seen.insert(source.store_dir(), &path) {
            let message = "has the same store directory as another source";
            verdict.error(Finding::at(&path, message).other(super::problem::Spot::Value(first)));
        }
    }
}

/// [`super::names::path`] for a path.
fn file(path: &std::path::Path) -> Result<(), String> {
    super::names::path(&path.to_string_lossy())
}

/// Not an error: not all VMs need to run at once. Starting the second one is.
fn devices(fleet: &Fleet, path: &Path, verdict: &mut Verdict) {
    let mut seen = Unique::new();
    for (name, vm) in &fleet.vms {
        let mut own = std::collections::BTreeSet::new();
        for (index, gpu) in vm.gpus.iter().enumerate() {
            let Gpu::At(at) = gpu else { continue };
            let path = path.key(name).key("gpus").index(index).key("address");
            // The same one twice in a VM is told elsewhere.
            if own.insert(at.address)
                && let Some(first) = seen.insert(at.address, &path)
            {
                let message = "another VM asks for this device as well; only one of them can run at a time";
                verdict.warnings.push(Finding::at(&path, message).other(super::problem::Spot::Value(first)));
            }
        }
    }
}

/// Not an error: not all VMs need to run at once. Starting one too many is.
fn memory(fleet: &Fleet, path: &Path, host: &HostFacts, verdict: &mut Verdict) {
    let wanted = |size: u64, vm: &super::schema::Vm| size.saturating_add(Need::of(vm).sum().0);
    let all = Size(fleet.vms.values().fold(0, wanted));
    if all > host.budget() {
        let (budget, memory, reserve) = (host.budget(), host.memory, host.reserve());
        verdict.warnings.push(Finding::at(path, format!(
            "all VMs together need {all} with their processes, more than the {budget} for VMs (the host has {memory} and keeps {reserve}); not all can run at once"
        )));
    }
}
