//! Lives of VMs whose processes are real: what `laird`'s own end, the host's and an operator's haste do to them.

use crate::host::{Host, until};
use lair_vmm::{
    api::{client::ClientError, types::VmStatus},
    host::tools,
    vm::{
        adopt::Verdict,
        machine::{Ender, Part, State, Wanted},
        orphan,
        record::Record,
        trace::{Source, worked_us},
    },
};
use nix::sys::signal::{Signal, kill};
use std::{fs, io::Write, os::unix::net::UnixStream};

const ASKED_FOR: &str = "autostart = false";
const WITH_VOLUME: &str = "autostart = false\nvolumes = [{ name = \"v\", size = \"16MiB\", mount = \"/v\" }]";

fn refusal(outcome: Result<(), ClientError>) -> String {
    match outcome {
        Err(ClientError::Api(error)) => error.message,
        other => panic!("{other:?}"),
    }
}

fn same(before: &VmStatus, after: &VmStatus) {
    assert_eq!((&before.processes, before.since), (&after.processes, after.since));
}

#[test]
fn sv10_sv12_sigterm_leaves_vms_running_and_the_next_laird_has_them_again() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", ASKED_FOR)]);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    assert_eq!(before["a"].adoption, None);
    // What is told is on disk already.
    let record = Record::read(&host.dirs().vm("a").unwrap().record(), "a").unwrap().unwrap();
    assert_eq!((record.life.state, record.since), (State::Ready, before["a"].since));
    // What laird did for a start, in order, each step with its work.
    let of_laird = |vm: &VmStatus| -> Vec<_> {
        vm.trace.iter().filter(|point| point.source == Source::Laird).cloned().collect()
    };
    let own = of_laird(&before["a"]);
    let steps: Vec<_> = own.iter().filter(|point| point.span.is_some()).map(|point| &*point.name).collect();
    let expected = "view directories index volumes initramfs devices store_backend vsock_device hypervisor shim resume ready";
    assert_eq!(steps.join(" "), expected);
    let others: Vec<_> = own.iter().filter(|point| point.span.is_none()).map(|point| &*point.name).collect();
    assert_eq!(others, ["start", "started-store", "started-vsock", "started-hypervisor", "started-shim"]);
    assert!(worked_us(&own) > 0 && own.iter().any(|point| point.span.is_some_and(|span| span.waited_us > 0)));
    host.terminate();
    assert_eq!(host.traces().processes.len(), 4);
    host.laird(None);
    let after = host.settled(&[("a", "ready"), ("b", "stopped")]).unwrap();
    same(&before["a"], &after["a"]);
    assert_eq!(of_laird(&after["a"]), own);
    assert_eq!(after["a"].adoption, Some(Verdict::Adopt));
    // A restart of the service in the midst of a start.
    host.start("b").unwrap();
    until(|| (host.status().unwrap()["b"].state == "starting").then_some(()));
    host.terminate();
    host.laird(None);
    let later = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    same(&before["a"], &later["a"]);
    assert_eq!(host.traces().processes.len(), 8);
}

