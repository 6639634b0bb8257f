//! What of the host a VM has for itself: a VM that is new has to wait for one that is gone and has the same.

use crate::{
    fleet::schema::{Fleet, Target},
    vm::plan::HOST,
};
use std::collections::BTreeSet;

/// One thing of the host that one VM at a time can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claim {
    /// An address or socket of the host at which its shim listens.
    Listen(String),
    /// Devices. Which they are may not be known before the VM starts, so all VMs with devices wait for each other.
    Devices,
}

/// The claims of the VM `name`. Its volumes are named after it, so nobody else claims them.
pub(super) fn of(name: &str, fleet: &Fleet) -> BTreeSet<Claim> {
    let to_it = fleet.links.values().filter(|link| {
        matches!(&link.to, Target::Vm(target) if target.vm == name)
            && link.from.iter().any(|from| from == HOST)
    });
    let devices = fleet.vms.get(name).is_some_and(|vm| !vm.gpus.is_empty());
    let devices = devices.then_some(Claim::Devices);
    to_it.filter_map(|link| link.listen.clone()).map(Claim::Listen).chain(devices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_claims_the_addresses_at_which_the_host_reaches_it() {
        let fleet: Fleet = serde_json::from_value(serde_json::json!({
            "schema": 1,
            "store": { "sources": [] },
            "links": {
                "web": { "from": ["host"], "listen": "127.0.0.1:3000", "to": { "vm": "a", "port": 3000 } },
                "db": { "from": ["b"], "listen": "127.0.0.1:5432", "to": { "vm": "a", "port": 5432 } },
                "out": { "from": ["a"], "to": { "host": "/run/x.sock" } },
            },
        }))
        .unwrap();
        assert_eq!(of("a", &fleet), BTreeSet::from([Claim::Listen("127.0.0.1:3000".into())]));
        assert_eq!(of("b", &fleet), BTreeSet::new());
    }

    #[test]
    fn vf10_vms_with_devices_wait_for_each_other() {
        let vm = |gpus: serde_json::Value| serde_json::json!({ "vcpus": 1, "memory": "512MiB", "kernel": "/k", "modules": "/m", "roots": [], "gpus": gpus });
        let fleet: Fleet = serde_json::from_value(serde_json::json!({
            "schema": 1,
            "store": { "sources": [] },
            "vms": { "a": vm(serde_json::json!([{ "address": "0000:01:00.0" }])), "b": vm(serde_json::json!([])) },
        }))
        .unwrap();
        assert_eq!(of("a", &fleet), BTreeSet::from([Claim::Devices]));
        assert_eq!(of("b", &fleet), BTreeSet::new());
    }
}
