//! Fleet files for tests and the demo.

use crate::testbed::Testbed;
use anyhow::Result;
use lair_vmm::fleet::{
    schema::{
        Accel, Access, Fleet, Host, Limits, Link, Metrics, Overlay, Role, RootSource, SCHEMA, Service,
        Source, Store, Target, Users, Vm, VmTarget,
    },
    units::Size,
};
use std::{collections::BTreeMap, path::PathBuf};

/// Mebibytes.
pub const fn mib(number: u64) -> Size {
    Size(number << 20)
}

/// A fleet over the test bed's store, without VMs.
pub fn empty(testbed: &Testbed) -> Fleet {
    Fleet {
        schema: SCHEMA,
        // The machines that run the tests have no usable cgroups, and their directories are not for other users to enter.
        host: Host { accel: Accel::Auto, limits: Limits::None, users: Users::Shared, ids: None },
        store: Store { sources: vec![Source::Root(RootSource { root: testbed.store_root.clone() })] },
        vms: BTreeMap::new(),
        links: BTreeMap::new(),
        access: Access::default(),
        metrics: Metrics::default(),
    }
}

/// A plain VM with one virtual CPU whose view is the closure of `roots`, names of the test bed, the first being its
/// profile.
pub fn vm(testbed: &Testbed, roots: &[&str]) -> Result<Vm> {
    let paths =
        roots.iter().map(|name| Ok(PathBuf::from(testbed.path(name)?))).collect::<Result<Vec<_>>>()?;
    Ok(Vm {
        role: Role::Plain,
        vcpus: 1,
        memory: mib(512),
        kernel: testbed.kernel.clone().into(),
        modules: testbed.modules.clone().into(),
        init: None,
        cmdline: String::new(),
        profile: paths.first().cloned(),
        roots: paths,
        overlay: None,
        volumes: vec![],
        gpus: vec![],
        network: Default::default(),
        credentials: BTreeMap::new(),
        services: vec![],
        limits: Default::default(),
        autostart: true,
        restart: Default::default(),
    })
}

/// The overlay of a VM that builds or substitutes.
pub fn writable() -> Option<Overlay> {
    Some(Overlay::Tmpfs(mib(512)))
}

/// A service that is up once `ready` accepts connections.
pub fn service(name: &str, command: &[&str], ready: Option<&str>) -> Service {
    Service {
        name: name.into(),
        command: command.iter().map(ToString::to_string).collect(),
        environment: BTreeMap::new(),
        ready: ready.map(Into::into),
    }
}

/// A link from VMs to what `connect` is in another.
pub fn link(from: &[&str], to: &str, port: u32, connect: &str) -> Link {
    Link {
        from: from.iter().map(ToString::to_string).collect(),
        listen: None,
        to: Target::Vm(VmTarget { vm: to.into(), port, connect: Some(connect.into()) }),
    }
}