#[test]
fn sv11_a_new_laird_in_the_place_of_the_old_one_has_its_vms() {
    let mut host = Host::new();
    host.fleet(&[("a", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready")]).unwrap();
    // As an upgrade does it: another file of the same name, while the old one runs.
    let (old, new) = (host.path("bin/laird"), host.path("bin/laird.new"));
    fs::copy(&old, &new).unwrap();
    fs::rename(&new, &old).unwrap();
    same(&before["a"], &host.status().unwrap()["a"]);
    host.terminate();
    host.laird(None);
    let after = host.settled(&[("a", "ready")]).unwrap();
    same(&before["a"], &after["a"]);
    assert_eq!(after["a"].adoption, Some(Verdict::Adopt));
    let version = host.ask(async |client| client.status().await).unwrap().version;
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
}

#[test]
fn sv12_a_shutdown_of_the_host_ends_vms_and_they_start_with_the_next_laird() {
    let mut host = Host::new();
    host.fleet(&[
        ("hydra", ""),
        ("worker", "[links.l]\nfrom = [\"worker\"]\nto = { vm = \"hydra\", port = 5 }"),
    ]);
    host.laird(None);
    host.settled(&[("hydra", "ready"), ("worker", "ready")]).unwrap();
    host.script("systemctl", "[ \"$1\" = is-system-running ] && echo stopping; exit 1");
    host.terminate();
    let traces = host.traces();
    assert_eq!((traces.processes, host.dirs().vm("hydra").unwrap().run.exists()), (vec![], false));
    // The one that is reached ends last.
    let log = fs::read_to_string(host.path("laird.log")).unwrap();
    let stopped = |vm: &str| log.find(&format!("vm=\"{vm}\" state=\"stopped\"")).expect(vm);
    assert!(stopped("worker") < stopped("hydra"), "{log}");
    host.laird(None);
    let vms = host.settled(&[("hydra", "ready"), ("worker", "ready")]).unwrap();
    assert_eq!(vms["hydra"].last_stop.unwrap().by, Ender::Agent);
}

#[test]
fn sv13_a_vm_that_an_operator_stopped_stays_stopped() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", "")]);
    host.laird(None);
    host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    host.stop("a").unwrap();
    let vms = host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert_eq!((vms["a"].wanted, vms["a"].last_stop.unwrap().by), (Wanted::Stopped, Ender::Agent));
    host.kill();
    host.laird(None);
    let vms = host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert_eq!((vms["a"].wanted, vms["b"].wanted), (Wanted::Stopped, Wanted::Running));
    // The power fails: the run directory is gone with all that ran, and this is another boot.
    host.kill();
    let run = host.dirs().run;
    for tagged in orphan::tagged(&run) {
        let pid = nix::unistd::Pid::from_raw(tagged.id.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    until(|| orphan::tagged(&run).is_empty().then_some(()));
    fs::remove_dir_all(&run).unwrap();
    for vm in ["a", "b"] {
        let file = host.dirs().vm(vm).unwrap().lasting();
        let mut kept: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        kept["boot_id"] = "an earlier boot".into();
        fs::write(&file, kept.to_string()).unwrap();
    }
    host.laird(None);
    let vms = host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert_eq!(vms["b"].adoption, None);
}

#[test]
fn cl8_a_stop_during_a_long_step_takes_effect_at_once() {
    let mut host = Host::new();
    host.fleet(&[("a", WITH_VOLUME)]);
    host.script(tools::MKFS.name, "sleep 600; :");
    host.laird(None);
    host.start("a").unwrap();
    until(|| (host.status().unwrap()["a"].detail.as_deref() == Some("volumes")).then_some(()));
    until(|| (host.traces().processes == ["a mkfs", "a mkfs"]).then_some(()));
    assert_eq!(refusal(host.start("a")), "VM a: It is already starting");
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped")]).unwrap();
    let traces = host.traces();
    assert_eq!(traces.processes, Vec::<String>::new());
    assert!(!traces.files.iter().any(|file| file.ends_with("v.img")), "{traces:?}");
    // The half of a volume is no volume, and is in nobody's way.
    host.script(tools::MKFS.name, "exit 0");
    host.start("a").unwrap();
    host.settled(&[("a", "ready")]).unwrap();
}

#[test]
fn cl7_a_start_whose_client_is_gone_is_done_to_its_end() {
    let mut host = Host::new();
    host.fleet(&[("a", ASKED_FOR)]);
    host.laird(None);
    host.settled(&[("a", "stopped")]).unwrap();
    let mut gone = UnixStream::connect(host.dirs().api_socket()).unwrap();
    gone.write_all(b"POST /v1/vms/a/start HTTP/1.1\r\nhost: laird\r\ncontent-length: 0\r\n\r\n").unwrap();
    until(|| (host.status().unwrap()["a"].state != "stopped").then_some(()));
    drop(gone);
    host.settled(&[("a", "ready")]).unwrap();
}

#[test]
fn cl9_a_vm_that_is_removed_while_it_runs_is_stopped_and_comes_back_when_it_is_added_again() {
    let mut host = Host::new();
    host.fleet(&[("a", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready")]).unwrap();
    host.fleet(&[]);
    host.apply().unwrap();
    // Again in the fleet while it stops, with another definition.
    host.fleet(&[("a", "cmdline = \"loglevel=7\"")]);
    host.apply().unwrap();
    let after = until(|| {
        let vms = host.status().unwrap();
        let new = vms.get("a").is_some_and(|vm| vm.state == "ready" && vm.processes != before["a"].processes);
        new.then_some(vms)
    });
    assert!(!after["a"].pending_restart);
    assert_eq!(host.traces().processes.len(), 4);
    host.fleet(&[]);
    host.apply().unwrap();
    host.settled(&[]).unwrap();
    let traces = host.traces();
    assert_eq!(traces.processes, Vec::<String>::new());
    assert!(!traces.files.iter().any(|file| file.contains("run/vms/a") || file.ends_with("life.json")));
}

#[test]
fn cl9_a_withdrawal_that_was_cut_short_is_a_restart_if_the_vm_is_back() {
    let mut host = Host::new();
    host.fleet(&[("a", ""), ("b", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    let hypervisor = nix::unistd::Pid::from_raw(before["a"].processes[&Part::Hypervisor]);
    // It takes its time.
    kill(hypervisor, Signal::SIGSTOP).unwrap();
    host.fleet(&[("b", "")]);
    host.apply().unwrap();
    host.settled(&[("a", "stopping"), ("b", "ready")]).unwrap();
    assert!(host.is_quiet());
    host.kill();
    host.fleet(&[("a", ""), ("b", "")]);
    host.laird(None);
    host.settled(&[("a", "stopping"), ("b", "ready")]).unwrap();
    kill(hypervisor, Signal::SIGCONT).unwrap();
    let after = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_ne!(before["a"].processes, after["a"].processes);
    assert_eq!((after["a"].wanted, after["a"].restarts), (Wanted::Running, 0));
    same(&before["b"], &after["b"]);
}

#[test]
fn sv15_starts_and_stops_leak_nothing() {
    let mut host = Host::new();
    host.fleet(&[("a", ASKED_FOR)]);
    host.laird(None);
    let mut seen = Vec::new();
    for _ in 0..6 {
        host.start("a").unwrap();
        host.settled(&[("a", "ready")]).unwrap();
        host.stop("a").unwrap();
        host.settled(&[("a", "stopped")]).unwrap();
        assert!(host.is_quiet());
        let proc = std::path::PathBuf::from(format!("/proc/{}", host.laird_pid()));
        let descriptors = fs::read_dir(proc.join("fd")).unwrap().count();
        let children = fs::read_to_string(proc.join(format!("task/{}/children", host.laird_pid()))).unwrap();
        seen.push((descriptors, children, host.traces()));
    }
    assert!(seen[1..].iter().all(|one| *one == seen[1]), "{seen:#?}");
    assert_eq!((seen[1].1.as_str(), seen[1].2.processes.len()), ("", 0));
}
