//! A host on which nothing more can be started.

use crate::host::Host;
use lair_vmm::api::client::ClientError;
use std::{fs, os::unix::process::CommandExt, process::Command};

/// Nobody's: the limit counts all that one user runs, and does not hold for root.
const USER: u32 = 64_999;

/// How many processes and threads there may be of `laird`'s user, as far as `laird` starts them.
fn limit(host: &Host, processes: &str) {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &host.laird_pid().to_string(), &format!("--nproc={processes}:")]);
    // Only the same user may.
    if let Some(user) = host.user {
        command.uid(user).gid(user);
    }
    let status = command.status().unwrap();
    assert!(status.success(), "{status}");
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> String {
    match outcome {
        Err(ClientError::Api(error)) => error.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn sv9_without_threads_and_processes_requests_are_refused_and_what_runs_runs_on() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", "autostart = false")]);
    host.give_to(USER);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    let laird = host.laird_pid();
    let limits = fs::read_to_string(format!("/proc/{laird}/limits")).unwrap();
    let most = limits.lines().find_map(|line| line.strip_prefix("Max processes")).unwrap();
    let most = most.split_whitespace().next().unwrap();
    limit(&host, "1");
    for _ in 0..3 {
        let reason = refused(host.start("b"));
        assert!(reason.contains("No thread can be started"), "{reason}");
        let reason = refused(host.apply());
        assert!(reason.contains("No thread can be started"), "{reason}");
        let vms = host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
        assert_eq!(before["a"].processes, vms["a"].processes);
    }
    // What it cannot write down of a stop does not keep it from stopping.
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    assert!(!host.traces().processes.iter().any(|process| process.starts_with("a ")));
    limit(&host, most);
    for vm in ["a", "b"] {
        host.start(vm).unwrap();
    }
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!(host.laird_pid(), laird);
    assert!(!host.is_dead());
    assert!(!host.log().contains("panicked"), "{}", host.log());
}
