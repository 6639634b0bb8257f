//! A console log as a stream: what is there, then what comes, across rotations.

use std::{
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{sync::mpsc, time::sleep};

/// How much is read at once, in bytes.
const CHUNK: usize = 64 << 10;

/// Sends the log at `path` to `to`, the file before it first; if `follow`, goes on until nobody receives.
///
/// A slow receiver slows only this task: the log itself is written by the shim.
pub async fn send(path: PathBuf, follow: bool, poll: Duration, to: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    if let Some(mut earlier) = open(&rotated(&path))? {
        drain(&mut earlier, &to).await?;
    }
    let mut current = open(&path)?;
    loop {
        if let Some(file) = &mut current {
            drain(file, &to).await?;
        }
        if !follow || to.is_closed() {
            return Ok(());
        }
        sleep(poll).await;
        let now = std::fs::metadata(&path).ok();
        let same = |file: &File, now: &Metadata| {
            file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (now.dev(), now.ino()))
        };
        match (&mut current, now) {
            (Some(file), Some(now)) if same(file, &now) => {}
            (_, None) => {}
            (old, Some(_)) => {
                // What was written between the last look and the rotation.
                if let Some(file) = old {
                    drain(file, &to).await?;
                }
                current = open(&path)?;
            }
        }
    }
}

/// The file before the one at `path`.
pub fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn drain(file: &mut File, to: &mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = file.read(&mut chunk)?;
        chunk.truncate(length);
        if length == 0 || to.send(chunk).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(from: &mut mpsc::Receiver<Vec<u8>>) -> String {
        let chunk = tokio::time::timeout(Duration::from_secs(5), from.recv()).await.unwrap();
        String::from_utf8(chunk.unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_log_is_followed_across_its_rotation() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(rotated(&path), "before\n").unwrap();
        std::fs::write(&path, "one\n").unwrap();
        let (to, mut from) = mpsc::channel(1);
        let task = tokio::spawn(send(path.clone(), true, Duration::from_millis(5), to));
        assert_eq!(text(&mut from).await, "before\n");
        assert_eq!(text(&mut from).await, "one\n");
        std::fs::rename(&path, rotated(&path)).unwrap();
        std::fs::write(&path, "two\n").unwrap();
        assert_eq!(text(&mut from).await, "two\n");
        drop(from);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_is_empty() {
        let (to, mut from) = mpsc::channel(1);
        send("/nonexistent/console.log".into(), false, Duration::ZERO, to).await.unwrap();
        assert_eq!(from.recv().await, None);
    }
}
