//! Checks of links, and of links against each other.

use super::{HOST, Unique, Verdict, vm::unknown};
use crate::fleet::{
    names,
    problem::{Finding, Path, Spot, quoted},
    schema::{Fleet, HostTarget, Link, Target, VmTarget},
};

/// The most sides that one link may have.
const FROM_MAX: usize = 1024;

/// What links must not share.
struct Shared<'a> {
    /// Where a VM, or the host, finds a link.
    listeners: Unique<(&'a str, String)>,
    /// Where a link ends in a VM.
    ports: Unique<(&'a str, u32)>,
}

pub(super) fn check_all(fleet: &Fleet, path: &Path, verdict: &mut Verdict) {
    let mut shared = Shared { listeners: Unique::new(), ports: Unique::new() };
    for (name, link) in &fleet.links {
        let path = path.key(name);
        verdict.key(&path, names::name(name, names::NAME_MAX));
        from(link, fleet, &path.key("from"), verdict);
        listen(link, &path, &mut shared, verdict);
        match &link.to {
            Target::Vm(target) => to_vm(target, fleet, &path.key("to"), &mut shared, verdict),
            Target::Host(target) => to_host(target, link, &path, verdict),
        }
    }
}

fn names_of(fleet: &Fleet) -> impl Iterator<Item = &str> {
    fleet.vms.keys().map(String::as_str)
}

fn from(link: &Link, fleet: &Fleet, path: &Path, verdict: &mut Verdict) {
    if !(1..=FROM_MAX).contains(&link.from.len()) {
        let message = format!("names {} VMs; 1 to {FROM_MAX} are allowed", link.from.len());
        verdict.error(
            Finding::at(path, message).hint(format!("allowed: VMs, and \"{HOST}\" for the host itself")),
        );
    }
    let mut seen = Unique::new();
    for (index, name) in link.from.iter().enumerate().take(FROM_MAX) {
        let path = path.index(index);
        if let Some(first) = seen.insert(name.as_str(), &path) {
            let message = format!("{} is named twice", quoted(name));
            verdict.error(Finding::at(&path, message).other(Spot::Value(first)));
        }
        if name != HOST && !fleet.vms.contains_key(name) {
            let names = names_of(fleet).chain([HOST]).collect();
            verdict.error(unknown(&path, "there is no VM", name, names));
        }
        if let Target::Vm(target) = &link.to
            && target.vm == *name
        {
            verdict.error(Finding::at(&path, format!("the link leads from {} to itself", quoted(name))));
        }
    }
}

fn listen<'a>(link: &'a Link, path: &Path, shared: &mut Shared<'a>, verdict: &mut Verdict) {
    let from_host = link.from.iter().any(|name| name == HOST);
    let path = path.key("listen");
    let Some(listen) = &link.listen else {
        if from_host {
            let message = "is missing: a link from the host needs a place where the host finds it";
            let hint =
                "allowed: a loopback address with a port, such as 127.0.0.1:3000, or a unix socket's path";
            verdict.error(Finding::at(&path, message).hint(hint));
        }
        return;
    };
    // As it is compared: one place has several spellings, such as `/run//a.sock` or `127.0.0.1:080`.
    let place = match (listen.starts_with('/'), link.from.iter().all(|name| name == HOST)) {
        (true, true) => names::socket_path(listen).map(|()| {
            std::path::Path::new(listen).components().collect::<std::path::PathBuf>().display().to_string()
        }),
        (true, false) => {
            Err("is a path, which only links from nothing but \"host\" may have; in a guest the link is \
                              at /run/lair/links/NAME anyway"
                .into())
        }
        (false, _) => names::loopback(listen).map(|address| address.to_string()),
    };
    let place = match place {
        Ok(place) => place,
        Err(message) => return verdict.error(Finding::at(&path, message)),
    };
    for side in link.from.iter().take(FROM_MAX) {
        if let Some(first) = shared.listeners.insert((side, place.clone()), &path) {
            if first == path {
                continue; // The same side twice is told elsewhere.
            }
            let side = if side == HOST { "the host".into() } else { format!("VM {}", quoted(side)) };
            let message = format!("another link of {side} listens on {}", quoted(listen));
            verdict.error(Finding::at(&path, message).other(Spot::Value(first)));
        }
    }
}

fn to_vm<'a>(
    target: &'a VmTarget,
    fleet: &Fleet,
    path: &Path,
    shared: &mut Shared<'a>,
    verdict: &mut Verdict,
) {
    if target.vm == HOST {
        let message = "the host is no VM; a link to it is { host = \"/path/of/a.sock\" }";
        verdict.error(Finding::at(&path.key("vm"), message));
    } else if !fleet.vms.contains_key(&target.vm) {
        verdict.error(unknown(&path.key("vm"), "there is no VM", &target.vm, names_of(fleet).collect()));
    }
    let port_path = path.key("port");
    if let Some(first) = shared.ports.insert((&target.vm, target.port), &port_path) {
        let message = format!("another link ends at port {} of VM {}", target.port, quoted(&target.vm));
        let hint = "one link may come from several VMs: name them all in its \"from\"";
        verdict.error(Finding::at(&port_path, message).hint(hint).other(Spot::Value(first)));
    }
    if let Some(connect) = &target.connect {
        verdict.value(&path.key("connect"), names::endpoint(connect));
    }
}

fn to_host(target: &HostTarget, link: &Link, path: &Path, verdict: &mut Verdict) {
    let to = path.key("to").key("host");
    verdict.value(&to, names::socket_path(&target.host.to_string_lossy()));
    if link.from.iter().any(|name| name == HOST) {
        verdict.error(Finding::at(&path.key("from"), "the host needs no link to a socket of its own"));
    }
}
