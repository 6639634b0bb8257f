//! Whether what a VM is told to run is in its view. Pure: the closure comes in.

use super::{names, problem::Path, schema::Vm};

/// A path of a VM that its view does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{key} {path} is not in the closure of the roots, so the guest would not have it; add its store path to roots"
)]
pub struct Outside {
    /// Where it stands in the VM, such as `services[0].command[0]`.
    pub key: Path,
    /// The path.
    pub path: String,
}

/// What of `vm` is outside of its view; `in_view` says whether a store path (`/nix/store/HASH-NAME`) is in it.
///
/// Programs of services that are not in a store are the guest's own business.
pub fn outside(vm: &Vm, in_view: impl Fn(&str) -> bool) -> Vec<Outside> {
    let root = Path::root();
    let init = vm.init.iter().map(|init| (root.key("init"), init.to_string_lossy().into_owned()));
    let profile =
        vm.profile.iter().map(|profile| (root.key("profile"), profile.to_string_lossy().into_owned()));
    let programs = vm.services.iter().enumerate().filter_map(|(index, service)| {
        let key = root.key("services").index(index).key("command").index(0);
        Some((key, service.command.first()?.clone()))
    });
    init.chain(profile)
        .chain(programs)
        .filter(|(_, path)| names::store_path(path).is_ok_and(|(whole, _)| !in_view(whole)))
        .map(|(key, path)| Outside { key, path })
        .collect()
}
