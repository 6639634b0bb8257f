//! `laird` as a process. None of its VMs is ever started.

// Clippy lets test functions panic; these are their helpers.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use lair_vmm::{fleet::limits::HostFacts, host::facts};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
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

/// User and system time of a process, in clock ticks: fields 14 and 15 of `/proc/PID/stat`.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[test]
fn sv8_without_descriptors_it_neither_spins_nor_ends_and_then_serves_again() {
    let directory = TempDir::new().unwrap();
    let text = "schema = 1\nhost = { accel = \"tcg\", limits = \"none\", users = \"shared\" }\nstore.sources = [{ root = \"/none\" }]\n";
    fs::write(directory.path().join("fleet.toml"), text).unwrap();
    let given = laird(directory.path());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -n 32; exec \"$0\" \"$@\""]).arg(given.get_program()).args(given.get_args());
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let log = BufReader::new(running.0.stderr.take().unwrap());
    let mut lines = log.lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with(" ready")), "it does not start");
    let socket = directory.path().join("run/laird.sock");
    // They ask for what goes on, so they stay.
    let ask = |text: &str| {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let request = format!("GET {text} HTTP/1.1\r\nhost: l\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        stream
    };
    let streams: Vec<_> = (0..60).map(|_| ask("/v1/events?follow=true")).collect();
    let mut served = streams.iter().filter(|stream| {
        let mut stream = *stream;
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        stream.read(&mut [0; 12]).is_ok_and(|length| length == 12)
    });
    assert!(served.next().is_some());
    // Descriptors are out now. A process that tries again and again uses all of a CPU.
    let before = cpu_ticks(running.0.id());
    std::thread::sleep(Duration::from_secs(2));
    let spent = cpu_ticks(running.0.id()) - before;
    assert!(spent < 100, "{spent} ticks of 10 ms in 2 s");
    drop(streams);
    let mut answer = String::new();
    ask("/v1/version").read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// How often the threads of a process went to sleep by themselves.
fn sleeps(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let sleeps = |status: String| {
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.unwrap().trim().parse::<u64>().unwrap()
    };
    tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok()).map(sleeps).sum()
}

#[test]
fn an_idle_laird_sleeps() {
    let directory = TempDir::new().unwrap();
    let text = "schema = 1\nhost = { accel = \"tcg\", limits = \"none\", users = \"shared\" }\nstore.sources = [{ root = \"/none\" }]\n";
    fs::write(directory.path().join("fleet.toml"), text).unwrap();
    let mut running = Running(laird(directory.path()).spawn().unwrap());
    let log = BufReader::new(running.0.stderr.take().unwrap());
    let mut lines = log.lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with(" ready")), "it does not start");
    // What it had to do has had its time: a refusal, and a record that counts others.
    for _ in 0..30 {
        let stream =
            std::os::unix::net::UnixStream::connect(directory.path().join("run/laird.sock")).unwrap();
        let request = "POST /v1/vms/none/start HTTP/1.1\r\nhost: l\r\ncontent-length: 0\r\n\r\n";
        (&stream).write_all(request.as_bytes()).unwrap();
        (&stream).read_to_string(&mut String::new()).unwrap();
    }
    std::thread::sleep(Duration::from_secs(3));
    let records = fs::read_to_string(directory.path().join("state/audit.jsonl")).unwrap();
    assert!(records.contains("\"suppressed\":"), "{records}");
    let before = sleeps(running.0.id());
    std::thread::sleep(Duration::from_secs(4));
    let woken = sleeps(running.0.id()) - before;
    assert!(woken <= 2, "it woke up {woken} times in 4 s");
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
