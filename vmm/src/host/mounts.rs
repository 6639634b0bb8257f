//! What is mounted where, as it changes: the kernel tells, nobody asks.

use std::{fs::File, io};
use tokio::io::{Interest, unix::AsyncFd};

/// Tells of changes of this process's mounts (proc_pid_mounts(5): an exceptional condition of the file).
#[derive(Debug)]
pub struct Mounts(AsyncFd<File>);

impl Mounts {
    /// Watches from now on.
    pub fn watch() -> io::Result<Self> {
        // A thread may have mounts of its own; those of this one are meant.
        let file = File::open("/proc/thread-self/mountinfo")?;
        #[expect(
            deprecated,
            reason = "unsound only for types that lie about their descriptor; a File does not"
        )]
        let file = AsyncFd::with_interest(file, Interest::PRIORITY)?;
        Ok(Self(file))
    }

    /// Waits for the next change. Several at once count as one.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    use std::time::Duration;
    use tokio::time::timeout;

    /// A thread of its own, so that no other test sees its mounts.
    #[test]
    fn cg5_a_change_of_mounts_is_told_and_nothing_else_is() {
        let apart = || {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            unshare(CloneFlags::CLONE_NEWNS)
                .and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>))
        };
        let look = async |directory: &std::path::Path| {
            let mounts = Mounts::watch().unwrap();
            let (soon, long) = (Duration::from_millis(200), Duration::from_secs(30));
            assert!(timeout(soon, mounts.changed()).await.is_err());
            for _ in 0..2 {
                mount(Some("none"), directory, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                timeout(long, mounts.changed()).await.unwrap().unwrap();
                assert!(timeout(soon, mounts.changed()).await.is_err());
            }
        };
        let test = move || {
            if let Err(error) = apart() {
                return println!("SKIPPED: a mount namespace of its own cannot be made: {error}");
            }
            let directory = tempfile::tempdir().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(look(directory.path()));
            for _ in 0..2 {
                nix::mount::umount(directory.path()).unwrap();
            }
        };
        std::thread::spawn(test).join().unwrap();
    }
}
