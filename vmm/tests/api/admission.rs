//! Whether a VM may have its memory, and has its programs, is decided before anything of it is made.

use crate::support::*;
use lair_vmm::{api::types::ErrorKind, host::tools};
use std::path::PathBuf;

/// The fleet of [`HOST`], where 1678 MiB are for VMs.
const VMS: [(&str, u64); 3] = [("a", 1024), ("b", 514), ("c", 512)];

#[tokio::test]
async fn cf5_a_start_over_the_budget_is_refused_and_starts_nothing() {
    let mut host = Host::new();
    let fleet = asked_for(&host.fleet(&VMS));
    host.running("a", &fleet);
    let client = host.serve(&fleet).await;
    assert_eq!(client.vm("a").await.unwrap().state, "ready");

    let error = refused(client.start("b").await);
    assert_eq!(error.kind, ErrorKind::Failed);
    insta::assert_snapshot!(error.message, @"VM b: Its 514MiB of memory, 70MiB for its processes and the 1097MiB of VMs that run make 1681MiB, more than the budget of 1678MiB: the host has 2190MiB and keeps 512MiB for itself");
    let output = host.vmctl(&["start", "b"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("vmctl: {}\n", error.message));

    let b = client.vm("b").await.unwrap();
    assert_eq!((b.state.as_str(), b.detail, b.processes.len()), ("stopped", None, 0));
    assert_eq!(host.traces("b"), Vec::<PathBuf>::new());
    let attempt = &host.audit()[0];
    assert_eq!(
        (&attempt["verb"], &attempt["vm"], &attempt["verdict"]),
        (&"start".into(), &"b".into(), &"refused".into())
    );
    assert_eq!(attempt["reason"], error.message);

    // What is left is enough for this one, which is refused nothing here and fails later, for want of a store.
    client.start("c").await.unwrap();
    let c = until(&client, "c", "failed").await;
    assert!(c.detail.unwrap().contains("Cannot use a source"));
}

#[tokio::test]
async fn cf5_what_cannot_start_by_itself_is_failed_and_the_others_start() {
    let mut host = Host::new();
    // It is adopted last by its name, and counts from the beginning nevertheless.
    let fleet = host.fleet(&[("b", 514), ("c", 512), ("z", 1024)]);
    host.running("z", &fleet);
    let client = host.serve(&fleet).await;
    let b = until(&client, "b", "failed").await;
    insta::assert_snapshot!(b.detail.unwrap(), @"Its 514MiB of memory, 70MiB for its processes and the 1097MiB of VMs that run make 1681MiB, more than the budget of 1678MiB: the host has 2190MiB and keeps 512MiB for itself");
    let c = until(&client, "c", "failed").await;
    assert!(c.detail.unwrap().contains("Cannot use a source"), "it was started, and there is no store");
    assert_eq!(client.vm("z").await.unwrap().state, "ready");
    assert_eq!(host.traces("b"), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn cf5_a_vm_that_an_apply_adds_is_failed_where_there_is_no_memory() {
    let mut host = Host::new().with_source();
    let fleet = host.fleet(&VMS[..1]);
    host.running("a", &fleet);
    let client = host.serve(&fleet).await;
    std::fs::write(host.path("fleet.toml"), host.fleet(&VMS[..2])).unwrap();
    let reply = client.apply(&lair_vmm::api::types::ApplyRequest::default()).await.unwrap();
    assert_eq!(reply.added, ["b"]);
    let b = until(&client, "b", "failed").await;
    assert!(b.detail.unwrap().contains("more than the budget of 1678MiB"));
    assert_eq!(host.traces("b"), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn cf5_a_vm_that_has_ended_makes_room() {
    let host = Host::new();
    let fleet = asked_for(&host.fleet(&[("a", 1536), ("b", 1536)]));
    let client = host.serve(&fleet).await;
    for vm in ["a", "b", "a"] {
        client.start(vm).await.unwrap();
        let failed = until(&client, vm, "failed").await;
        assert!(failed.detail.unwrap().contains("Cannot use a source"));
        // What is failed stays so until it is started again.
        client.stop(vm).await.unwrap();
    }
}

#[tokio::test]
async fn hv1_a_missing_program_is_told_before_anything_is_made() {
    let host = Host::new().without(tools::QEMU).without(tools::VHOST_DEVICE_VSOCK).without(tools::MKFS);
    let volume = "volumes = [{ name = \"v\", size = \"1GiB\", mount = \"/v\" }]\n";
    let fleet = asked_for(&host.fleet(&[("a", 512), ("b", 512)]))
        .replace("[vms.b]\n", &format!("[vms.b]\n{volume}"))
        + &host.fleet(&[("c", 512)]).split_once("[vms").map(|(_, vm)| format!("[vms{vm}")).unwrap();
    let client = host.serve(&fleet).await;
    let output = host.vmctl(&["start", "b"]).await;
    insta::assert_snapshot!(said(&output));
    let error = refused(client.start("a").await);
    assert!(error.message.contains("qemu-system-x86_64 is missing") && !error.message.contains("mkfs"));
    for vm in ["a", "b"] {
        assert_eq!(client.vm(vm).await.unwrap().state, "stopped");
        assert_eq!(host.traces(vm), Vec::<PathBuf>::new());
    }
    // The one that is started by itself says so too, and the refused ones hold no memory.
    let c = until(&client, "c", "failed").await;
    assert!(
        c.detail.unwrap().starts_with("qemu-system-x86_64 is missing: install QEMU (Debian: qemu-system-x86")
    );
}
