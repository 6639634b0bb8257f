//! The console: the shim is the only one that the hypervisor's socket speaks to. All that the guest writes goes into the
//! console log, a bounded [`Ring`], and to the sessions that show it; one session at a time types.
//!
//! The console is read whatever a disk or a session does: a guest whose console is full stops.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    backlog::Backlog,
    limits,
    ring::Ring,
    socket,
    state::Shim,
    worker::{Work, Worker},
};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering::Relaxed},
    time::Instant,
};
use tokio::{
    net::UnixStream,
    sync::{Notify, watch},
    time::{sleep, timeout},
};

/// How much of the console waits for the disk, in bytes.
const BACKLOG: usize = 1 << 20;

/// The largest piece, in bytes.
const PIECE: usize = 64 << 10;

/// The console log's writer.
pub(super) struct ConsoleLog {
    backlog: Arc<Mutex<Backlog>>,
    /// Its queue holds no more than the word that there is something.
    worker: Worker<()>,
}

impl ConsoleLog {
    /// A log at `path` with at most `limit` bytes in each of its two files.
    pub(super) fn start(path: PathBuf, limit: u64) -> io::Result<Self> {
        let shown = path.display().to_string();
        let mut ring = Ring::new(path, limit);
        let backlog = Arc::new(Mutex::new(Backlog::new(BACKLOG)));
        let source = backlog.clone();
        let worker = Worker::start("console", 1, move |_: Work<()>| {
            let (lost, bytes) = locked(&source).take();
            let note = if lost > 0 {
                format!("\n[{lost} bytes of the console are lost here]\n")
            } else {
                String::new()
            };
            for piece in [note.as_bytes(), &bytes] {
                if let Err(error) = ring.append(piece) {
                    let _ = writeln!(io::stderr(), "Cannot write to console log {shown}: {error}");
                }
            }
        })?;
        Ok(Self { backlog, worker })
    }

    fn append(&self, piece: &[u8]) {
        locked(&self.backlog).push(piece);
        // A full queue has the word already.
        let _ = self.worker.send(());
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        self.worker.finish(limits::STOP);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What sessions share of the console.
pub(super) struct Console {
    audience: Mutex<Audience>,
    /// The hypervisor's end, while there is one.
    stream: watch::Sender<Option<Arc<UnixStream>>>,
    /// The user whose session types.
    writer: Mutex<Option<u32>>,
}

struct Audience {
    /// The end of what was shown.
    recent: Backlog,
    views: Vec<Weak<View>>,
}

/// One session's share of the output.
pub(super) struct View {
    backlog: Mutex<Backlog>,
    more: Notify,
}

impl View {
    fn push(&self, bytes: &[u8]) {
        locked(&self.backlog).push(bytes);
        self.more.notify_one();
    }

    /// Waits until there is something; then how much was lost before it, and all of it.
    pub(super) async fn next(&self) -> (u64, Vec<u8>) {
        self.more.notified().await;
        locked(&self.backlog).take()
    }
}

/// The right to type, until it is dropped.
pub(super) struct Writing<'a> {
    console: &'a Console,
    /// The guest has not taken what was typed last.
    stalled: bool,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        *locked(&self.console.writer) = None;
    }
}

impl Console {
    /// A console whose log is at `log`; what is in it counts as shown.
    pub(super) fn new(log: &Path) -> Self {
        let mut recent = Backlog::new(limits::CONSOLE_RECENT);
        // Without a log there is nothing to show.
        recent.push(&end_of(log).unwrap_or_default());
        let audience = Audience { recent, views: vec![] };
        Self { audience: Mutex::new(audience), stream: watch::Sender::new(None), writer: Mutex::new(None) }
    }

    /// Whether there is a hypervisor behind it.
    pub(super) fn connected(&self) -> bool {
        self.stream.borrow().is_some()
    }

    /// A share of the output: first the end of what was shown, then all that comes.
    pub(super) fn attach(&self) -> Arc<View> {
        let view =
            Arc::new(View { backlog: Mutex::new(Backlog::new(limits::CONSOLE_VIEW)), more: Notify::new() });
        let mut audience = locked(&self.audience);
        view.push(&audience.recent.copy());
        audience.views.push(Arc::downgrade(&view));
        view
    }

    /// Lets a session of `uid` type, or tells whose does.
    pub(super) fn write_as(&self, uid: u32) -> Result<Writing<'_>, u32> {
        let mut writer = locked(&self.writer);
        match *writer {
            Some(other) => Err(other),
            None => {
                *writer = Some(uid);
                Ok(Writing { console: self, stalled: false })
            }
        }
    }

    fn show(&self, bytes: &[u8]) {
        let mut audience = locked(&self.audience);
        audience.recent.push(bytes);
        audience.views.retain(|view| match view.upgrade() {
            Some(view) => {
                view.push(bytes);
                true
            }
            None => false,
        });
    }
}

