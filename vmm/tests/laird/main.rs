//! `laird` as a process. None of its VMs is ever started.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use lair_vmm::{fleet::limits::HostFacts, host::facts};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

fn laird(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_laird"));
    for (option, name) in [("--fleet", "fleet.toml"), ("--state-dir", "state"), ("--run-dir", "run")] {
        command.arg(option).arg(directory.join(name));
    }
    command.env_remove("LAIR_LOG").env("NO_COLOR", "1").stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Ends `laird` when the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn warnings_are_logged() {
    let directory = TempDir::new().unwrap();
    let all = HostFacts::read().unwrap().memory.0 >> 21 << 1;
    let vm = |name| {
        format!(
            "[vms.{name}]\nautostart = false\nvcpus = 1\nmemory = \"{all}MiB\"\nkernel = \"/k\"\nmodules = \"/m\"\n\
             roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root\"]\n"
        )
    };
    let text = format!(
        "schema = 1\nhost = {{ accel = \"tcg\", limits = \"none\" }}\nstore.sources = [{{ root = \"/none\" }}]\n{}{}",
        vm("a"),
        vm("b")
    );
    fs::write(directory.path().join("fleet.toml"), text).unwrap();
    let mut running = Running(laird(directory.path()).spawn().unwrap());
    let log = BufReader::new(running.0.stderr.take().unwrap());
    // The end of a `laird` that does not become ready is the end of this as well.
    let lines: Vec<String> =
        log.lines().map(Result::unwrap).take_while(|line| !line.ends_with(" ready")).collect();
    let warned =
        lines.iter().filter(|line| line.contains("WARN") && line.contains("fleet.toml:4:2: vms: all VMs"));
    assert_eq!(warned.count(), 1, "{lines:#?}");
}

#[test]
fn hv8_without_the_kvm_that_it_is_told_to_use_it_does_not_start() {
    let Err(reason) = facts::kvm() else {
        return eprintln!("SKIPPED: laird without KVM, because this host has it");
    };
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("fleet.toml");
    fs::write(&file, "schema = 1\nhost.accel = \"kvm\"\nstore.sources = [{ root = \"/none\" }]\n").unwrap();
    let output = laird(directory.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = format!("laird: {} has host.accel = \"kvm\": {reason}\n", file.display());
    assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn cf1_a_fleet_file_that_is_refused_is_status_2_and_nothing_is_made() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("fleet.toml");
    fs::write(&file, "schema = 1\nstore.source = [{ root = \"/none\" }]\n").unwrap();
    let output = laird(directory.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    let expected = format!("{}:2:7: store.source: unknown key; did you mean \"sources\"?", file.display());
    assert!(text.contains(&expected), "{text}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn help() {
    let directory = TempDir::new().unwrap();
    let output = laird(directory.path()).arg("--help").env("COLUMNS", "100").output().unwrap();
    insta::assert_snapshot!(String::from_utf8(output.stdout).unwrap());
}

/// On a host with usable cgroups this would run.
#[test]
fn cg1_laird_does_not_start_without_limits_unless_it_is_told_to() {
    if lair_vmm::cgroup::available().is_ok() {
        return println!("SKIPPED: cg1: this host has all controllers");
    }
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("fleet.toml");
    fs::write(&file, "schema = 1\nhost.accel = \"tcg\"\nstore.sources = [{ root = \"/none\" }]\n").unwrap();
    let output = laird(directory.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(last.starts_with("laird: VMs cannot be limited: "), "{said}");
    assert!(last.contains("host.limits = \"none\""), "{said}");
    assert!(!directory.path().join("run/laird.sock").exists());
}
