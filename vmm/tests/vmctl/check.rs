//! `vmctl check`.

use crate::support::*;
use lair_vmm::fleet::{limits::HostFacts, units::Size};
use std::fs;

const ONE_VM: &str = "[vms.NAME]
vcpus = 1
memory = \"MEMORY\"
kernel = \"/k\"
modules = \"/m\"
roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root\"]
";

/// A fleet with VMs of these names and sizes.
fn fleet(vms: &[(&str, Size)]) -> String {
    let vm =
        |(name, memory): &(&str, Size)| ONE_VM.replace("NAME", name).replace("MEMORY", &memory.to_string());
    let vms: String = vms.iter().map(vm).collect();
    format!("schema = 1\nstore.sources = [{{ root = \"/none\" }}]\n{vms}")
}

const LITTLE: Size = Size(64 << 20);

#[test]
fn warnings_are_told_and_are_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    // Each may have all that the host has, so that both are too much on any host.
    let host = HostFacts::read().unwrap();
    let all = Size(host.memory.0 & !((2 << 20) - 1));
    fs::write(directory.path().join("fleet.toml"), fleet(&[("a", all), ("b", all)])).unwrap();
    let figures = [
        (Size(all.0 * 2).to_string(), "ALL"),
        (host.budget().to_string(), "BUDGET"),
        (host.memory.to_string(), "HOST"),
        (host.reserve().to_string(), "RESERVE"),
    ];
    for arguments in [&["check", "fleet.toml"][..], &["--json", "check", "fleet.toml"]] {
        let said = said(&vmctl(directory.path(), arguments));
        insta::assert_snapshot!(figures.iter().fold(said, |said, (figure, name)| said.replace(figure, name)));
    }
}

#[test]
fn a_fleet_without_problems() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("fleet.toml"), fleet(&[("a", LITTLE)])).unwrap();
    for arguments in [&["check", "fleet.toml"][..], &["--json", "check", "fleet.toml"]] {
        insta::assert_snapshot!(said(&vmctl(directory.path(), arguments)));
    }
}

#[test]
fn problems_are_status_2() {
    let directory = tempfile::tempdir().unwrap();
    let text = fleet(&[("a", LITTLE), ("b", Size(1 << 20))]).replacen("vcpus", "vpcus", 1);
    fs::write(directory.path().join("shape.toml"), &text).unwrap();
    fs::write(directory.path().join("sense.toml"), text.replace("vpcus", "vcpus")).unwrap();
    for arguments in
        [&["check", "shape.toml"][..], &["--json", "check", "shape.toml"], &["check", "absent.toml"]]
    {
        insta::assert_snapshot!(said(&vmctl(directory.path(), arguments)));
    }
    let output = vmctl(directory.path(), &["check", "sense.toml"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text.starts_with("sense.toml:11:10: vms.b.memory: 1MiB of memory; 64MiB to "), "{text}");
}
