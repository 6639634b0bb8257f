//! Whether this host has what a fleet names: sources, kernels, modules, roots with what is to run of them, credentials.
//!
//! For `vmctl check` and `apply`, which refuse a fleet of which something is missing. `laird` starts without this look: one missing
//! file fails one VM, when that starts. Nothing is opened but databases of Nix, once they are known to be regular files.

use super::{
    file::{DIRECTORY, REGULAR},
    problem::{Finding, Path},
    resolve::{self, ResolveError},
    schema::{Credential, Fleet, Source, Vm},
    validate::Verdict,
    view,
};
use crate::{
    error::chain,
    host::facts::{self, NoKvm},
};
use lair_virtiofs::store::{self, ClosureError, DatabaseError, StorePath, StorePathError};
use std::{collections::HashSet, io::ErrorKind, path::PathBuf};

/// Why there is no view of a VM.
enum NoView {
    Root(usize, StorePathError),
    Closure(ClosureError),
}

/// Looks at all that `fleet` names.
pub(super) fn check(fleet: &Fleet, verdict: &mut Verdict) {
    let root = Path::root();
    if let Err(reason) = facts::engine(fleet.host.accel) {
        let finding = Finding::at(&root.key("host").key("accel"), reason.to_string());
        let finding =
            finding.hint("allowed without KVM: \"auto\" and \"tcg\", which run guests under emulation");
        match reason {
            NoKvm::Denied => verdict.warnings.push(finding),
            _ => verdict.errors.push(finding),
        }
    }
    let sources = &fleet.store.sources;
    let mut usable = true;
    for (index, given) in sources.iter().enumerate() {
        usable &= source(given, &root.key("store").key("sources").index(index), verdict);
    }
    for (name, vm) in &fleet.vms {
        let path = root.key("vms").key(name);
        for (name, given) in &vm.credentials {
            let at = path.key("credentials").key(name);
            let at = if matches!(given, Credential::File(_)) { at } else { at.key("file") };
            credential(resolve::of_host(given.file(), REGULAR), &at, verdict);
        }
        // Where a source is missing, nothing can be said of what should be in it.
        if usable {
            found(resolve::file(&vm.kernel, sources).map(drop), &path.key("kernel"), verdict);
            found(resolve::directory(&vm.modules, sources).map(drop), &path.key("modules"), verdict);
        }
    }
    if usable {
        views(fleet, &root.key("vms"), verdict);
    }
}

/// Looks at the views of all VMs. Those with the same roots have the same, and only one is in memory at a time.
fn views(fleet: &Fleet, at: &Path, verdict: &mut Verdict) {
    let mut vms: Vec<_> = fleet.vms.iter().collect();
    vms.sort_by_key(|(_, vm)| &vm.roots);
    for alike in vms.chunk_by(|(_, one), (_, next)| one.roots == next.roots) {
        let Some((_, first)) = alike.first() else { continue };
        let view = paths(&first.roots, &fleet.store.sources);
        for (name, vm) in alike {
            in_view(vm, &view, &at.key(name), verdict);
        }
    }
}

/// Whether a source can be used.
fn source(source: &Source, at: &Path, verdict: &mut Verdict) -> bool {
    let (store_key, database_key) = match source {
        Source::Store(_) => ("store", "database"),
        Source::Root(_) => ("root", "root"),
    };
    if !found(resolve::of_host(&source.store_dir(), DIRECTORY), &at.key(store_key), verdict)
        || !found(resolve::database(source), &at.key(database_key), verdict)
    {
        return false;
    }
    match readable(source) {
        Ok(()) => true,
        Err(error) => {
            verdict.errors.push(Finding::at(&at.key(database_key), chain(&error)));
            false
        }
    }
}

/// Whether a source's database answers.
fn readable(source: &Source) -> Result<(), DatabaseError> {
    // A database is read only when it is asked something: for a path that is valid nowhere.
    let nobody = StorePath::from_base_name(&format!("{}-nobody", "0".repeat(32)));
    match store::closure(&[source.as_store()], &nobody.into_iter().collect::<Vec<_>>()) {
        Err(ClosureError::Database(error)) => Err(error),
        _ => Ok(()),
    }
}

/// Reports what was not found. What this user may not look at is no error: `laird` may.
fn found(outcome: Result<(), ResolveError>, at: &Path, verdict: &mut Verdict) -> bool {
    let Err(error) = outcome else { return true };
    let finding = Finding::at(at, chain(&error));
    if error.kind() == Some(ErrorKind::PermissionDenied) {
        verdict.warnings.push(finding.hint("this user may not look; laird will see when it starts the VM"));
    } else {
        verdict.errors.push(finding);
    }
    false
}

/// The shim reads it when the guest asks, so it may come later; what is no file never becomes one.
fn credential(outcome: Result<(), ResolveError>, at: &Path, verdict: &mut Verdict) {
    match outcome {
        Err(error) if error.kind() == Some(ErrorKind::NotFound) => {
            let hint = "the VM may be started, and waits for it";
            verdict.warnings.push(Finding::at(at, chain(&error)).hint(hint));
        }
        outcome => drop(found(outcome, at, verdict)),
    }
}

/// The paths of the closure of `roots`.
fn paths(roots: &[PathBuf], sources: &[Source]) -> Result<HashSet<String>, NoView> {
    let parse = |(index, root): (usize, &PathBuf)| {
        StorePath::parse(&root.to_string_lossy()).map_err(|error| NoView::Root(index, error))
    };
    let roots: Vec<StorePath> = roots.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
    let stores: Vec<_> = sources.iter().map(Source::as_store).collect();
    let closure = store::closure(&stores, &roots).map_err(NoView::Closure)?;
    Ok(closure.paths.iter().map(|info| info.path.to_string()).collect())
}

fn in_view(vm: &Vm, view: &Result<HashSet<String>, NoView>, at: &Path, verdict: &mut Verdict) {
    let roots = at.key("roots");
    let finding = match view {
        Ok(paths) => {
            for outside in view::outside(vm, |path| paths.contains(path)) {
                let message = format!("{} is not in the closure of the roots", outside.path);
                let finding = Finding::at(&at.join(&outside.key), message);
                verdict.errors.push(finding.hint("the guest would not have it; add its store path to roots"));
            }
            return;
        }
        Err(NoView::Root(index, error)) => Finding::at(&roots.index(*index), error.to_string()),
        Err(NoView::Closure(error @ ClosureError::UnknownRoot { root, .. })) => {
            let root = root.to_string();
            let index = vm.roots.iter().position(|given| given.as_os_str() == root.as_str());
            let at = index.map_or(roots.clone(), |index| roots.index(index));
            Finding::at(&at, chain(error))
                .hint("allowed: store paths that are valid; build it, or copy it there")
        }
        Err(NoView::Closure(error)) => Finding::at(&roots, chain(error)),
    };
    verdict.errors.push(finding);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// Tests run as root as well, who may look at everything.
    #[test]
    fn cf6_what_this_user_may_not_look_at_is_a_warning() {
        let error = |kind: ErrorKind| {
            let source = io::Error::from(kind);
            Err(ResolveError::Io { path: "/secret/key".into(), at: "/secret/key".into(), source })
        };
        let mut verdict = Verdict::default();
        assert!(!found(error(ErrorKind::PermissionDenied), &Path::root(), &mut verdict));
        credential(error(ErrorKind::PermissionDenied), &Path::root(), &mut verdict);
        assert!(verdict.errors.is_empty() && !verdict.warnings.is_empty());
        assert!(!found(error(ErrorKind::NotFound), &Path::root(), &mut verdict));
        assert!(!verdict.errors.is_empty());
    }
}
