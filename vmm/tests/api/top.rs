//! `vmctl top` on a terminal and without one.

use crate::{
    operator::{Operator, without_terminal},
    support::*,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A host with a VM that runs and one whose start fails.
async fn host() -> Host {
    let mut host = Host::new();
    let fleet = host.fleet(&[("hydra", 512), ("spare", 256)]);
    host.running("hydra", &fleet);
    let client = host.serve(&fleet).await;
    until(&client, "hydra", "ready").await;
    host
}

const LEFT: &str = "\x1b[?1049l";
const CURSOR: &str = "\x1b[?25h";

#[tokio::test]
async fn top_shows_the_vms_until_a_key_and_leaves_the_terminal_as_it_was() {
    let host = host().await;
    let mut operator = Operator::run(&host.dirs().api_socket(), &["top"]);
    for text in ["Lair ", "STORE/S", "hydra", "ready", "512M", "spare", "failed", "q quit"] {
        operator.sees(text).await;
    }
    operator.becomes_raw().await;
    // All is drawn anew at another size.
    let drawn = operator.seen().matches("STORE/S").count();
    operator.resize(10, 100);
    operator.sees_more("STORE/S", drawn).await;
    operator.types("q");
    assert_eq!(operator.status().await, Some(0));
    operator.sees(LEFT).await;
    operator.sees(CURSOR).await;
}

#[tokio::test]
async fn a_signal_or_control_c_ends_top_and_leaves_the_terminal_as_it_was() {
    let host = host().await;
    for (signal, expected) in [(Some(Signal::SIGTERM), 143), (Some(Signal::SIGHUP), 129), (None, 0)] {
        let mut operator = Operator::run(&host.dirs().api_socket(), &["top"]);
        operator.sees("hydra").await;
        match signal {
            Some(signal) => {
                kill(Pid::from_raw(operator.child.id().unwrap().cast_signed()), signal).unwrap();
            }
            None => operator.types("\x03"),
        }
        assert_eq!(operator.status().await, Some(expected));
        operator.sees(LEFT).await;
        operator.sees(CURSOR).await;
    }
}

#[tokio::test]
async fn without_a_terminal_top_says_what_works_instead() {
    let host = host().await;
    let socket = host.dirs().api_socket();
    let (status, out, err) = without_terminal(&socket, &["top"]).await;
    assert_eq!((status, out.as_str()), (Some(1), ""));
    insta::assert_snapshot!(err, @"vmctl: top needs a terminal; `vmctl --json top` prints a line each second, `vmctl top --once` a table");
    let (status, out, err) = without_terminal(&socket, &["--json", "top", "--once"]).await;
    assert_eq!(status, Some(0), "{err}");
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [reading] = lines.as_slice() else { panic!("{out}") };
    let vms = reading["vms"].as_array().unwrap();
    let names: Vec<_> = vms.iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["hydra", "spare"]);
    // It has processes, which sleep.
    assert_eq!(vms[0]["cpu_percent"].as_f64(), Some(0.0));
    assert!(vms[0]["memory_used_bytes"].as_f64().unwrap() > 0.0, "{reading}");
    assert_eq!(vms[0]["memory_bytes"].as_u64(), Some(512 << 20));
    assert!(vms[1]["cpu_percent"].is_null());
    let keys: Vec<_> = vms[0].as_object().unwrap().keys().map(String::as_str).collect();
    insta::assert_debug_snapshot!(keys);
    let (status, out, err) = without_terminal(&socket, &["top", "--once"]).await;
    assert_eq!(status, Some(0), "{err}");
    assert!(out.contains("STORE/S") && out.lines().count() == 3, "{out}");
}

#[tokio::test]
async fn cl2_top_without_a_laird_is_an_error_on_the_operators_own_screen() {
    let host = Host::new();
    let mut operator = Operator::run(&host.dirs().api_socket(), &["top"]);
    assert_eq!(operator.status().await, Some(1));
    operator.sees("laird is not running").await;
    let seen = operator.seen();
    assert!(!seen.contains("\x1b[?1049h"), "{seen:?}");
}
