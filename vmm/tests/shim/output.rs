//! The logs that the shim keeps for the VM's other programs.

use crate::support::*;
use lair_vmm::{
    host::{
        confine::Confinement,
        process::{Launch, Process, Sink},
    },
    shim::client,
};
use nix::{fcntl::OFlag, sys::signal::Signal, unistd::pipe2};
use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

/// A shim that does not outlive its test: a process as `laird` starts it lives on by itself.
struct Kept(Process);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGKILL);
    }
}

/// Starts a shim that keeps a log at `path` and returns the pipe's other end.
async fn start(host: &Host, path: &Path) -> (Kept, File) {
    let config = host.config("builder");
    let (reader, writer): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let launch = Launch {
        program: env!("CARGO_BIN_EXE_lair-shim").into(),
        arguments: vec![
            "--config".into(),
            host.write(&config).display().to_string(),
            "--log".into(),
            format!("{}={}", reader.as_raw_fd(), path.display()),
        ],
        environment: vec![],
        output: Sink::File(host.path("shim.log")),
        confinement: Confinement { keep: vec![reader], ..Confinement::default() },
    };
    let shim = Kept(Process::spawn(&launch).unwrap());
    until(async || client::status(&config.sockets.control).await.ok()).await;
    (shim, File::from(writer))
}

#[tokio::test]
async fn hv6_a_program_that_floods_is_not_held_up_and_fills_no_disk() {
    let host = Host::new();
    let log = host.path("hypervisor.log");
    let (shim, mut program) = start(&host, &log).await;
    let written = tokio::task::spawn_blocking(move || {
        let lines = "qemu: something is wrong\n".repeat(4000);
        for _ in 0..1000 {
            program.write_all(lines.as_bytes()).unwrap();
        }
        program.write_all(b"the last words\n").unwrap();
    });
    within(written).await.unwrap();
    let text = || fs::read(&log).unwrap_or_default();
    until(async || text().ends_with(b"the last words\n").then_some(())).await;
    let sizes = [log.clone(), host.path("hypervisor.log.1")].map(|file| fs::metadata(file).unwrap().len());
    assert!(sizes.iter().all(|size| *size <= 1 << 20), "{sizes:?}");
    // The program is gone, and the shim is not.
    client::status(&host.config("builder").sockets.control).await.unwrap();
    shim.0.signal(Signal::SIGTERM);
    assert_eq!(within(shim.0.ended()).await, "exited with status 0");
}

#[tokio::test]
async fn hv6_a_program_is_not_held_up_by_a_log_that_cannot_be_written() {
    let host = Host::new();
    let (_shim, mut program) = start(&host, &host.path("missing/hypervisor.log")).await;
    let written = tokio::task::spawn_blocking(move || {
        for _ in 0..100 {
            program.write_all(&[b'x'; 1 << 16]).unwrap();
        }
    });
    within(written).await.unwrap();
    let said = fs::read_to_string(host.path("shim.log")).unwrap();
    assert!(said.lines().count() <= 10, "{said}");
    client::status(&host.config("builder").sockets.control).await.unwrap();
}

#[tokio::test]
async fn a_descriptor_that_is_no_pipe_is_refused() {
    let host = Host::new();
    for (log, said) in [
        ("0=/tmp/log", "Descriptor 0 is a standard stream"),
        ("999=/tmp/log", "Descriptor 999 is not the reading end of a pipe"),
        ("x=/tmp/log", "is not N=FILE"),
    ] {
        let config = host.write(&host.config("builder"));
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_lair-shim"))
            .arg("--config")
            .arg(config)
            .args(["--log", log])
            .output()
            .await
            .unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(said), "{text}");
    }
}
