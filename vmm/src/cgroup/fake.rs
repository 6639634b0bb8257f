//! A directory that looks like a cgroup hierarchy to those who read and write files, for tests on hosts without controllers.

use super::hierarchy::{Hierarchy, Kernel};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// The files that the kernel makes in each cgroup, and what is in them at first.
const FILES: [(&str, &str); 18] = [
    ("cgroup.controllers", "cpuset cpu io memory pids\n"),
    ("cgroup.events", "populated 0\nfrozen 0\n"),
    ("cgroup.freeze", "0\n"),
    ("cgroup.kill", ""),
    ("cgroup.procs", ""),
    ("cgroup.subtree_control", ""),
    ("cgroup.type", "domain\n"),
    ("cpu.max", "max 100000\n"),
    ("cpu.stat", "usage_usec 0\nuser_usec 0\nsystem_usec 0\n"),
    ("cpu.weight", "100\n"),
    ("io.max", ""),
    ("memory.current", "0\n"),
    ("memory.events", "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n"),
    ("memory.max", "max\n"),
    ("memory.oom.group", "0\n"),
    (
        "memory.pressure",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    ),
    ("pids.current", "0\n"),
    ("pids.max", "max\n"),
];

fn make(path: &Path) -> io::Result<()> {
    fs::create_dir(path)?;
    FILES.iter().try_for_each(|(name, content)| fs::write(path.join(name), content))
}

/// Takes the kernel's files away and then the directory, if nothing else is in it.
fn remove(path: &Path) -> io::Result<()> {
    let others = fs::read_dir(path)?.flatten().any(|entry| {
        let name = entry.file_name();
        FILES.iter().all(|(file, _)| name != *file)
    });
    if others {
        return Err(io::Error::from_raw_os_error(nix::errno::Errno::ENOTEMPTY as i32));
    }
    for (name, _) in FILES {
        let _ = fs::remove_file(path.join(name));
    }
    fs::remove_dir(path)
}

pub(crate) struct Fake {
    _directory: TempDir,
    root: PathBuf,
}

impl Fake {
    pub(super) const KERNEL: Kernel = Kernel { make, remove };

    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("delegated");
        make(&root).unwrap();
        Self { _directory: directory, root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A file's content without its end, and without the sign of controllers that were asked for.
    pub(crate) fn read(&self, file: &str) -> String {
        fs::read_to_string(self.root.join(file)).unwrap().trim_end().replace('+', "")
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        fs::write(self.root.join(file), text).unwrap();
    }

    pub(crate) fn hierarchy(&self) -> Hierarchy {
        Hierarchy::prepare(self.root.clone(), 4242, true, Self::KERNEL).unwrap()
    }

    /// Plays the kernel: once `cgroup.kill` of `group` is written to, nothing is in it any more.
    pub(crate) fn obey_kill(&self, group: &str) -> Obedience {
        let group = self.root.join(group);
        let end = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&end);
        let thread = thread::spawn(move || {
            while !seen.load(Relaxed) {
                if fs::read_to_string(group.join("cgroup.kill")).is_ok_and(|text| text == "1") {
                    empty(&group);
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Obedience { end, thread: Some(thread) }
    }
}

/// Says that nothing is in `group` any more, in one go as the kernel does.
pub(super) fn empty(group: &Path) {
    let beside = group.join("cgroup.events.new");
    fs::write(&beside, "populated 0\nfrozen 0\n").unwrap();
    fs::rename(beside, group.join("cgroup.events")).unwrap();
}

pub(crate) struct Obedience {
    end: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Obedience {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}
