//! Follows the kernel's log, from as far back as it goes.

use super::super::bucket::Bucket;
use crate::sys;
use nix::{errno::Errno, fcntl::OFlag, unistd};
use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};
use tokio::io::Interest;

/// Longer than any record: a shorter buffer would be an error each time.
const RECORD_MAX: usize = 16 << 10;

/// So many records at once, then one in each interval. A log that grows faster is overwritten meanwhile, and what is lost of it is lost.
const RATE: (u32, Duration) = (2000, Duration::from_millis(5));

/// Tells each line of the log at `path` to `line`. It returns where the log cannot be read, or ends, which the kernel's does not.
pub(super) async fn follow(path: &Path, mut line: impl FnMut(&[u8])) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    // Not one of tokio's pipes: those take a short read for the end of what is there, and here each read is one record.
    let log = sys::watch(file.into())?;
    let mut buffer = vec![0; RECORD_MAX];
    let mut bucket = Bucket::new(RATE.0, RATE.1, Instant::now());
    loop {
        let read = log.async_io(Interest::READABLE, |log| Ok(unistd::read(log, &mut buffer)?)).await;
        match read {
            Ok(0) => return Ok(()),
            Ok(length) => {
                let record = buffer.get(..length).unwrap_or_default();
                record.split(|byte| *byte == b'\n').for_each(&mut line);
            }
            // Records were overwritten before they were read; the next read goes on after them.
            Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {}
            Err(error) => return Err(error),
        }
        while bucket.take(Instant::now()).is_none() {
            tokio::time::sleep(RATE.1).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{sys::stat::Mode, unistd::mkfifo};
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    async fn until(mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn what_is_there_is_told_and_what_comes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kmsg");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut log = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        log.write_all(b"6,1,2,-;one\n SUBSYSTEM=x\n6,2,3,-;two\n").unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&lines);
        let following = tokio::spawn(async move {
            let push = |line: &[u8]| told.lock().unwrap().push(String::from_utf8_lossy(line).into_owned());
            follow(&path, push).await
        });
        until(|| lines.lock().unwrap().len() == 4).await;
        assert_eq!(*lines.lock().unwrap(), ["6,1,2,-;one", " SUBSYSTEM=x", "6,2,3,-;two", ""]);
        log.write_all(b"6,3,4,-;three\n").unwrap();
        until(|| lines.lock().unwrap().iter().any(|line| line.ends_with("three"))).await;
        drop(log);
        following.await.unwrap().unwrap();
        assert!(follow(Path::new("/nonexistent"), |_| {}).await.is_err());
    }

    /// The kernel's own log, here and now. In a VM of the tests' own, with what a program writes to it.
    #[tokio::test]
    async fn vs3_the_kernels_own_log_is_read_and_what_a_program_writes_to_it_is_told_from_the_kernels() {
        let log = Path::new("/dev/kmsg");
        if let Err(error) = std::fs::File::open(log) {
            return println!("SKIPPED: /dev/kmsg cannot be read: {error}");
        }
        let forged = "NVRM: Xid (PCI:0000:01:00): 79, forged by a test";
        let may_write = std::env::var_os("LAIR_HOST_VM").is_some();
        if may_write {
            std::fs::write(log, format!("<3>{forged}\n")).unwrap();
        }
        let (lines, told) = tokio::sync::mpsc::unbounded_channel();
        let following = tokio::spawn(async move {
            let tell = |line: &[u8]| drop(lines.send(line.to_vec()));
            follow(Path::new("/dev/kmsg"), tell).await
        });
        let mut told = told;
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        let (mut records, mut forgeries) = (0, 0);
        // Until nothing more comes: it has been read to its end. Some kernels always have something to say.
        let soon = || end.min(tokio::time::Instant::now() + Duration::from_secs(2));
        while let Ok(Some(line)) = tokio::time::timeout_at(soon(), told.recv()).await {
            let text = String::from_utf8(line.clone()).unwrap();
            if text.starts_with(' ') || text.is_empty() {
                continue;
            }
            let fields: Vec<_> = text.split(';').next().unwrap().split(',').collect();
            assert!(fields.len() >= 4 && fields[..3].iter().all(|n| n.parse::<u64>().is_ok()), "{text}");
            records += 1;
            if text.contains(forged) {
                forgeries += 1;
                assert_eq!(super::super::kernel_log::parse(&line), None, "{text}");
            }
        }
        assert!(!following.is_finished());
        if records == 0 {
            return println!("SKIPPED: there is nothing in /dev/kmsg");
        }
        assert_eq!(forgeries, u32::from(may_write));
    }
}
