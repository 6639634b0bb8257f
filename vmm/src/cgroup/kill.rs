//! The end of a VM's cgroup: all processes in it, then itself.

use super::{CgroupError, VmCgroup, file, parse};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How long processes may take to end after they were killed: memory of a large guest is given back page by page.
const EMPTY: Duration = Duration::from_secs(10);

/// How long an empty cgroup may be busy: the kernel takes zombies out of it a little later.
const BUSY: Duration = Duration::from_secs(2);

/// How often a condition is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(10);

/// How many cgroups below one VM are removed in one go. Ours are four; others, only somebody with our rights can have made.
const NESTED_MAX: usize = 1000;

/// How deep below it they are looked for.
const DEPTH_MAX: usize = 16;

/// How long to wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) empty: Duration,
    pub(super) busy: Duration,
}

impl VmCgroup {
    /// Kills all that is in it and below, and waits until that has ended. What is not there is empty.
    pub async fn kill(&self) -> Result<(), CgroupError> {
        self.kill_within(EMPTY).await
    }

    async fn kill_within(&self, limit: Duration) -> Result<(), CgroupError> {
        if !self.exists() || !self.populated()? {
            return Ok(());
        }
        match file::write(&self.dir().join("cgroup.kill"), "1") {
            Ok(()) => self.await_empty(limit).await,
            // Before Linux 5.14.
            Err(CgroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                self.kill_by_hand(limit).await
            }
            Err(error) => Err(error),
        }
    }

