//! A console log as a stream: what is there, then what comes, across rotations. Files are read where that may block: a disk that hangs
//! holds up this stream only.

use hyper::body::Bytes;
use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};
use tokio::{
    fs::{self, File},
    io::AsyncReadExt,
    sync::mpsc,
    time::sleep,
};

/// How much is read at once, in bytes.
const CHUNK: usize = 64 << 10;

/// Which file it is, whatever its name: device and inode.
type Id = (u64, u64);

/// Sends the log at `path` to `to`, the file before it first; if `follow`, goes on until nobody receives.
///
/// A slow receiver slows only this task: the log itself is written by the shim. Files that are rotated away before the receiver gets to
/// them are left out; a line says how much that was, and it is added to `dropped`.
pub async fn send(
    path: PathBuf,
    follow: bool,
    poll: Duration,
    to: mpsc::Sender<Bytes>,
    dropped: &AtomicU64,
) -> io::Result<()> {
    let mut follower = Follower { path, poll, to, newest: None, reading: None, missed: 0 };
    follower.look().await;
    if let Some(earlier) = open(&rotated(&follower.path)).await? {
        follower.drain(earlier).await?;
    }
    let mut current = None;
    loop {
        if let Some(file) = current.take() {
            current = Some(follower.drain(file).await?);
        }
        let behind = follower.newest.map(|(id, _)| id) != follower.reading;
        if current.is_none() || behind {
            if follower.missed > 0 {
                dropped.fetch_add(follower.missed, Relaxed);
                let count = std::mem::take(&mut follower.missed);
                let line =
                    format!("\n[laird: {count} bytes are missing here, because this reader was too slow]\n");
                let _ = follower.to.send(line.into()).await;
            }
            current = follower.next(current).await?;
            if current.is_some() {
                continue;
            }
        }
        if !follow || follower.to.is_closed() {
            return Ok(());
        }
        tokio::select! {
            () = sleep(poll) => {}
            () = follower.to.closed() => return Ok(()),
        }
        follower.look().await;
    }
}

/// Reads one file after the other, and sees those that are gone before it gets to them.
struct Follower {
    path: PathBuf,
    poll: Duration,
    to: mpsc::Sender<Bytes>,
    /// The file that has the log's name, when that was looked at last, and its size.
    newest: Option<(Id, u64)>,
    /// The file that is read.
    reading: Option<Id>,
    /// Bytes of files that were never read.
    missed: u64,
}

impl Follower {
    /// Looks which file has the log's name now.
    async fn look(&mut self) {
        let Ok(now) = fs::metadata(&self.path).await else { return };
        if let Some((id, size)) = self.newest
            && id != identity(&now)
            && Some(id) != self.reading
        {
            // It may have grown until it was rotated.
            let last = fs::metadata(rotated(&self.path)).await.ok().filter(|last| identity(last) == id);
            self.missed = self.missed.saturating_add(last.map_or(size, |last| last.len()));
        }
        self.newest = Some((identity(&now), now.len()));
    }

    /// The file that has the log's name now, if it is not `current`; all of `current` has been read.
    async fn next(&mut self, current: Option<File>) -> io::Result<Option<File>> {
        let next = open(&self.path).await?;
        if let Some(file) = &next {
            let metadata = file.metadata().await?;
            self.newest = Some((identity(&metadata), metadata.len()));
            self.reading = Some(identity(&metadata));
        }
        Ok(next.or(current))
    }

    /// Sends what is left of a file. While the receiver has no room, it looks what becomes of the log.
    async fn drain(&mut self, mut file: File) -> io::Result<File> {
        self.reading = Some(identity(&file.metadata().await?));
        loop {
            let mut chunk = vec![0; CHUNK];
            let length = file.read(&mut chunk).await?;
            chunk.truncate(length);
            if length == 0 {
                // What was written until the rotation was written before this look, so it is read once more after it.
                let before = self.newest;
                self.look().await;
                if self.newest.map(|(id, _)| id) == before.map(|(id, _)| id) {
                    return Ok(file);
                }
                continue;
            }
            let to = self.to.clone();
            let room = loop {
                tokio::select! {
                    room = to.reserve() => break room,
                    () = sleep(self.poll) => self.look().await,
                }
            };
            let Ok(room) = room else { return Ok(file) };
            room.send(chunk.into());
        }
    }
}

fn identity(metadata: &Metadata) -> Id {
    (metadata.dev(), metadata.ino())
}

/// The file before the one at `path`.
pub fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

async fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path).await {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, sync::Arc};

    async fn text(from: &mut mpsc::Receiver<Bytes>) -> String {
        let chunk = tokio::time::timeout(Duration::from_secs(30), from.recv()).await.unwrap();
        String::from_utf8(chunk.unwrap().to_vec()).unwrap()
    }

    fn rotate(path: &Path, text: &str) {
        fs::rename(path, rotated(path)).unwrap();
        fs::write(path, text).unwrap();
    }

    fn follow(path: &Path, to: mpsc::Sender<Bytes>, dropped: &Arc<AtomicU64>) -> tokio::task::JoinHandle<()> {
        let (path, dropped) = (path.to_owned(), Arc::clone(dropped));
        tokio::spawn(async move { send(path, true, Duration::from_millis(5), to, &dropped).await.unwrap() })
    }

    #[tokio::test]
    async fn a_log_is_followed_across_its_rotation() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        fs::write(rotated(&path), "before\n").unwrap();
        fs::write(&path, "one\n").unwrap();
        let (to, mut from) = mpsc::channel(1);
        let dropped = Arc::default();
        let task = follow(&path, to, &dropped);
        assert_eq!(text(&mut from).await, "before\n");
        assert_eq!(text(&mut from).await, "one\n");
        rotate(&path, "two\n");
        assert_eq!(text(&mut from).await, "two\n");
        drop(from);
        task.await.unwrap();
        assert_eq!(dropped.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn cl12_a_reader_that_does_not_read_misses_lines_and_is_told_how_many_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        fs::write(&path, "first\n").unwrap();
        let (to, mut from) = mpsc::channel(1);
        let dropped = Arc::default();
        let task = follow(&path, to, &dropped);
        // Room for one piece: it hangs on the second, which is more of the same file.
        while from.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        fs::write(&path, format!("first\n{}", "x".repeat(CHUNK))).unwrap();
        let looks = || tokio::time::sleep(Duration::from_millis(100));
        looks().await;
        for number in 0..5 {
            rotate(&path, &format!("file {number}\n"));
            looks().await;
        }
        // The guest's own end is not held up by any of this: the files are written, and rotated, by another.
        assert_eq!(text(&mut from).await, "first\n");
        assert_eq!(text(&mut from).await.len(), CHUNK);
        let line = text(&mut from).await;
        assert_eq!(line, "\n[laird: 28 bytes are missing here, because this reader was too slow]\n");
        assert_eq!(text(&mut from).await, "file 4\n");
        assert_eq!(dropped.load(Relaxed), 28);
        drop(from);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_is_empty() {
        let (to, mut from) = mpsc::channel(1);
        send("/nonexistent/console.log".into(), false, Duration::ZERO, to, &AtomicU64::new(0)).await.unwrap();
        assert_eq!(from.recv().await, None);
    }
}
