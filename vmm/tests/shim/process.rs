//! The process: start, stop, wrong use.

use crate::support::*;
use lair_vmm::shim::client;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};
use tokio::net::UnixListener;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lair-shim")).args(arguments).env("COLUMNS", "100").output().unwrap()
}

fn run_config(path: &Path) -> (Option<i32>, String) {
    let output = run(&["--config", path.to_str().unwrap()]);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn help_says_what_it_does() {
    insta::assert_snapshot!(String::from_utf8(run(&["--help"]).stdout).unwrap());
}

#[test]
fn cl1_wrong_use_is_status_2() {
    for arguments in [&["--cofnig", "x"][..], &[], &["--config"], &["serve"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_configuration_that_cannot_be_used_is_status_2() {
    let host = Host::new();
    let (code, text) = run_config(&host.path("none"));
    assert_eq!(code, Some(2));
    assert!(text.contains("Cannot read") && text.contains("No such file"), "{text}");
    let path = host.write(&host.config("builder"));
    let good = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, good.replace("\"vsock\"", "\"vsokc\"")).unwrap();
    let (code, text) = run_config(&path);
    assert_eq!(code, Some(2));
    assert!(text.contains("missing field `vsock`") && text.contains("builder.json"), "{text}");
    std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    let (code, text) = run_config(&path);
    assert_eq!(code, Some(2));
    assert!(text.contains("more than 1048576 bytes"), "{text}");
    assert_eq!(std::fs::read_dir(host.path(".")).unwrap().count(), 1, "Nothing was made");
}

#[test]
fn a_socket_path_that_does_not_fit_is_told_before_anything_is_served() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.sockets.control = host.path(&"x".repeat(120));
    let (code, text) = run_config(&host.write(&config));
    assert_eq!(code, Some(1));
    assert!(text.contains("the limit is 107"), "{text}");
    assert!(!config.sockets.session.exists(), "Sockets of a shim that did not start are removed");
}

#[tokio::test]
async fn sockets_have_their_rights() {
    let host = Host::new();
    let shim = host.start(host.config("builder")).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let sockets = &shim.config.sockets;
    assert_eq!((mode(&sockets.control), mode(&sockets.dial)), (0o600, 0o600));
    assert_eq!((mode(&sockets.session), mode(&shim.config.link_socket())), (0o660, 0o660));
    shim.until_agent(|_| true).await;
}

#[tokio::test]
async fn a_dead_shim_is_replaced_and_a_live_one_is_not() {
    let host = Host::new();
    let mut first = host.start(host.config("builder")).await;
    let (code, text) = run_config(&host.path("builder.json"));
    assert_eq!(code, Some(1));
    assert!(text.contains("A running process listens on"), "{text}");
    first.status().await;
    first.child.kill().await.unwrap();
    assert!(first.config.sockets.control.exists());
    let second = host.start(host.config("builder")).await;
    assert_eq!(second.status().await.vm, "builder");
}

#[tokio::test]
async fn a_stop_ends_connections_and_records_them() {
    for by_signal in [true, false] {
        let host = Host::new();
        let store = UnixListener::bind(host.path("store")).unwrap();
        let mut config = host.config("builder");
        config.outgoing = vec![to_host("store", host.path("store"))];
        let (mut shim, guest) = host.start_ready(config).await;
        let mut near = guest.open_link("store").await;
        let (mut far, _) = within(store.accept()).await.unwrap();
        let mut watch = within(client::watch(shim.control())).await.unwrap();
        within(watch.next()).await.unwrap().unwrap();
        if by_signal {
            let pid = i32::try_from(shim.child.id().unwrap()).unwrap();
            kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        } else {
            within(client::stop(shim.control())).await.unwrap();
        }
        assert!(within(shim.child.wait()).await.unwrap().success());
        assert_closed(&mut near).await;
        assert_closed(&mut far).await;
        assert!(within(watch.next()).await.unwrap().is_none());
        let records = shim.audit_now();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0]["reason"], "The shim was stopped");
        let sockets = &shim.config.sockets;
        for path in [&sockets.control, &sockets.session, &sockets.dial, &shim.config.link_socket()] {
            assert!(!path.exists(), "{}", path.display());
        }
        assert_eq!(shim.stderr(), "");
    }
}

#[tokio::test]
async fn sv14_a_closed_standard_error_stops_nothing() {
    let host = Host::new();
    let config = host.config("builder");
    let path = host.write(&config);
    let mut child = Command::new(env!("CARGO_BIN_EXE_lair-shim"))
        .arg("--config")
        .arg(path)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let mut guest = Guest::new(&config);
    guest.boot("boot-1").await;
    for _ in 0..3 {
        let event = lair_guest::wire::message::Event::ServiceEnded { service: "s".into(), how: "h".into() };
        guest.say(&event).await;
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    }
    within(client::status(&config.sockets.control)).await.unwrap();
    within(client::stop(&config.sockets.control)).await.unwrap();
    assert!(child.wait().unwrap().success());
}