    /// Stops all processes, so that none can start another unseen, and kills each.
    pub(super) async fn kill_by_hand(&self, limit: Duration) -> Result<(), CgroupError> {
        // Without a freezer as well the rounds still end: each kills what the last one's left had started.
        let frozen = file::write(&self.dir().join("cgroup.freeze"), "1");
        let end = Instant::now() + limit;
        while self.populated()? && Instant::now() < end {
            for dir in self.below() {
                for pid in file::parsed(&dir.join("cgroup.procs"), parse::processes)? {
                    // What has ended meanwhile needs no signal. Ids are not given out again so fast: the list is fresh.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            sleep(POLL).await;
        }
        // A frozen cgroup would not let its next process run.
        if frozen.is_ok() {
            let _ = file::write(&self.dir().join("cgroup.freeze"), "0");
        }
        self.await_empty(Duration::ZERO).await
    }

    async fn await_empty(&self, limit: Duration) -> Result<(), CgroupError> {
        let end = Instant::now() + limit;
        while self.exists() && self.populated()? {
            if Instant::now() >= end {
                return Err(self.leak(self.holders()));
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Kills what is in it and removes it with all that is below. What is not there is removed.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        self.remove_within(Patience { empty: EMPTY, busy: BUSY }).await
    }

    pub(super) async fn remove_within(&self, patience: Patience) -> Result<(), CgroupError> {
        self.kill_within(patience.empty).await?;
        let end = Instant::now() + patience.busy;
        loop {
            let mut failed = None;
            for dir in self.below() {
                match (self.kernel().remove)(&dir) {
                    // The first is the reason of those above it.
                    Err(error) if !file::gone(&error) => failed = failed.or(Some((dir, error))),
                    _ => {}
                }
            }
            let Some((dir, error)) = failed else {
                return if self.exists() {
                    Err(self.leak("it has more cgroups below it than are removed".into()))
                } else {
                    Ok(())
                };
            };
            if Instant::now() >= end {
                return Err(self.leak(format!("{}: {error}; {}", dir.display(), self.holders())));
            }
            sleep(POLL).await;
        }
    }

    /// It and all cgroups below it, the lowest first.
    fn below(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        below(self.dir(), 0, &mut found);
        found
    }

    fn leak(&self, reason: String) -> CgroupError {
        CgroupError::Leak { path: self.dir().into(), reason }
    }

    /// The processes that hold it, for a message.
    fn holders(&self) -> String {
        let ids =
            |dir: PathBuf| file::parsed(&dir.join("cgroup.procs"), parse::processes).unwrap_or_default();
        let held: Vec<_> = self.below().into_iter().flat_map(ids).collect();
        if held.is_empty() {
            return "no process that can be seen is in it".into();
        }
        let shown: Vec<_> = held.iter().take(10).map(ToString::to_string).collect();
        format!("{} processes are still in it: {}", held.len(), shown.join(", "))
    }
}

fn below(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if depth < DEPTH_MAX {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && found.len() < NESTED_MAX {
                below(&entry.path(), depth + 1, found);
            }
        }
    }
    found.push(dir.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{
        fake::{Fake, empty},
        values::Values,
    };

    const SHORT: Patience = Patience { empty: Duration::from_millis(200), busy: Duration::from_millis(100) };

    fn group(fake: &Fake) -> VmCgroup {
        let group = fake.hierarchy().vm("a");
        let values = Values { memory_max: 1 << 20, cpu_quota: None, cpu_weight: 100, pids_max: 9, io: None };
        group.create(&values, None).unwrap();
        group
    }

    fn populate(fake: &Fake) {
        fake.write("lair/vms/a/cgroup.events", "populated 1\nfrozen 0\n");
        fake.write("lair/vms/a/hypervisor/cgroup.procs", "999999999\n");
    }

    #[tokio::test]
    async fn a_cgroup_goes_with_all_that_is_below_it() {
        let fake = Fake::new();
        let group = group(&fake);
        for nested in ["store/left", "store/left/over"] {
            (Fake::KERNEL.make)(&group.dir().join(nested)).unwrap();
        }
        populate(&fake);
        let _kernel = fake.obey_kill("lair/vms/a");
        group.remove().await.unwrap();
        assert!(!group.exists());
        group.remove().await.unwrap();
        assert!(fake.hierarchy().dir().exists());
    }

    #[tokio::test]
    async fn cg6_what_does_not_end_is_a_leak_that_names_its_processes() {
        let fake = Fake::new();
        let group = group(&fake);
        populate(&fake);
        let error = group.remove_within(SHORT).await.unwrap_err().to_string();
        assert_eq!(fake.read("lair/vms/a/cgroup.kill"), "1");
        assert!(
            error.starts_with("cgroup-leak: ") && error.ends_with("1 processes are still in it: 999999999"),
            "{error}"
        );
        assert!(group.exists());
    }

    #[tokio::test]
    async fn cg6_what_stays_busy_is_a_leak_and_what_is_busy_for_a_while_is_not() {
        let fake = Fake::new();
        let group = group(&fake);
        // The fake's rmdir takes only the files away that the kernel makes.
        let stuck = group.dir().join("shim/not-a-file-of-the-kernel");
        fs::write(&stuck, "").unwrap();
        let error = group.remove_within(SHORT).await.unwrap_err().to_string();
        assert!(
            error.contains("shim: Directory not empty") && error.contains("no process that can be seen"),
            "{error}"
        );
        let later = tokio::spawn(async move {
            sleep(Duration::from_millis(50)).await;
            fs::remove_file(stuck).unwrap();
        });
        group.remove().await.unwrap();
        later.await.unwrap();
        assert!(!group.exists());
    }

    #[tokio::test]
    async fn cg8_without_cgroup_kill_all_are_stopped_and_killed_one_by_one() {
        let fake = Fake::new();
        let group = group(&fake);
        fs::remove_file(group.dir().join("cgroup.kill")).unwrap();
        let sleep = || std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let mut children = [sleep(), sleep()];
        fake.write("lair/vms/a/cgroup.events", "populated 1\nfrozen 0\n");
        fake.write("lair/vms/a/store/cgroup.procs", &format!("{}\n", children[0].id()));
        fake.write("lair/vms/a/vsock/cgroup.procs", &format!("{}\n", children[1].id()));
        let dir = group.dir().to_owned();
        let freeze = group.dir().join("cgroup.freeze");
        let kernel = std::thread::spawn(move || {
            for child in &mut children {
                use std::os::unix::process::ExitStatusExt;
                assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
            }
            let frozen = fs::read_to_string(&freeze).unwrap();
            empty(&dir);
            frozen
        });
        group.kill().await.unwrap();
        assert_eq!(kernel.join().unwrap(), "1");
        assert_eq!(fake.read("lair/vms/a/cgroup.freeze"), "0");
    }
}
