//! A host that limits its VMs. SKIPPED without KVM and controllers; `tests/run` has it run in `tests/host-vm`.

use crate::host::{Host, LIMIT, until};
use lair_vmm::{
    api::types::{EventKind, EventsQuery},
    cgroup,
    fleet::schema::Limits,
    vm::{adopt::Verdict, failure::Failure, machine::Part},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{fs, time::Instant};

const ONCE: &str = "restart = \"never\"\nlimits = { store_cache = \"2MiB\" }";
const MORE: &str =
    "limits = { cpu = { percent = 150, weight = 300 }, pids = 200, io = { write = \"8MiB\" } }";

/// A host with limits; `None`, with the reason, if there can be none.
fn limited() -> Option<Host> {
    Host::limited().inspect_err(|reason| println!("SKIPPED: laird with limits: {reason}")).ok()
}

/// Events until now.
fn events(host: &mut Host) -> Vec<EventKind> {
    host.ask(async |client| {
        let mut lines = client.events(&EventsQuery { follow: false, after: None }).await?;
        let mut events = Vec::new();
        while let Some(event) = lines.next().await? {
            events.push(event.kind);
        }
        Ok(events)
    })
    .unwrap()
}

/// Waits until an event is there that is as wanted.
fn event(host: &mut Host, wanted: impl Fn(&EventKind) -> bool) {
    let began = Instant::now();
    loop {
        let all = events(host);
        if all.iter().any(&wanted) {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{all:#?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// A file of a VM's cgroup.
fn value(host: &Host, vm: &str, file: &str) -> String {
    fs::read_to_string(host.cgroup(vm).join(file)).unwrap().trim_end().to_owned()
}

#[test]
fn cg1_with_controllers_laird_limits_each_vm_as_the_fleet_file_says_and_leaves_nothing() {
    let Some(mut host) = limited() else { return };
    host.fleet(&[("a", ONCE), ("b", MORE)]);
    host.laird(None);
    let vms = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!(host.ask(async |client| client.status().await).unwrap().limits, Limits::Cgroup);
    // 64 MiB, 64 for its processes, one for its processor and one for page tables; a page cache of 2 and of 512 MiB.
    for (vm, memory) in [("a", 132_u64), ("b", 642)] {
        assert_eq!(value(&host, vm, "memory.max"), (memory << 20).to_string());
        assert_eq!(value(&host, vm, "memory.oom.group"), "1");
    }
    let more = ["cpu.max", "cpu.weight", "pids.max"].map(|file| value(&host, "b", file));
    assert_eq!(more, ["150000 100000", "300", "200"]);
    assert_eq!(
        (value(&host, "a", "cpu.max"), value(&host, "a", "io.max")),
        ("max 100000".into(), String::new())
    );
    let disk = cgroup::backing(&host.dirs().state).unwrap();
    let io = disk.map(|disk| format!("{disk} rbps=max wbps=8388608 riops=max wiops=max")).unwrap_or_default();
    assert_eq!(value(&host, "b", "io.max"), io);
    for (vm, status) in &vms {
        for (part, leaf) in [
            (Part::Hypervisor, "hypervisor"),
            (Part::StoreBackend, "store"),
            (Part::VsockDevice, "vsock"),
            (Part::Shim, "shim"),
        ] {
            let processes = value(&host, vm, &format!("{leaf}/cgroup.procs"));
            assert_eq!(processes, status.processes[&part].to_string(), "{vm} {leaf}");
        }
    }
    // The next laird finds them where they are.
    host.kill();
    host.laird(None);
    let later = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    for vm in ["a", "b"] {
        assert_eq!(later[vm].adoption, Some(Verdict::Adopt));
        assert_eq!(later[vm].processes, vms[vm].processes);
        host.stop(vm).unwrap();
    }
    host.settled(&[("a", "stopped"), ("b", "stopped")]).unwrap();
    assert!(!host.cgroup("a").exists() && !host.cgroup("b").exists());
}

#[test]
fn cg5_limits_go_and_come_with_the_disk_that_is_mounted_under_a_vm() {
    let Some(mut host) = limited() else { return };
    host.fleet(&[("b", MORE)]);
    host.laird(None);
    host.settled(&[("b", "ready")]).unwrap();
    let before = value(&host, "b", "io.max");
    assert!(before.contains("wbps=8388608"), "{before:?}");
    assert_eq!(host.status().unwrap()["b"].degraded, Vec::<String>::new());
    // One without a disk of its own, as ZFS and btrfs have none.
    let place = host.dirs().vm("b").unwrap().state;
    mount(Some("none"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    until(|| value(&host, "b", "io.max").is_empty().then_some(()));
    let degraded = host.status().unwrap()["b"].degraded.clone();
    assert!(degraded.iter().any(|fault| fault.contains("has no disk of its own")), "{degraded:?}");
    umount2(&place, MntFlags::MNT_DETACH).unwrap();
    until(|| (value(&host, "b", "io.max") == before).then_some(()));
    assert_eq!(host.status().unwrap()["b"].degraded, Vec::<String>::new());
}

#[test]
fn cg2_of_two_vms_the_one_beyond_its_memory_ends_with_the_reason_and_the_other_goes_on() {
    let Some(mut host) = limited() else { return };
    host.fleet(&[("a", ONCE), ("b", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    kill(Pid::from_raw(before["a"].processes[&Part::Hypervisor]), Signal::SIGUSR2).unwrap();
    let after = host.settled(&[("a", "failed"), ("b", "ready")]).unwrap();
    // Whichever of its processes was missed first.
    let Some(Failure::ProcessEnded { how, .. }) = &after["a"].failure else { panic!("{:?}", after["a"]) };
    assert_eq!(how, "killed by SIGKILL, as the VM ran out of memory");
    event(&mut host, |event| matches!(event, EventKind::Oom { vm, killed } if vm == "a" && *killed >= 1));
    assert!(host.traces().processes.iter().all(|process| process.starts_with("b ")));
    assert_eq!(before["b"].processes, after["b"].processes);
    assert!(value(&host, "b", "memory.events").contains("\noom_kill 0"));
    // What was is forgotten with the next start: what ends then has reasons of its own.
    host.start("a").unwrap();
    let vms = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert!(value(&host, "a", "memory.events").contains("\noom_kill 0"));
    kill(Pid::from_raw(vms["a"].processes[&Part::Hypervisor]), Signal::SIGKILL).unwrap();
    let last = host.settled(&[("a", "failed"), ("b", "ready")]).unwrap();
    let ended = Failure::ProcessEnded { part: Part::Hypervisor, how: "killed by SIGKILL".into() };
    assert_eq!(last["a"].failure, Some(ended));
    assert_eq!(before["b"].processes, last["b"].processes);
}

#[test]
fn cg7_a_vm_whose_processes_were_moved_out_of_its_cgroup_is_told_as_unlimited() {
    let Some(mut host) = limited() else { return };
    host.fleet(&[("a", ONCE), ("b", "")]);
    host.laird(None);
    let before = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    for pid in before["a"].processes.values() {
        fs::write("/sys/fs/cgroup/cgroup.procs", pid.to_string()).unwrap();
    }
    event(&mut host, |event| matches!(event, EventKind::Unlimited { vm, .. } if vm == "a"));
    // It runs on, and so does the other one, of which nothing is told.
    let after = host.settled(&[("a", "ready"), ("b", "ready")]).unwrap();
    assert_eq!(
        (&before["a"].processes, &before["b"].processes),
        (&after["a"].processes, &after["b"].processes)
    );
    assert!(
        !events(&mut host).iter().any(|event| matches!(event, EventKind::Unlimited { vm, .. } if vm == "b"))
    );
    // It can be stopped all the same.
    host.stop("a").unwrap();
    host.settled(&[("a", "stopped"), ("b", "ready")]).unwrap();
    assert!(host.traces().processes.iter().all(|process| process.starts_with("b ")));
}
