use super::*;
use crate::{
    fleet::{limits::HostFacts, units::Size},
    host::process::{ProcessId, start_time},
    vm::{plan, trace::Start},
};
use std::collections::BTreeMap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

/// A VM that an earlier `laird` has started, whose hypervisor is the process `pid`.
fn adopted(directory: &Path, pid: i32) -> Job {
    let dirs = Dirs { state: directory.join("state"), run: directory.join("run") };
    dirs.create().unwrap();
    let facts = HostFacts { cpus: 2, memory: Size(64 << 30) };
    let context = Context {
        name: "a".into(),
        host: Arc::new(crate::host::example(facts, &dirs)),
        budget: Arc::new(Budget::new(facts)),
        dirs,
    };
    let mut plan = plan::example("a");
    plan.machine.control_socket = directory.join("qmp");
    let process = Process::adopt(ProcessId { pid, start_time: start_time(pid).unwrap() }).unwrap();
    let processes = BTreeMap::from([(Part::Hypervisor, Arc::new(process))]);
    let fleet = serde_json::json!({ "schema": 1, "store": { "sources": [] } });
    Job {
        context,
        fleet: Arc::new(serde_json::from_value(fleet).unwrap()),
        running: Running::adopted(plan, processes, Start::default()),
        started: Arc::default(),
        cancel: watch::channel(false).1,
    }
}

/// An earlier `laird` may have begun to plug something in. Once it answers that is over, and once it was waited for it is no excuse any more.
#[tokio::test]
async fn hv4_a_hypervisor_may_pin_until_it_was_connected_once() {
    // The one that listens, and another.
    for (pid, answers) in [(std::process::id().cast_signed(), true), (1, false)] {
        let directory = tempfile::tempdir().unwrap();
        let job = adopted(directory.path(), pid);
        let listener = UnixListener::bind(directory.path().join("qmp")).unwrap();
        let hypervisor = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(b"{\"QMP\": {}}\n").await;
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"{\"return\": {}, \"id\": 0}\n").await;
            std::future::pending::<()>().await;
        });
        assert!(job.running.may_pin());
        assert_eq!(job.connect_qmp().await.is_ok(), answers);
        assert!(!job.running.may_pin());
        hypervisor.abort();
    }
}
