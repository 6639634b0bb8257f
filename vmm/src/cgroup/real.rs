//! The same on a real kernel. Killing, freezing and events need only a mounted hierarchy of version 2 and root.

mod limits;

use super::{Event, VmCgroup, Watcher, hierarchy, hierarchy::Kernel};
use crate::vm::machine::Part;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

/// A cgroup for one test, which is gone after it.
struct Place {
    dir: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("cgroup.freeze"), "0");
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        let end = Instant::now() + Duration::from_secs(10);
        while self.dir.exists() && Instant::now() < end {
            remove(&self.dir);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

/// A place in the hierarchy, or why there is none.
fn place() -> Result<Place, String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if !geteuid().is_root() {
        return Err("only root makes cgroups".into());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = hierarchy::mount(&mounts).ok_or("no cgroup v2 is mounted")?.0;
    let dir = point.join(format!("lair-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)));
    fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(Place { dir })
}

/// A VM's cgroup without limits.
fn bare() -> Result<(Place, VmCgroup), String> {
    let place = place()?;
    let dir = place.dir.join("vm");
    for leaf in ["hypervisor", "store", "vsock", "shim"] {
        fs::create_dir_all(dir.join(leaf)).unwrap();
    }
    Ok((place, VmCgroup::new(dir, "vm".into(), Kernel::REAL)))
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A shell in the leaf of `part`.
fn run(group: &VmCgroup, part: Part, script: &str) -> Running {
    let entrance = group.entrance(part).unwrap();
    let entrance = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&entrance));
    let entrance = fs::read_link(entrance).unwrap();
    let script = format!("echo 0 > {}; {script}", entrance.display());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Running(command.spawn().unwrap())
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn processes(group: &VmCgroup, leaf: &str) -> Vec<i32> {
    let text = fs::read_to_string(group.dir().join(leaf).join("cgroup.procs")).unwrap();
    super::parse::processes(&text).unwrap()
}

fn skipped<T>(what: &str, reason: &str) -> Option<T> {
    println!("SKIPPED: {what}: {reason}");
    None
}

/// A process, its child, and a grandchild that has left for a session of its own.
const FAMILY: &str = "(setsid sleep 600 &); sleep 600 & sleep 600";

#[tokio::test]
async fn hv10_a_grandchild_that_went_its_own_way_ends_with_the_rest() {
    let Some((_place, group)) = bare().map_or_else(|reason| skipped("hv10", &reason), Some) else { return };
    let mut parent = run(&group, Part::Hypervisor, FAMILY);
    until("three processes", || processes(&group, "hypervisor").len() == 4).await;
    let all = processes(&group, "hypervisor");
    assert!(group.has(Part::Hypervisor, parent.0.id().cast_signed()).unwrap());
    group.kill().await.unwrap();
    assert!(!group.populated().unwrap());
    // Nobody has waited for the parent yet: it is a zombie, which counts for nothing.
    group.remove().await.unwrap();
    assert!(!group.exists());
    assert_eq!(parent.0.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    for pid in all {
        assert!(kill(Pid::from_raw(pid), None).is_err() || zombie(pid), "{pid} lives");
    }
}

fn zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

#[tokio::test]
async fn cg8_a_frozen_family_is_killed_one_by_one() {
    let Some((_place, group)) = bare().map_or_else(|reason| skipped("cg8", &reason), Some) else { return };
    // It starts new processes as fast as it can: without the freezer some would always be missed.
    let _parent = run(&group, Part::StoreBackend, "while :; do (sleep 600 &); sleep 0.01; done");
    until("some processes", || processes(&group, "store").len() > 5).await;
    group.kill_by_hand(LIMIT).await.unwrap();
    assert!(!group.populated().unwrap());
    assert_eq!(fs::read_to_string(group.dir().join("cgroup.freeze")).unwrap(), "0\n");
    group.remove().await.unwrap();
}

#[tokio::test]
async fn cg6_nested_cgroups_that_were_left_go_as_well() {
    let Some((_place, group)) = bare().map_or_else(|reason| skipped("cg6", &reason), Some) else { return };
    let nested = group.dir().join("shim/left/over");
    fs::create_dir_all(&nested).unwrap();
    let script = format!("echo 0 > {}/cgroup.procs; sleep 600", nested.display());
    let _parent = run(&group, Part::Shim, &script);
    until("a process", || fs::read_to_string(nested.join("cgroup.procs")).is_ok_and(|text| !text.is_empty()))
        .await;
    group.remove().await.unwrap();
    assert!(!group.exists());
}

#[tokio::test]
async fn cg7_processes_that_were_moved_away_are_told() {
    let Some((place, group)) = bare().map_or_else(|reason| skipped("cg7", &reason), Some) else { return };
    let parent = run(&group, Part::Hypervisor, "sleep 600; true");
    until("the shell and what it started", || processes(&group, "hypervisor").len() == 2).await;
    let mut watcher = Watcher::of(group.clone(), &["cgroup.events"]).unwrap();
    let other = place.dir.join("other");
    fs::create_dir(&other).unwrap();
    for pid in processes(&group, "hypervisor") {
        fs::write(other.join("cgroup.procs"), pid.to_string()).unwrap();
    }
    assert_eq!(timeout(LIMIT, watcher.next()).await.unwrap(), Event::Empty);
    drop(parent);
}
