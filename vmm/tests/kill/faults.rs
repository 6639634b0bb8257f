//! Hypervisors that break, records that are damaged, disks that are full.

use crate::host::{Host, until};
use lair_vmm::{
    api::{client::ClientError, types::VmStatus},
    host::tools,
    vm::{
        adopt::Verdict,
        failure::Failure,
        machine::{Part, Step},
        orphan,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::fs;

const ONCE: &str = "autostart = false\nrestart = \"never\"";

pub(crate) fn signal(vm: &VmStatus, part: Part, signal: Signal) {
    kill(Pid::from_raw(vm.processes[&part]), signal).unwrap();
}

#[test]
fn hv2_a_hypervisor_that_ends_at_once_is_told_with_its_words_and_all_is_undone() {
    let mut host = Host::new();
    host.fleet(&[("a", ONCE), ("b", "")]);
    host.laird(None);
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    host.script(tools::QEMU.name, "echo no such machine >&2; exit 3");
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "failed"), ("b", "ready")]).unwrap();
    let Some(Failure::StepFailed { step: Step::Hypervisor, message }) = &vms["a"].failure else {
        panic!("{:?}", vms["a"])
    };
    assert_eq!(message, "the hypervisor did not start: it exited with status 3\n  no such machine");
    assert!(host.traces().processes.iter().all(|process| process.starts_with("b ")));
    assert!(!host.dirs().vm("a").unwrap().run.exists());
}

#[test]
fn hv3_a_hypervisor_that_is_killed_is_started_again_and_the_others_go_on() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", ""), ("c", ONCE)]);
    host.laird(None);
    host.start("c").unwrap();
    let all_ready = [("a", "ready"), ("b", "ready"), ("c", "ready")];
    let before = host.settled(&all_ready).unwrap();
    for vm in ["a", "c"] {
        signal(&before[vm], Part::Hypervisor, Signal::SIGABRT);
    }
    host.settled(&[("a", "waiting"), ("b", "ready"), ("c", "failed")]).unwrap();
    let after = host.settled(&[("a", "ready"), ("b", "ready"), ("c", "failed")]).unwrap();
    assert_eq!((after["a"].restarts, after["b"].restarts), (1, 0));
    assert_eq!(before["b"].processes, after["b"].processes);
    let ended = Failure::ProcessEnded { part: Part::Hypervisor, how: "killed by SIGABRT".into() };
    assert_eq!(after["c"].failure, Some(ended));
    // What is failed for good is so after a restart of laird.
    host.kill();
    host.laird(None);
    let later = host.settled(&[("a", "ready"), ("b", "ready"), ("c", "failed")]).unwrap();
    assert_eq!(later["c"].failure, after["c"].failure);
}

#[test]
fn hv4_a_hypervisor_that_hangs_is_unresponsive_and_killed() {
    let mut host = Host::new();
    host.fleet(&[("a", ONCE), ("b", "")]);
    host.laird(None);
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    signal(&vms["a"], Part::Hypervisor, Signal::SIGSTOP);
    // The shim notices that the agent is silent.
    signal(&vms["a"], Part::Shim, Signal::SIGUSR1);
    let after = host.settled(&[("a", "failed"), ("b", "ready")]).unwrap();
    assert_eq!(after["a"].failure, Some(Failure::Unresponsive));
    assert_eq!(vms["b"].processes, after["b"].processes);
    assert!(host.traces().processes.iter().all(|process| process.starts_with("b ")));
}

#[test]
fn hv4_a_hypervisor_that_closes_its_control_socket_is_connected_again() {
    let mut host = Host::new();
    host.fleet(&[("a", ONCE)]);
    host.laird(None);
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "ready")]).unwrap();
    assert_eq!(vms["a"].degraded, Vec::<String>::new());
    signal(&vms["a"], Part::Hypervisor, Signal::SIGUSR1);
    let degraded = until(|| host.status().unwrap()["a"].degraded.first().cloned());
    assert!(degraded.starts_with("its hypervisor's control socket is not connected"), "{degraded}");
    until(|| host.status().unwrap()["a"].degraded.is_empty().then_some(()));
    let after = host.settled(&[("a", "ready")]).unwrap();
    assert_eq!(vms["a"].processes, after["a"].processes);
    assert_eq!(host.log().matches("is connected again").count(), 1);
}

