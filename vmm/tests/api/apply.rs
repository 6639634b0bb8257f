//! What an apply says, and what it leaves alone.

use crate::support::*;
use lair_vmm::{api::types::ApplyRequest, fleet::units::Size, host::tools};
use std::fs;
use tokio::io::AsyncWriteExt;

const AGAIN: ApplyRequest = ApplyRequest { file: None, dry_run: false };

#[tokio::test]
async fn cf5_warnings_come_with_the_answer_and_change_nothing_about_it() {
    let host = Host::new().with_source();
    let fleet = asked_for(&host.fleet(&[("a", 1024), ("b", 1024)])).replacen("vcpus = 1", "vcpus = 3", 1);
    let _laird = host.serve(&asked_for(&host.fleet(&[]))).await;
    fs::write(host.path("fleet.toml"), fleet).unwrap();
    let output = host.vmctl(&["apply"]).await;
    insta::assert_snapshot!(said(&output).replace(&host.path("").display().to_string(), "DIR/"));
    let output = host.vmctl(&["apply", "--json"]).await;
    insta::assert_snapshot!(said(&output).replace(&host.path("").display().to_string(), "DIR/"));
}

#[tokio::test]
async fn cf9_a_vm_keeps_what_it_was_started_with_and_status_says_so() {
    let mut host = Host::new().with_source();
    let before = host.fleet(&[("a", 1024)]);
    host.running("a", &before);
    let client = host.serve(&before).await;
    let status = client.vm("a").await.unwrap();
    assert_eq!((status.state.as_str(), status.pending_restart), ("ready", false));

    fs::write(host.path("fleet.toml"), host.fleet(&[("a", 512)])).unwrap();
    assert_eq!(client.apply(&AGAIN).await.unwrap().pending_restart, ["a"]);
    let now = client.vm("a").await.unwrap();
    assert!(now.pending_restart);
    assert_eq!((now.memory, &now.processes, &now.view), (Size(1 << 30), &status.processes, &status.view));
    let output = host.vmctl(&["status"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(" ready* ") && text.contains("\n* runs with an earlier fleet file"), "{text}");
    let output = host.vmctl(&["status", "a"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("the fleet file has changed"), "{text}");

    fs::write(host.path("fleet.toml"), before).unwrap();
    assert!(client.apply(&AGAIN).await.unwrap().pending_restart.is_empty());
    assert!(!client.vm("a").await.unwrap().pending_restart);
}

#[tokio::test]
async fn cf10_a_newer_schema_is_refused_and_the_fleet_stays() {
    let mut host = Host::new().with_source();
    let before = host.fleet(&[("a", 1024)]);
    host.running("a", &before);
    let client = host.serve(&before).await;
    let status = client.status().await.unwrap();
    let newer = before.replace("schema = 1", "schema = 2").replace("1024MiB", "512MiB") + "pools = {}\n";
    fs::write(host.path("fleet.toml"), &newer).unwrap();
    for arguments in [&["apply"][..], &["apply", host.path("fleet.toml").to_str().unwrap()]] {
        let output = host.vmctl(arguments).await;
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.ends_with("/fleet.toml:1:10: schema: is 2; this release of Lair reads schema 1 only\n"),
            "{text}"
        );
    }
    assert_eq!(client.status().await.unwrap(), status);
    assert_eq!(fs::read_to_string(host.path("fleet.toml")).unwrap(), newer);
}

#[tokio::test]
async fn cf1_a_refused_fleet_starts_and_stops_nothing() {
    let mut host = Host::new().with_source();
    let before = host.fleet(&[("a", 512)]);
    host.running("a", &before);
    let client = host.serve(&before).await;
    let status = client.status().await.unwrap();
    // Without `a`, with a new VM, and with one wrong key.
    fs::write(host.path("fleet.toml"), host.fleet(&[("b", 512)]) + "autostrat = true\n").unwrap();
    let output = host.vmctl(&["apply"]).await;
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains(":9:1: vms.b.autostrat: unknown key; did you mean \"autostart\"?\n  allowed here: "),
        "{text}"
    );
    assert_eq!(client.status().await.unwrap(), status);
    assert_eq!(host.traces("b"), Vec::<std::path::PathBuf>::new());
    assert_eq!(host.audit().last().unwrap()["verdict"], "refused");
}