impl Writing<'_> {
    /// Types `bytes`, if the guest takes them. Without a hypervisor they go nowhere.
    pub(super) async fn send(&mut self, mut bytes: &[u8]) {
        let mut present = self.console.stream.subscribe();
        let Some(stream) = present.borrow_and_update().clone() else { return };
        while !bytes.is_empty() {
            match stream.try_write(bytes) {
                Ok(written) => {
                    self.stalled = false;
                    bytes = bytes.get(written..).unwrap_or_default();
                }
                // One wait is enough: what comes behind it must not wait as long again, least of all this session's end.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.stalled => {
                    let ready = tokio::select! {
                        _ = present.changed() => return,
                        ready = timeout(limits::CONSOLE_TYPED, stream.writable()) => ready,
                    };
                    self.stalled = ready.is_err();
                }
                Err(_) => return,
            }
        }
    }
}

/// The last [`limits::CONSOLE_RECENT`] bytes of a file.
fn end_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let most = u64::try_from(limits::CONSOLE_RECENT).unwrap_or(u64::MAX);
    let from = file.metadata()?.len().saturating_sub(most);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads the hypervisor's console socket until the shim ends, connecting again and again.
pub(super) async fn follow(shim: &Shim, path: &Path, log: &ConsoleLog) {
    let (shortest, longest) = limits::BACK_OFF;
    let mut pause = shortest;
    loop {
        if let Ok(stream) = socket::connect_to_owner(path, limits::DIAL).await {
            let since = Instant::now();
            shim.guest().mark("console");
            let stream = Arc::new(stream);
            shim.console.stream.send_replace(Some(stream.clone()));
            shim.observe(|seen| seen.console = true);
            copy(shim, &stream, log).await;
            shim.console.stream.send_replace(None);
            shim.observe(|seen| seen.console = false);
            if since.elapsed() >= limits::LASTING {
                pause = shortest;
            }
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(longest);
    }
}

async fn copy(shim: &Shim, stream: &UnixStream, log: &ConsoleLog) {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = match stream.readable().await.and_then(|()| stream.try_read(&mut buffer)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // The end and an error are the same here: the hypervisor is gone or goes on with another connection.
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        shim.console_bytes.fetch_add(u64::try_from(read).unwrap_or(u64::MAX), Relaxed);
        log.append(bytes);
        shim.console.show(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (tempfile::TempDir, Console) {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        std::fs::write(&log, [vec![b'x'; limits::CONSOLE_RECENT], b"the end".to_vec()].concat()).unwrap();
        let console = Console::new(&log);
        (directory, console)
    }

    #[tokio::test]
    async fn a_view_begins_with_the_end_of_the_log() {
        let (_directory, console) = console();
        console.show(b" and more");
        let view = console.attach();
        console.show(b", all of it");
        let (lost, bytes) = view.next().await;
        assert!(lost == 0 && bytes.ends_with(b"xxxthe end and more, all of it"));
        assert_eq!(bytes.len(), limits::CONSOLE_RECENT + 11);
    }

    #[tokio::test]
    async fn cl12_a_view_that_is_not_read_loses_and_counts_and_is_forgotten() {
        let (_directory, console) = console();
        let (slow, fast) = (console.attach(), console.attach());
        fast.next().await;
        let block = [b'.'; PIECE];
        for _ in 0..100 {
            console.show(&block);
            assert_eq!(fast.next().await.1.len(), PIECE);
        }
        let (lost, bytes) = slow.next().await;
        assert_eq!(bytes.len(), limits::CONSOLE_VIEW);
        let all = limits::CONSOLE_RECENT + 100 * PIECE;
        assert_eq!(lost, u64::try_from(all - limits::CONSOLE_VIEW).unwrap());
        drop(slow);
        console.show(b"x");
        assert_eq!(locked(&console.audience).views.len(), 1);
    }

    #[tokio::test]
    async fn one_types_at_a_time_and_never_waits_for_a_console_that_is_gone() {
        let (_directory, console) = console();
        let mut first = console.write_as(1000).unwrap();
        assert_eq!(console.write_as(0).err(), Some(1000));
        first.send(b"to nobody").await;
        drop(first);
        let mut writing = console.write_as(0).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        console.stream.send_replace(Some(Arc::new(near)));
        let blocks = async |writing: &mut Writing<'_>| {
            for _ in 0..100 {
                writing.send(&[b'x'; PIECE]).await;
            }
        };
        let limit = std::time::Duration::from_secs(60);
        timeout(limit, blocks(&mut writing)).await.expect("Each block waits for a guest that does not read");
        assert!(writing.stalled);
        let mut sink = vec![0; 100 * PIECE];
        far.readable().await.unwrap();
        while far.try_read(&mut sink).is_ok() {}
        // Between two pieces that are typed the runtime hears that there is room again.
        sleep(std::time::Duration::from_millis(50)).await;
        writing.send(b"typed").await;
        assert!(!writing.stalled);
        let gone = async { console.stream.send_replace(None) };
        timeout(limit, async { tokio::join!(blocks(&mut writing), gone) }).await.unwrap();
        assert!(!writing.stalled, "The wait was for a console that is gone");
    }
}
