//! A host to look at: `tests/terminal` runs `vmctl` against it.

use crate::host::{Host, LIMIT};
use std::{
    fs::{self, OpenOptions},
    io::{Read, Write},
    time::Instant,
};

/// The variable that names the file into which the directory of the host is written once all is as it is to be.
const PLACE: &str = "LAIR_LOOK";

/// Not a test: a host with VMs in several states, until standard input ends.
#[test]
#[ignore = "tests/terminal runs it, to look at"]
fn a_host_to_look_at() {
    let place = std::env::var_os(PLACE).expect("it is for tests/terminal");
    let mut host = Host::new();
    let names = ["hydra", "cpu-builder", "cuda-ada-builder", "spare"];
    host.fleet(&[
        ("hydra", "role = \"hydra\""),
        ("cpu-builder", "role = \"builder\""),
        ("cuda-ada-builder", "role = \"builder\""),
        ("spare", "autostart = false"),
    ]);
    let mut fleet = OpenOptions::new().append(true).open(host.path("fleet.toml")).unwrap();
    // Its root is in no store, so its start fails.
    let path = host.path("").display().to_string();
    let path = path.trim_end_matches('/');
    let broken = format!(
        "[vms.broken]\nvcpus = 2\nmemory = \"1GiB\"\nkernel = \"{path}/kernel\"\nmodules = \"{path}/modules\"\n\
         roots = [\"/nix/store/00000000000000000000000000000000-no-such-root\"]\nrestart = \"never\"\n\
         [links.queue-runner]\nfrom = [\"cpu-builder\", \"cuda-ada-builder\"]\nto = {{ vm = \"hydra\", port = 50051 }}\n"
    );
    fleet.write_all(broken.as_bytes()).unwrap();
    drop(fleet);
    host.laird(None);
    let began = Instant::now();
    loop {
        let vms = host.status().unwrap();
        let ready = |name: &&str| vms.get(*name).is_some_and(|vm| vm.state == "ready" || vm.name == "spare");
        if names.iter().all(ready) && vms.get("broken").is_some_and(|vm| vm.state == "failed") {
            break;
        }
        assert!(began.elapsed() < LIMIT, "{vms:?}\n{}", host.log());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // In one go: who waits for the file reads all of it.
    let beside = host.path("place");
    fs::write(&beside, path).unwrap();
    fs::copy(&beside, &place).unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}
