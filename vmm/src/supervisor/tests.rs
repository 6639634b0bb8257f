use super::*;
use crate::fleet::{self, limits::HostFacts, units::Size};
use std::path::Path;

const HOST: HostFacts = HostFacts { cpus: 2, memory: Size(64 << 30) };

/// A supervisor of VMs that nothing starts.
async fn supervisor(directory: &Path, vms: usize) -> Arc<Supervisor> {
    let dirs = Dirs { state: directory.join("state"), run: directory.join("run") };
    dirs.create().unwrap();
    let host = crate::host::example(HOST, &dirs);
    Supervisor::start(dirs, host, "fleet.toml".into(), fleet_of(vms)).await
}

fn fleet_of(vms: usize) -> Loaded {
    let vm = |number| {
        format!(
            "[vms.vm{number:04}]\nautostart = false\nvcpus = 1\nmemory = \"64MiB\"\nkernel = \"/k\"\nmodules = \"/m\"\n\
             roots = [\"/nix/store/0123456789abcdfghijklmnpqrsvwxyz-root\"]\n"
        )
    };
    let vms: String = (0..vms).map(vm).collect();
    let text = format!("schema = 1\nstore.sources = [{{ root = \"/none\" }}]\n{vms}");
    fleet::load("fleet.toml", text.as_bytes(), &HOST).unwrap()
}

#[tokio::test]
async fn sv2_a_vm_whose_task_panicked_is_there_again_and_the_others_did_not_notice() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = supervisor(directory.path(), 2).await;
    let (lost, other) = (supervisor.vm("vm0000").unwrap(), supervisor.vm("vm0001").unwrap());
    lost.panic().await;
    assert_eq!(lost.exit().await, None);
    assert_eq!(lost.request(Request::Stop).await, Err(Refusal::Lost));
    while supervisor.vm("vm0000").unwrap().request(Request::Stop).await == Err(Refusal::Lost) {
        sleep(Duration::from_millis(20)).await;
    }
    for name in ["vm0000", "vm0001"] {
        let refused = supervisor.request(name, Request::Stop).await.unwrap_err();
        assert_eq!(refused.to_string(), format!("VM {name}: It is already stopped"));
    }
    // Its task is the same as before.
    assert_eq!(other.request(Request::Stop).await, Err(Refusal::Already("stopped")));
}

#[tokio::test]
async fn sv15_a_thousand_vms_are_listed_and_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = supervisor(directory.path(), 1000).await;
    let status = supervisor.status().await;
    assert_eq!(status.vms.len(), 1000);
    assert!(status.vms.iter().map(|vm| &vm.name).is_sorted());
    let reply = supervisor.apply(fleet_of(1), None).await;
    assert_eq!(reply.removed.len(), 999);
    while supervisor.vms().len() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(supervisor.status().await.vms.len(), 1);
    assert_eq!(Arc::strong_count(&supervisor), 2, "of their tasks only one is left");
}

#[tokio::test]
async fn cl9_a_vm_that_is_unknown_is_told_with_the_one_that_was_meant() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = supervisor(directory.path(), 1).await;
    let error = supervisor.request("vm000", Request::Stop).await.unwrap_err();
    assert_eq!(error.to_string(), "There is no VM vm000; did you mean vm0000?");
}
