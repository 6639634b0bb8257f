//! `vmctl check`.

use crate::{store, support::*};
use lair_vmm::{
    fleet::{
        self,
        limits::{HostFacts, Need},
        units::Size,
    },
    host::facts,
};
use std::{fs, os::unix::fs::symlink, path::PathBuf};
use tempfile::TempDir;

const ROOT: &str = "0123456789abcdfghijklmnpqrsvwxyz-root";
const OTHER: &str = "1123456789abcdfghijklmnpqrsvwxyz-other";
const LITTLE: Size = Size(64 << 20);

/// A host with a store, a kernel and files of all sorts.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(TempDir::new().unwrap());
        store::make(&bench.path("store"), &[ROOT, OTHER]);
        for name in ["kernel", "secret"] {
            fs::write(bench.path(name), "").unwrap();
        }
        fs::create_dir(bench.path("modules")).unwrap();
        nix::unistd::mkfifo(&bench.path("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        symlink("loop", bench.path("loop")).unwrap();
        symlink("nothing", bench.path("dangling")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A fleet with VMs of these names and sizes.
    fn fleet(&self, vms: &[(&str, Size)]) -> String {
        let directory = self.0.path().display();
        let vm = |(name, memory): &(&str, Size)| {
            format!(
                "[vms.{name}]\nvcpus = 1\nmemory = \"{memory}\"\nkernel = \"{directory}/kernel\"\n\
                 modules = \"{directory}/modules\"\nroots = [\"/nix/store/{ROOT}\"]\n"
            )
        };
        let vms: String = vms.iter().map(vm).collect();
        format!("schema = 1\nstore.sources = [{{ root = \"{directory}/store\" }}]\n{vms}")
    }

    /// What `vmctl` says of the text of a fleet file.
    fn said(&self, arguments: &[&str], text: &str) -> String {
        fs::write(self.path("fleet.toml"), text).unwrap();
        let said = said(&vmctl(self.0.path(), arguments));
        said.replace(&self.0.path().display().to_string(), "DIR")
    }

    /// What is said of a fleet of one VM after each change, one below the other. `DIR` is the directory of this bench.
    fn said_of_changes(&self, changes: &[(&str, &str)]) -> String {
        let directory = self.0.path().display().to_string();
        let fleet = self.fleet(&[("a", LITTLE)]).replace(&directory, "DIR");
        let said = |(old, new): &(&str, &str)| {
            assert!(fleet.contains(old), "the fleet has no {old}");
            let text = fleet.replacen(old, new, 1).replace("DIR", &directory);
            format!("+++ {new}\n{}", self.said(TEXT, &text))
        };
        changes.iter().map(said).collect::<Vec<_>>().join("\n")
    }
}

const TEXT: &[&str] = &["check", "fleet.toml"];
const JSON: &[&str] = &["--json", "check", "fleet.toml"];

#[test]
fn a_fleet_without_problems() {
    let bench = Bench::new();
    for arguments in [TEXT, JSON] {
        insta::assert_snapshot!(bench.said(arguments, &bench.fleet(&[("a", LITTLE)])));
    }
}

#[test]
fn cf5_warnings_are_told_and_are_no_failure() {
    let bench = Bench::new();
    // Each may have all that the host has, so that both are too much on any host.
    let host = HostFacts::read().unwrap();
    let all = Size(host.memory.0 & !((2 << 20) - 1));
    let loaded = fleet::load("fleet.toml", bench.fleet(&[("a", all)]).as_bytes(), &host).unwrap();
    let each = Need::of(&loaded.fleet.vms["a"]).sum();
    let figures = [
        (Size(each.0 * 2).to_string(), "ALL"),
        (host.budget().to_string(), "BUDGET"),
        (host.memory.to_string(), "HOST"),
        (host.reserve().to_string(), "RESERVE"),
    ];
    for arguments in [TEXT, JSON] {
        let said = bench.said(arguments, &bench.fleet(&[("a", all), ("b", all)]));
        insta::assert_snapshot!(figures.iter().fold(said, |said, (figure, name)| said.replace(figure, name)));
    }
}

#[test]
fn cf1_problems_are_status_2() {
    let bench = Bench::new();
    let text = bench.fleet(&[("a", LITTLE)]).replacen("vcpus", "vpcus", 1);
    for arguments in [TEXT, JSON, &["check", "absent.toml"]] {
        insta::assert_snapshot!(bench.said(arguments, &text));
    }
}

#[test]
fn cf4_the_limits_of_memory_are_those_of_this_host() {
    let bench = Bench::new();
    let said = bench.said(TEXT, &bench.fleet(&[("a", Size(1 << 20))]));
    let (least, most) = (LITTLE, HostFacts::read().unwrap().memory);
    let expected = format!(
        "status 2\n--- stdout\n--- stderr\nfleet.toml:5:10: vms.a.memory: 1MiB of memory; {least} to {most} are allowed, \
         all that the host has\n"
    );
    assert_eq!(said, expected);
}

#[test]
fn cf6_files_that_are_none() {
    let bench = Bench::new();
    let kernels = [
        "DIR/fifo",
        "DIR/loop",
        "DIR/dangling",
        "DIR/absent",
        "DIR/modules",
        "DIR/kernel/below",
        "/dev/null",
        "/nix/store/2123456789abcdfghijklmnpqrsvwxyz-linux/bzImage",
        "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root",
        "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root/file",
    ];
    let mut changes: Vec<_> = kernels.map(|path| ("DIR/kernel", path)).into();
    changes.push(("DIR/modules", "DIR/kernel"));
    insta::assert_snapshot!(bench.said_of_changes(&changes));
}

#[test]
fn cf6_what_is_not_in_the_view() {
    let bench = Bench::new();
    let root = "roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root\"]";
    let changes = [
        "roots = [\"/nix/store/2123456789abcdfghijklmnpqrsvwxyz-unknown\"]",
        "roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-.-x\"]",
        "ROOT\ninit = \"/nix/store/1123456789abcdfghijklmnpqrsvwxyz-other/init\"",
        "ROOT\nprofile = \"/nix/store/1123456789abcdfghijklmnpqrsvwxyz-other\"",
        "ROOT\nservices = [{ name = \"s\", command = [\"/nix/store/1123456789abcdfghijklmnpqrsvwxyz-other/x\"] }]",
        "ROOT\ninit = \"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root/init\"",
    ];
    let changes = changes.map(|change| change.replace("ROOT", root));
    let changes: Vec<_> = changes.iter().map(|change| (root, change.as_str())).collect();
    insta::assert_snapshot!(bench.said_of_changes(&changes));
}

#[test]
fn cf6_credentials_may_come_later_but_only_as_files() {
    let bench = Bench::new();
    let credentials =
        ["DIR/secret", "DIR/absent", "DIR/dangling", "DIR/fifo", "DIR/loop", "DIR/modules", "/dev/null"];
    let credentials = credentials.map(|path| format!("vcpus = 1\ncredentials = {{ key = \"{path}\" }}"));
    let changes: Vec<_> = credentials.iter().map(|change| ("vcpus = 1", change.as_str())).collect();
    insta::assert_snapshot!(bench.said_of_changes(&changes));
}

#[test]
fn cf6_sources_that_are_none() {
    let bench = Bench::new();
    for name in ["no-database", "fifo-database", "garbage", "no-nix-database"] {
        store::make(&bench.path(name), &[]);
        let database = bench.path(name).join("nix/var/nix/db/db.sqlite");
        fs::remove_file(&database).unwrap();
        match name {
            "fifo-database" => nix::unistd::mkfifo(&database, nix::sys::stat::Mode::S_IRUSR).unwrap(),
            "garbage" => fs::write(&database, "garbage").unwrap(),
            "no-nix-database" => fs::write(&database, "").unwrap(),
            _ => {}
        }
    }
    fs::create_dir_all(bench.path("no-store/nix")).unwrap();
    fs::write(bench.path("no-store/nix/store"), "").unwrap();
    let sources = ["absent", "no-store", "no-database", "fifo-database", "garbage", "no-nix-database"];
    let sources = sources.map(|name| format!("DIR/{name}\""));
    let mut changes: Vec<_> = sources.iter().map(|source| ("DIR/store\"", source.as_str())).collect();
    changes
        .push(("root = \"DIR/store\"", "database = \"DIR/store/nix/var\", store = \"DIR/store/nix/store\""));
    insta::assert_snapshot!(bench.said_of_changes(&changes));
}

#[test]
fn hv8_kvm_where_there_is_none() {
    let Err(reason) = facts::kvm() else {
        return eprintln!("SKIPPED: a host without KVM, because this one has it");
    };
    let bench = Bench::new();
    let text = bench.fleet(&[("a", LITTLE)]) + "[host]\naccel = \"kvm\"\n";
    let said = bench.said(TEXT, &text);
    let hint = "allowed without KVM: \"auto\" and \"tcg\", which run guests under emulation";
    assert!(said.contains(&format!("fleet.toml:10:9: host.accel: {reason}\n  {hint}\n")), "{said}");
}