#[tokio::test]
async fn cf6_a_fleet_of_which_something_is_missing_is_refused_as_a_whole() {
    let host = Host::new().with_source();
    let client = host.serve(&asked_for(&host.fleet(&[]))).await;
    let status = client.status().await.unwrap();
    let fleet = asked_for(&host.fleet(&[("a", 512), ("b", 512)]));
    let missing = fleet.replacen("/kernel\"", "/fifo\"", 1).replacen("-root\"", "-toor\"", 1);
    nix::unistd::mkfifo(&host.path("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::write(host.path("fleet.toml"), &missing).unwrap();
    let output = host.vmctl(&["apply"]).await;
    insta::assert_snapshot!(said(&output).replace(&host.path("").display().to_string(), "DIR/"));
    assert_eq!(client.status().await.unwrap(), status);
    fs::write(host.path("fleet.toml"), &fleet).unwrap();
    assert_eq!(host.vmctl(&["apply"]).await.status.code(), Some(0));
}

#[tokio::test]
async fn an_apply_says_that_the_accelerator_stays() {
    let host = Host::new().with_source();
    let fleet = host.fleet(&[]);
    let client = host.serve(&fleet).await;
    assert_eq!(client.apply(&AGAIN).await.unwrap().warnings, []);
    fs::write(host.path("fleet.toml"), fleet.clone() + "host.accel = \"tcg\"\n").unwrap();
    let output = host.vmctl(&["apply"]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text.ends_with("/fleet.toml: host: is read when laird starts; until then all is as before\n"));
}

#[tokio::test]
async fn cl8_of_applies_at_once_one_adds_a_vm() {
    // Its VMs cannot start, but they are asked to, in the midst of each apply.
    let host = Host::new().with_source().without(tools::QEMU);
    let client = host.serve(&host.fleet(&[])).await;
    let names: Vec<String> = (0..20).map(|number| format!("vm{number}")).collect();
    let vms: Vec<_> = names.iter().map(|name| (name.as_str(), 64)).collect();
    fs::write(host.path("fleet.toml"), host.fleet(&vms)).unwrap();
    let mut applies = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let client = client.clone();
        applies.spawn(async move { client.apply(&AGAIN).await.unwrap().added });
    }
    let mut added: Vec<String> = applies.join_all().await.concat();
    let mut expected = names.clone();
    added.sort();
    expected.sort();
    assert_eq!(added, expected);
}

#[tokio::test]
async fn cl7_an_apply_whose_client_is_gone_is_done_to_its_end() {
    let host = Host::new().with_source().without(tools::QEMU);
    let client = host.serve(&host.fleet(&[])).await;
    // So many that the client is gone long before the last.
    let names: Vec<String> = (0..2000).map(|number| format!("vm{number:04}")).collect();
    let vms: Vec<_> = names.iter().map(|name| (name.as_str(), 64)).collect();
    fs::write(host.path("fleet.toml"), host.fleet(&vms)).unwrap();
    let mut gone = tokio::net::UnixStream::connect(host.dirs().api_socket()).await.unwrap();
    let body = "{\"file\":null}";
    let head = "POST /v1/apply HTTP/1.1\r\nhost: laird\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    gone.write_all(request.as_bytes()).await.unwrap();
    until(&client, "vm0000", "failed").await;
    drop(gone);
    until(&client, "vm1999", "failed").await;
    let recorded = async {
        while host.audit().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, recorded).await.unwrap();
    assert_eq!(client.status().await.unwrap().vms.len(), 2000);
    assert_eq!(host.audit()[0]["verdict"], "allowed");
}
