//! `laird` as a process. None of its VMs is ever started.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use lair_vmm::fleet::limits::HostFacts;
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
        "schema = 1\nhost.accel = \"tcg\"\nstore.sources = [{{ root = \"/none\" }}]\n{}{}",
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
