//! What happens to a VM's cgroup, as the kernel tells it: nothing is asked for while nothing happens.
//!
//! `memory.events` and `cgroup.events` are watched with inotify, memory pressure with a trigger (Linux,
//! Documentation/accounting/psi.rst).

use super::{
    CgroupError, VmCgroup, file,
    parse::{self, MemoryEvents, Pressure},
};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Memory ran out and processes were killed: with `memory.oom.group`, all of the VM's.
    Oom {
        /// How many since the last event.
        killed: u64,
    },
    /// All of the VM's tasks waited for memory for more than a tenth of the last two seconds.
    Pressure(Pressure),
    /// There is no process in it any more.
    Empty,
    /// It is not there any more. Nothing comes after this.
    Gone,
}

/// When the kernel tells of pressure: microseconds of two seconds, the only window that needs no right of its own.
const TRIGGER: &str = "full 200000 2000000";

/// The shortest time between two looks: `memory.events` changes with every page that is wanted beyond the limit.
const PAUSE: Duration = Duration::from_millis(500);

/// The shortest time between two events of pressure, which can last for hours.
const PRESSURE_PAUSE: Duration = Duration::from_secs(10);

/// Watches one VM's cgroup.
#[derive(Debug)]
pub struct Watcher {
    group: VmCgroup,
    inotify: AsyncFd<OwnedFd>,
    trigger: Option<AsyncFd<File>>,
    seen: MemoryEvents,
    populated: bool,
    look: Instant,
    press: Instant,
}

impl Watcher {
    /// Watches `group` from now on. What has happened to it before is not told, but that it has no process: that is, as long as it
    /// had one.
    pub fn new(group: VmCgroup) -> Result<Self, CgroupError> {
        let watcher = Self::of(group, &["memory.events", "cgroup.events"])?;
        Ok(Self {
            seen: file::parsed(&watcher.group.dir().join("memory.events"), parse::memory_events)?,
            ..watcher
        })
    }

    pub(super) fn of(group: VmCgroup, files: &[&str]) -> Result<Self, CgroupError> {
        let failed = |path: PathBuf| move |error: nix::Error| CgroupError::Watch(path, error.into());
        let dir = group.dir().to_owned();
        let inotify =
            Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed(dir.clone()))?;
        for name in files {
            let path = dir.join(name);
            inotify.add_watch(&path, AddWatchFlags::IN_MODIFY).map_err(failed(path))?;
        }
        let trigger = trigger(&group);
        let populated = group.populated()?;
        let now = Instant::now();
        let inotify = readable(OwnedFd::from(inotify), Interest::READABLE)
            .map_err(|error| CgroupError::Watch(dir, error))?;
        Ok(Self { group, inotify, trigger, seen: MemoryEvents::default(), populated, look: now, press: now })
    }

    /// Waits for the next event. It may be dropped while it waits.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.look() {
                return event;
            }
            tokio::select! {
                () = changed(&self.inotify) => {
                    // So that a flood of changes is one look.
                    sleep_until(self.look).await;
                }
                () = pressed(self.trigger.as_ref(), self.press) => {
                    self.press = Instant::now() + PRESSURE_PAUSE;
                    let path = self.group.dir().join("memory.pressure");
                    match file::parsed(&path, parse::pressure) {
                        Ok(pressure) => return Event::Pressure(pressure),
                        // A trigger of a cgroup that is gone fires for ever.
                        Err(_) => self.trigger = None,
                    }
                }
            }
        }
    }

    /// What has changed since the last look, without waiting. What is told here is not told again.
    pub fn look(&mut self) -> Option<Event> {
        self.look = Instant::now() + PAUSE;
        if !self.group.exists() {
            return Some(Event::Gone);
        }
        let events = self.group.dir().join("memory.events");
        if let Ok(now) = file::parsed(&events, parse::memory_events) {
            let killed = now.oom_kill.saturating_sub(self.seen.oom_kill);
            self.seen = now;
            if killed > 0 {
                return Some(Event::Oom { killed });
            }
        }
        let now = self.group.populated().unwrap_or(self.populated);
        let before = std::mem::replace(&mut self.populated, now);
        (before && !self.populated).then_some(Event::Empty)
    }
}