#[test]
fn sv3_a_damaged_record_quarantines_its_vm_and_an_operator_leads_it_out() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    host.kill();
    let record = host.dirs().vm("a").unwrap().record();
    fs::write(&record, "{\"schema\": 2").unwrap();
    host.laird(None);
    let vms = host.settled(&[("a", "quarantined"), ("b", "ready")]).unwrap();
    assert_eq!((vms["a"].adoption, vms["b"].adoption), (Some(Verdict::Unparseable), Some(Verdict::Adopt)));
    assert_eq!(before["b"].processes, vms["b"].processes);
    // Nothing of it was touched, and it is not stopped while it runs.
    assert_eq!(host.traces().processes.len(), 8);
    let Err(ClientError::Api(refused)) = host.stop("a") else { panic!() };
    assert!(refused.message.starts_with("VM a: It is quarantined and processes of it run ("), "{refused}");
    let Err(ClientError::Api(refused)) = host.start("a") else { panic!() };
    assert!(refused.message.contains("its recorded state is damaged"), "{refused}");
    for tagged in orphan::tagged(&host.dirs().vm("a").unwrap().run) {
        kill(Pid::from_raw(tagged.id.pid), Signal::SIGKILL).unwrap();
    }
    fs::remove_dir_all(host.dirs().vm("a").unwrap().run).unwrap();
    while !orphan::tagged(&host.dirs().vm("a").unwrap().run).is_empty() {
        std::thread::yield_now();
    }
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    host.start("a").unwrap();
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    // The shorter way out: what carries its tag is ended.
    host.kill();
    fs::write(&record, "").unwrap();
    host.laird(None);
    host.settled(&[("a", "quarantined"), ("b", "ready")]).unwrap();
    host.kill_vm("a").unwrap();
    let vms = host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert_eq!(before["b"].processes, vms["b"].processes);
    assert_eq!(host.traces().processes.len(), 4);
}

#[test]
fn sv5_what_cannot_be_written_down_is_not_done_and_what_runs_runs_on() {
    let mut host = Host::new();
    host.fleet(&[("a", ONCE), ("b", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    // A directory in a file's place fails its rename, as a full disk would its write.
    let in_the_way = |file: &std::path::Path| {
        let _ = fs::remove_file(file);
        fs::create_dir_all(file.join("in the way")).unwrap();
    };
    let dirs = host.dirs();
    let a = dirs.vm("a").unwrap();
    in_the_way(&a.lasting());
    let Err(ClientError::Api(refused)) = host.start("a") else { panic!() };
    assert!(refused.message.contains("renaming failed"), "{refused}");
    assert!(!a.run.exists());
    fs::remove_dir_all(a.lasting()).unwrap();
    in_the_way(&a.record());
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "failed"), ("b", "ready")]).unwrap();
    assert!(matches!(vms["a"].failure, Some(Failure::StepFailed { step: Step::Index, .. })), "{vms:?}");
    assert!(host.traces().processes.iter().all(|process| process.starts_with("b ")));
    // One that runs loses nothing but its record.
    in_the_way(&dirs.vm("b").unwrap().record());
    signal(&vms["b"], Part::Shim, Signal::SIGUSR1);
    let vms = host.settled(&[("a", "failed"), ("b", "booting")]).unwrap();
    assert_eq!(before["b"].processes, vms["b"].processes);
    host.stop("b").unwrap();
    host.settled(&[("a", "failed"), ("b", "stopped")]).unwrap();
    assert_eq!(host.traces().processes, Vec::<String>::new());
}
