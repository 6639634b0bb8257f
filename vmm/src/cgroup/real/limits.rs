//! Limits that the kernel holds. SKIPPED where it has no controllers; `tests/run` has them run in `tests/host-vm`, whose disks and KVM some
//! need.

use super::{LIMIT, Place, Running, place, processes, run, skipped, until};
use crate::{
    cgroup::{
        CgroupError, Event, Hierarchy, VmCgroup, Watcher, backing,
        hierarchy::Kernel,
        parse::MemoryEvents,
        values::{Device, Values, io_max},
    },
    fleet::{schema::IoLimits, units::Size},
    vm::machine::Part,
};
use nix::sys::{signal::Signal, stat};
use std::{
    fs,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// A hierarchy with controllers, and a process that stands for `laird` in it. `io` asks for that of disks as well.
fn controlled(io: bool) -> Result<(Place, Hierarchy, Running), String> {
    let place = place()?;
    let point = place.dir.parent().unwrap().to_owned();
    // One at a time: some may be missing.
    for controller in ["+cpu", "+memory", "+pids", "+io"] {
        let _ = fs::write(point.join("cgroup.subtree_control"), controller);
    }
    let laird = Running(Command::new("/bin/sleep").arg("600").spawn().unwrap());
    match Hierarchy::prepare(place.dir.clone(), laird.0.id(), io, Kernel::REAL) {
        Ok(hierarchy) => Ok((place, hierarchy, laird)),
        Err(error) => Err(crate::error::chain(&error)),
    }
}

/// Waits until a process ends.
async fn end(process: &mut Running) -> ExitStatus {
    let mut status = None;
    until("the end of a process", || {
        status = process.0.try_wait().unwrap();
        status.is_some()
    })
    .await;
    status.unwrap()
}

fn limits(memory: u64, pids: u32) -> Values {
    Values { memory_max: memory, cpu_quota: None, cpu_weight: 100, pids_max: pids, io: None }
}

#[tokio::test]
async fn cg9_the_kernel_keeps_what_is_computed() {
    let Some((_place, hierarchy, _laird)) =
        controlled(false).map_or_else(|reason| skipped("cg9", &reason), Some)
    else {
        return;
    };
    let vm = serde_json::json!({
        "vcpus": 3, "memory": "64MiB", "kernel": "/k", "modules": "/m", "roots": [],
        "limits": { "cpu": { "percent": 33, "weight": 77 }, "pids": 123 },
    });
    let values = Values::of(&serde_json::from_value(vm).unwrap(), false);
    let group = hierarchy.vm("a");
    group.create(&values, None).unwrap();
    let _sleep = run(&group, Part::Hypervisor, "sleep 600");
    until("a process", || group.populated().unwrap()).await;
    assert_eq!(group.check(&values, None), None);
    let usage = group.usage().unwrap();
    assert!(usage.pids >= 1 && usage.memory > 0, "{usage:?}");
    // Not whole pages: the kernel rounds, and that is seen.
    let odd = Values { memory_max: values.memory_max + 1, ..values };
    assert!(matches!(group.create(&odd, None), Err(CgroupError::Altered { .. })));
    group.remove().await.unwrap();
}

#[tokio::test]
async fn cg9_what_the_kernel_refuses_ends_the_start() {
    let Some((_place, hierarchy, _laird)) =
        controlled(true).map_or_else(|reason| skipped("cg9", &reason), Some)
    else {
        return;
    };
    let good = limits(64 << 20, 100);
    let write = Some(IoLimits { write: Some(Size(1 << 20)), ..IoLimits::default() });
    // Less than a millisecond of each period; more than the kernel has process ids for; no weight; a disk that is not there.
    let cases = [
        ("cpu.max", Values { cpu_quota: Some(1), ..good.clone() }),
        ("pids.max", Values { pids_max: u32::MAX, ..good.clone() }),
        ("cpu.weight", Values { cpu_weight: 0, ..good.clone() }),
        ("io.max", Values { io: write, ..good }),
    ];
    for (file, values) in cases {
        let group = hierarchy.vm("a");
        let error = group.create(&values, Some(Device { major: 511, minor: 77 })).unwrap_err();
        assert!(
            matches!(&error, CgroupError::Write { path, .. } if *path == group.dir().join(file)),
            "{file}: {error}"
        );
        // There is nothing yet that a process could enter.
        assert!(!group.dir().join("hypervisor").exists(), "{file}");
        group.remove().await.unwrap();
    }
}

/// A process that takes memory until somebody ends it.
const EATER: &str = "exec tail /dev/zero";

#[tokio::test]
async fn cg2_a_vm_beyond_its_memory_ends_as_a_whole_and_that_is_told() {
    let Some((_place, hierarchy, _laird)) =
        controlled(false).map_or_else(|reason| skipped("cg2", &reason), Some)
    else {
        return;
    };
    let (group, other) = (hierarchy.vm("a"), hierarchy.vm("b"));
    for group in [&group, &other] {
        group.create(&limits(32 << 20, 100), None).unwrap();
        let _ = fs::write(group.dir().join("memory.swap.max"), "0");
    }
    let mut watcher = Watcher::new(group.clone()).unwrap();
    let mut bystander = run(&group, Part::Shim, "sleep 600");
    let mut neighbour = run(&other, Part::Hypervisor, "sleep 600");
    until("processes", || {
        !processes(&group, "shim").is_empty() && !processes(&other, "hypervisor").is_empty()
    })
    .await;
    let mut other_watcher = Watcher::new(other.clone()).unwrap();
    let mut eater = run(&group, Part::Hypervisor, EATER);
    loop {
        match timeout(LIMIT, watcher.next()).await.unwrap() {
            Event::Oom { killed } => break assert!(killed >= 1),
            Event::Pressure(_) | Event::Empty => {}
            Event::Gone => panic!("gone"),
        }
    }
    assert_eq!(end(&mut eater).await.signal(), Some(Signal::SIGKILL as i32));
    assert_eq!(end(&mut bystander).await.signal(), Some(Signal::SIGKILL as i32));
    assert!(!group.populated().unwrap());
    assert!(group.usage().unwrap().memory_events.oom_kill >= 1);
    // The other VM has heard of nothing.
    assert_eq!(neighbour.0.try_wait().unwrap(), None);
    assert_eq!(other.usage().unwrap().memory_events, MemoryEvents::default());
    assert!(timeout(Duration::from_secs(1), other_watcher.next()).await.is_err(), "an event");
    group.remove().await.unwrap();
    other.remove().await.unwrap();
}

#[tokio::test]
async fn cg2_page_cache_of_what_is_read_gives_way_before_anything_is_killed() {
    let ready = controlled(false).and_then(|it| disk().map(|_| it));
    let Some((_place, hierarchy, _laird)) = ready.map_or_else(|reason| skipped("cg2", &reason), Some) else {
        return;
    };
    let group = hierarchy.vm("a");
    group.create(&limits(32 << 20, 100), None).unwrap();
    // What others have read is charged to them. All of the disk is twice what the VM may have.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let mut reader = run(&group, Part::StoreBackend, &format!("exec dd if={NVME} of=/dev/null bs=1M"));
    assert!(end(&mut reader).await.success());
    let usage = group.usage().unwrap();
    assert!(usage.memory_events.max > 0, "the limit was never reached: {usage:?}");
    assert_eq!((usage.memory_events.oom, usage.memory_events.oom_kill), (0, 0));
    assert!(usage.memory <= 32 << 20, "{usage:?}");
    group.remove().await.unwrap();
}

/// A disk of 64 MiB that `tests/host-vm` gives.
const NVME: &str = "/dev/nvme0n1";

/// The file system on a disk of its own that `tests/host-vm` gives.
fn disk() -> Result<PathBuf, String> {
    let disk = std::env::var_os("LAIR_HOST_VM_DISK").ok_or("it needs the disks of tests/host-vm")?;
    Ok(disk.into())
}

/// Writes 4 MiB to `file`, past the page cache.
fn write(group: &VmCgroup, file: &Path) -> Running {
    run(
        group,
        Part::Hypervisor,
        &format!("exec dd if=/dev/zero of={} bs=64k count=64 oflag=direct", file.display()),
    )
}

#[tokio::test]
async fn cg5_a_flood_of_writes_is_held_and_the_limits_follow_the_disk() {
    let ready = controlled(true).and_then(|it| Ok((it, disk()?)));
    let Some(((_place, hierarchy, _laird), disk)) = ready.map_or_else(|reason| skipped("cg5", &reason), Some)
    else {
        return;
    };
    let device = backing(&disk).unwrap().unwrap();
    let rate = Some(Size(1 << 20));
    let io = IoLimits { read: rate, write: rate, ..IoLimits::default() };
    let values = Values { io: Some(io.clone()), ..limits(64 << 20, 100) };
    let (group, other) = (hierarchy.vm("a"), hierarchy.vm("b"));
    group.create(&values, Some(device)).unwrap();
    other.create(&limits(64 << 20, 100), Some(device)).unwrap();
    let limited = || fs::read_to_string(group.dir().join("io.max")).unwrap();
    assert_eq!(limited(), format!("{}\n", io_max(device, &io)));
    let (mine, others) = (disk.join("mine"), disk.join("others"));

    // The same for both: the other one is done while this one is held back.
    let began = Instant::now();
    let mut flood = write(&group, &mine);
    assert!(end(&mut write(&other, &others)).await.success());
    assert_eq!(flood.0.try_wait().unwrap(), None, "it was not held back");
    assert!(end(&mut flood).await.success());
    // 4 MiB at 1 MiB/s; the kernel lets the first tenth of a second's worth through at once.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(3), "{took:?}");

    // The volumes are on another disk now: this one is free, that one is held.
    let (number, narrow) = (fs::metadata(NVME).unwrap().rdev(), |number| u32::try_from(number).unwrap());
    let new = Device { major: narrow(stat::major(number)), minor: narrow(stat::minor(number)) };
    group.follow_io(Some(&io), Some(new)).unwrap();
    assert_eq!(limited(), format!("{}\n", io_max(new, &io)));
    let read = format!("exec dd if={NVME} of=/dev/null bs=64k count=64 iflag=direct");
    let mut flood = run(&group, Part::StoreBackend, &read);
    assert!(end(&mut write(&group, &mine)).await.success());
    assert_eq!(flood.0.try_wait().unwrap(), None, "it was not held back");
    assert!(end(&mut flood).await.success());
    for file in [&mine, &others] {
        fs::remove_file(file).unwrap();
    }
    group.remove().await.unwrap();
    other.remove().await.unwrap();
}

#[tokio::test]
async fn cg3_a_fork_bomb_is_held_and_others_start_processes_as_before() {
    let Some((_place, hierarchy, _laird)) =
        controlled(false).map_or_else(|reason| skipped("cg3", &reason), Some)
    else {
        return;
    };
    let (group, other) = (hierarchy.vm("a"), hierarchy.vm("b"));
    group.create(&limits(256 << 20, 40), None).unwrap();
    other.create(&limits(256 << 20, 40), None).unwrap();
    let _bomb = run(&group, Part::Hypervisor, "f() { sleep 600 & f & f & wait; }; f");
    until("the limit to be hit", || {
        fs::read_to_string(group.dir().join("pids.events")).is_ok_and(|text| !text.contains("max 0\n"))
    })
    .await;
    assert!(group.usage().unwrap().pids <= 40);
    let _neighbour =
        run(&other, Part::Hypervisor, "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 600 & done; wait");
    until("ten more processes", || processes(&other, "hypervisor").len() == 11).await;
    assert_eq!(fs::read_to_string(other.dir().join("pids.events")).unwrap(), "max 0\n");
    group.remove().await.unwrap();
    other.remove().await.unwrap();
}

#[tokio::test]
async fn cg4_a_hog_gets_its_share_of_time_and_no_more() {
    let Some((_place, hierarchy, _laird)) =
        controlled(false).map_or_else(|reason| skipped("cg4", &reason), Some)
    else {
        return;
    };
    let group = hierarchy.vm("a");
    let values = Values { cpu_quota: Some(10_000), ..limits(256 << 20, 100) };
    group.create(&values, None).unwrap();
    let _hog = run(&group, Part::Hypervisor, "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait");
    until("time that was held back", || group.usage().unwrap().cpu.throttled_us > 0).await;
    let (before, began) = (group.usage().unwrap().cpu.usage_us, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = group.usage().unwrap().cpu.usage_us - before;
    // A tenth of one processor; twice that leaves room for whole periods at both ends.
    let share = u128::from(used) * 100 / began.elapsed().as_micros();
    assert!(share <= 20, "{share} percent");
    group.remove().await.unwrap();
}

/// Threads of the hog: a VM with as many virtual CPUs, none of them ever idle.
const THREADS: u32 = 64;

/// Requests whose times make a percentile.
const REQUESTS: usize = 200;

/// The variable by which [`neighbour`] is told where to write.
const REPORT: &str = "LAIR_TEST_NEIGHBOUR";

/// Not a test: a VM's neighbour. It answers requests that each take some processor time, and writes down how long each took, in µs.
#[test]
#[ignore = "it is executed by cg4 as a process of its own"]
fn neighbour() {
    let report = std::env::var_os(REPORT).unwrap();
    let request = |rounds: u64| {
        let began = Instant::now();
        std::hint::black_box((0..rounds).fold(0_u64, |sum, n| std::hint::black_box(sum ^ n)));
        began.elapsed()
    };
    // Some milliseconds on whatever machine this is; a short one may be disturbed, the least of some is not.
    let probe = (0..20).map(|_| request(10_000)).min().unwrap();
    let rounds = 10_000 * 5_000 / u64::try_from(probe.as_micros()).unwrap().max(1);
    let times: Vec<String> = (0..REQUESTS).map(|_| request(rounds).as_micros().to_string()).collect();
    fs::write(report, times.join("\n")).unwrap();
}

/// Runs [`neighbour`] in `group`; the median and the 99th percentile of its times, µs.
async fn measured(group: &VmCgroup, report: &Path) -> (u64, u64) {
    let test = std::env::current_exe().unwrap();
    let script = format!(
        "{REPORT}={} exec taskset -c 0 {} --exact cgroup::real::limits::neighbour --ignored --quiet",
        report.display(),
        test.display()
    );
    assert!(end(&mut run(group, Part::Hypervisor, &script)).await.success());
    let mut times: Vec<u64> =
        fs::read_to_string(report).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

#[tokio::test]
async fn cg4_a_vm_with_64_busy_threads_leaves_its_neighbour_its_share() {
    let Some((_place, hierarchy, _laird)) =
        controlled(false).map_or_else(|reason| skipped("cg4", &reason), Some)
    else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("times");
    let (group, other) = (hierarchy.vm("a"), hierarchy.vm("b"));
    for group in [&group, &other] {
        group.create(&limits(1 << 30, 200), None).unwrap();
    }
    let (alone, _) = measured(&other, &report).await;
    // All on one processor: there is nowhere to go. The weights are equal, so each VM has half of it.
    let script = format!("for i in $(seq {THREADS}); do while :; do :; done & done; wait");
    let hog = run(&group, Part::Hypervisor, &format!("taskset -p -c 0 $$ >&2; {script}"));
    until("the threads", || processes(&group, "hypervisor").len() > THREADS as usize).await;
    let (median, p99) = measured(&other, &report).await;
    println!(
        "a neighbour's request takes {alone} us alone; beside {THREADS} busy threads {median} us, 99th percentile {p99} us"
    );
    // As one process among 65 it would take 65 times as long as alone.
    assert!(median < alone * 10, "median {median} us, alone {alone} us");
    assert!(p99 < alone * 40, "99th percentile {p99} us, alone {alone} us");
    drop(hog);
    group.remove().await.unwrap();
    other.remove().await.unwrap();
}

/// The cgroup of a thread, from `/proc`.
fn cgroup_of(thread: &Path) -> String {
    let text = fs::read_to_string(thread.join("cgroup")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
}

/// The threads below `directory` with a name that begins so.
fn threads(directory: &str, name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let named =
        |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name));
    entries.map(|entry| entry.path()).filter(named).collect()
}

#[tokio::test]
async fn cg10_vhost_workers_are_in_the_vms_cgroup_and_kvm_pit_is_not() {
    let kvm = || match crate::host::facts::kvm() {
        Ok(()) if Path::new("/dev/vhost-vsock").exists() => Ok(()),
        Ok(()) => Err("there is no /dev/vhost-vsock".into()),
        Err(reason) => Err(reason.to_string()),
    };
    let ready = controlled(false).and_then(|it| kvm().map(|()| it));
    let Some((_place, hierarchy, _laird)) = ready.map_or_else(|reason| skipped("cg10", &reason), Some) else {
        return;
    };
    let group = hierarchy.vm("a");
    group.create(&limits(1 << 30, 200), None).unwrap();
    // Its processor is never started; both kernel threads are there all the same.
    let qemu = "exec qemu-system-x86_64 -machine q35,accel=kvm -m 64 -S -nodefaults -no-user-config -display none \
                -device vhost-vsock-pci,guest-cid=77";
    let mut qemu = run(&group, Part::Hypervisor, qemu);
    let pid = qemu.0.id();
    let (tasks, pit) = (format!("/proc/{pid}/task"), format!("kvm-pit/{pid}"));
    until("both kernel threads", || {
        assert_eq!(qemu.0.try_wait().unwrap(), None, "QEMU has ended");
        !threads(&tasks, "vhost-").is_empty() && !threads("/proc", &pit).is_empty()
    })
    .await;
    let vm = cgroup_of(Path::new(&format!("/proc/{pid}")));
    assert!(vm.ends_with("/lair/vms/a/hypervisor"), "{vm}");
    for worker in threads(&tasks, "vhost-") {
        assert_eq!(cgroup_of(&worker), vm);
    }
    for thread in threads("/proc", &pit) {
        assert_eq!(cgroup_of(&thread), "/");
    }
    group.kill().await.unwrap();
    group.remove().await.unwrap();
    assert_eq!(end(&mut qemu).await.signal(), Some(Signal::SIGKILL as i32));
    // Both end with the process.
    until("the end of the kernel threads", || threads("/proc", &pit).is_empty()).await;
}