/// Waits for a change and takes note of it.
async fn changed(inotify: &AsyncFd<OwnedFd>) {
    let ready = inotify.readable().await;
    let Ok(mut ready) = ready else { return std::future::pending().await };
    // What is told is only that there is something to look at; several at once are one.
    let mut buffer = [0; 4096];
    while nix::unistd::read(inotify.get_ref(), &mut buffer).is_ok_and(|length| length > 0) {}
    ready.clear_ready();
}

/// Waits for pressure, not before `not_before`.
async fn pressed(trigger: Option<&AsyncFd<File>>, not_before: Instant) {
    let Some(trigger) = trigger else { return std::future::pending().await };
    sleep_until(not_before).await;
    match trigger.ready(Interest::PRIORITY).await {
        Ok(mut ready) => ready.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}

/// Asks the kernel to tell of pressure. Where it does not, that is said once, and there are no such events.
fn trigger(group: &VmCgroup) -> Option<AsyncFd<File>> {
    let path = group.dir().join("memory.pressure");
    let asked = || -> io::Result<AsyncFd<File>> {
        let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(&path)?;
        file.write_all(TRIGGER.as_bytes())?;
        readable(file, Interest::PRIORITY)
    };
    asked()
        .inspect_err(|error| tracing::info!(vm = group.name(), file = %path.display(), %error, "memory pressure is not told"))
        .ok()
}

fn readable<T: AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    #[expect(
        deprecated,
        reason = "unsound only for types that lie about their descriptor; a File and an OwnedFd do not"
    )]
    AsyncFd::with_interest(inner, interest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{fake::Fake, values::Values};
    use tokio::time::timeout;

    const LIMIT: Duration = Duration::from_secs(30);

    fn group(fake: &Fake) -> VmCgroup {
        let group = fake.hierarchy().vm("builder");
        let values = Values { memory_max: 1 << 20, cpu_quota: None, cpu_weight: 100, pids_max: 9, io: None };
        group.create(&values, None).unwrap();
        fake.write("lair/vms/builder/cgroup.events", "populated 1\nfrozen 0\n");
        group
    }

    async fn next(watcher: &mut Watcher) -> Event {
        timeout(LIMIT, watcher.next()).await.unwrap()
    }

    #[tokio::test]
    async fn cg2_processes_killed_for_memory_are_told_with_their_number() {
        let fake = Fake::new();
        let events = |kills: u64, max: u64| {
            let text = format!("low 0\nhigh 0\nmax {max}\noom 1\noom_kill {kills}\noom_group_kill 1\n");
            fake.write("lair/vms/builder/memory.events", &text);
        };
        let group = group(&fake);
        // Of before the watch: not news.
        events(2, 5);
        let mut watcher = Watcher::new(group).unwrap();
        events(2, 9);
        assert!(timeout(Duration::from_millis(700), watcher.next()).await.is_err(), "only reclaim");
        events(6, 9);
        assert_eq!(next(&mut watcher).await, Event::Oom { killed: 4 });
        events(7, 9);
        assert_eq!(next(&mut watcher).await, Event::Oom { killed: 1 });
    }

    #[tokio::test]
    async fn cg7_a_cgroup_without_processes_and_one_that_is_gone_are_told() {
        let fake = Fake::new();
        let group = group(&fake);
        let mut watcher = Watcher::new(group.clone()).unwrap();
        fake.write("lair/vms/builder/cgroup.events", "populated 0\nfrozen 0\n");
        assert_eq!(next(&mut watcher).await, Event::Empty);
        fake.write("lair/vms/builder/memory.events", "nonsense");
        std::fs::remove_dir_all(group.dir()).unwrap();
        assert_eq!(next(&mut watcher).await, Event::Gone);
        assert!(Watcher::new(group).unwrap_err().is_gone());
    }
}
