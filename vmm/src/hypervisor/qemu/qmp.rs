//! QMP: JSON lines on a unix socket, one client at a time.
//!
//! The peer is a hypervisor that its guest may have taken over: every line is bounded, every answer has a
//! deadline, an answer that nobody asked for is dropped.

use crate::hypervisor::Heard;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

/// The longest line that is read, in bytes. The greeting and all answers that we ask for are below 1 KiB.
const LINE_MAX: u64 = 1 << 20;

/// How much is read at once, in bytes. Each VM has such a buffer as long as it runs.
const BUFFER: usize = 1 << 10;

/// How long QEMU may take to answer a command. Under emulation on a loaded host it has been seen to take over a second.
const ANSWER: Duration = Duration::from_secs(10);

/// Why QEMU could not be told something.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket did not appear or did not answer.
    #[error("QEMU does not answer on {0} within {1:?}")]
    NoGreeting(PathBuf, Duration),
    /// The connection failed.
    #[error("The connection to QEMU failed")]
    Io(#[from] io::Error),
    /// Another process listens there: the socket's directory belongs to QEMU, which its guest may have taken over.
    #[error("{socket} is not QEMU's: process {found} listens there, and QEMU is process {expected}")]
    Stranger {
        /// The socket.
        socket: PathBuf,
        /// Who listens.
        found: i32,
        /// Who should.
        expected: i32,
    },
    /// Something else than QMP came.
    #[error("QEMU sent what is not QMP")]
    Malformed,
    /// A device is still there.
    #[error("The guest has not let go of the device {id} within {patience:?}")]
    Stays {
        /// Its name.
        id: String,
        /// How long that was waited for.
        patience: Duration,
    },
    /// A command was not answered.
    #[error("QEMU did not answer {0} within {1:?}")]
    Silent(&'static str, Duration),
    /// QEMU refused a command.
    #[error("QEMU refused {0}: {1}")]
    Refused(&'static str, String),
}

/// Commands that are not answered, each with the moment until which its answer is waited for.
type Waiting = Arc<Mutex<HashMap<u64, (Instant, oneshot::Sender<Result<Value, String>>)>>>;

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    next: AtomicU64,
    reader: JoinHandle<()>,
}

#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Connects to the process `qemu`, waiting until `deadline` for it to listen. Events show in `heard` until the connection ends.
    pub async fn connect(
        socket: &Path,
        qemu: i32,
        deadline: Duration,
        heard: watch::Sender<Heard>,
    ) -> Result<Self, QmpError> {
        timeout(deadline, Self::connect_patiently(socket, qemu, deadline, heard))
            .await
            .unwrap_or_else(|_| Err(QmpError::NoGreeting(socket.to_owned(), deadline)))
    }

    async fn connect_patiently(
        socket: &Path,
        qemu: i32,
        deadline: Duration,
        heard: watch::Sender<Heard>,
    ) -> Result<Self, QmpError> {
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                // It binds it a few milliseconds after its start, and the VM waits for that.
                Err(_) => sleep(Duration::from_millis(2)).await,
            }
        };
        let found = stream.peer_cred()?.pid().unwrap_or_default();
        if found != qemu {
            return Err(QmpError::Stranger { socket: socket.to_owned(), found, expected: qemu });
        }
        let (reader, writer) = stream.into_split();
        let mut lines = BufReader::with_capacity(BUFFER, reader);
        let greeting = read_line(&mut lines).await?.ok_or(QmpError::Malformed)?;
        let greeting: Value = serde_json::from_slice(&greeting).map_err(|_| QmpError::Malformed)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed);
        }
        let waiting = Waiting::default();
        let reader = tokio::spawn(read_lines(lines, Arc::clone(&waiting), heard));
        let writer = tokio::sync::Mutex::new(writer);
        let qmp = Self { writer, waiting, next: AtomicU64::new(0), reader };
        // It greets before it has made its devices, and pins its guest's memory before it answers.
        let command = "qmp_capabilities";
        qmp.send(command, json!({ "execute": command }), deadline.max(ANSWER)).await?;
        Ok(qmp)
    }

    /// Sends a command without arguments and returns its answer.
    pub async fn execute(&self, command: &'static str) -> Result<Value, QmpError> {
        self.send(command, json!({ "execute": command }), ANSWER).await
    }

    /// Sends a command with arguments and returns its answer.
    pub async fn execute_with(&self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, json!({ "execute": command, "arguments": arguments }), ANSWER).await
    }

    /// The same with a command that may take longer than others.
    pub async fn execute_within(
        &self,
        command: &'static str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        self.send(command, json!({ "execute": command, "arguments": arguments }), patience).await
    }

    async fn send(
        &self,
        command: &'static str,
        mut request: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next.fetch_add(1, Relaxed);
        let (sender, receiver) = oneshot::channel();
        // It takes one command after the other: behind one that may take long it is no sign of death that it says nothing.
        let now = Instant::now();
        let end = {
            let mut waiting = lock(&self.waiting);
            let end = waiting.values().map(|(end, _)| *end).fold(now, Instant::max) + patience;
            waiting.insert(id, (end, sender));
            end
        };
        let _waits = Waits { waiting: &self.waiting, id };
        if let Some(request) = request.as_object_mut() {
            request.insert("id".into(), id.into());
        }
        let mut line = request.to_string();
        line.push('\n');
        let answer = async {
            self.writer.lock().await.write_all(line.as_bytes()).await?;
            receiver.await.map_err(|_| QmpError::Io(io::ErrorKind::ConnectionReset.into()))
        };
        let answer = timeout_at(end, answer).await;
        let waited = Duration::from_millis(u64::try_from((end - now).as_millis()).unwrap_or(u64::MAX));
        answer.map_err(|_| QmpError::Silent(command, waited))??.map_err(|e| QmpError::Refused(command, e))
    }
}

/// A command that is waited for, until this is dropped: what nobody waits for any more gives no others more time.
struct Waits<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.id);
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_line(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    from.take(LINE_MAX).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn read_lines(mut lines: impl AsyncBufRead + Unpin, waiting: Waiting, heard: watch::Sender<Heard>) {
    while let Ok(Some(line)) = read_line(&mut lines).await {
        let Ok(line) = serde_json::from_slice::<Line>(&line) else { break };
        if let Some(event) = line.event {
            heard.send_modify(|heard| note(heard, &event, &line.data));
        } else if let Some((_, sender)) = line.id.and_then(|id| lock(&waiting).remove(&id)) {
            let answer = match line.error {
                Some(refusal) => Err(refusal.desc),
                None => Ok(line.answer.unwrap_or_default()),
            };
            let _ = sender.send(answer);
        }
    }
    lock(&waiting).clear();
    heard.send_modify(|heard| heard.lost = true);
}

/// What an event says about the guest. One that says nothing wakes nobody, but is seen as a change to the same.
fn note(heard: &mut Heard, event: &str, data: &Value) {
    let by_guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
    match event {
        // QEMU powers off a guest that panicked.
        "GUEST_PANICKED" => heard.panic = true,
        "SHUTDOWN" if data.get("reason").and_then(Value::as_str) == Some("guest-panic") => heard.panic = true,
        "SHUTDOWN" if by_guest => heard.power_off = true,
        "RESET" if by_guest => heard.reboots = heard.reboots.saturating_add(1),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\n";

    /// A QEMU that greets with `greeting` and answers each command with the next of `answers`.
    async fn qemu(greeting: &'static str, answers: Vec<&'static str>) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let mut lines = BufReader::new(reader);
            let _ = writer.write_all(greeting.as_bytes()).await;
            for answer in answers {
                if read_line(&mut lines).await.unwrap().is_none()
                    || writer.write_all(answer.as_bytes()).await.is_err()
                {
                    return;
                }
            }
            let _ = read_line(&mut lines).await;
        });
        (directory, socket)
    }

    /// The process that listens in these tests.
    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    #[tokio::test]
    async fn a_socket_in_the_hypervisors_place_is_not_spoken_to() {
        let (_directory, socket) = qemu(GREETING, vec!["{\"return\": {}, \"id\": 0}\n"]).await;
        let (sender, _heard) = watch::channel(Heard::default());
        let error = Qmp::connect(&socket, own() + 1, Duration::from_secs(5), sender).await.unwrap_err();
        let QmpError::Stranger { found, expected, .. } = error else { panic!("{error}") };
        assert_eq!((found, expected), (own(), own() + 1));
    }

    #[tokio::test]
    async fn answers_find_their_commands_among_events() {
        let answers = vec![
            "{\"return\": {}, \"id\": 0}\n",
            "{\"event\": \"RESET\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n{\"event\": \"RESET\", \"data\": {\"guest\": false}}\n{\"return\": {}, \"id\": 77}\n{\"return\": {\"status\": \"running\"}, \"id\": 1}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 2}\n",
        ];
        let (_directory, socket) = qemu(GREETING, answers).await;
        let (sender, mut heard) = watch::channel(Heard::default());
        let qmp = Qmp::connect(&socket, own(), Duration::from_secs(5), sender).await.unwrap();
        assert_eq!(qmp.execute("query-status").await.unwrap()["status"], "running");
        assert_eq!(qmp.execute("cont").await.unwrap_err().to_string(), "QEMU refused cont: no");
        assert_eq!(*heard.borrow(), Heard { reboots: 1, ..Heard::default() });
        assert!(qmp.execute("quit").await.is_err());
        heard.wait_for(|heard| heard.lost).await.unwrap();
    }

    /// A device of a large guest is plugged in: QEMU pins memory for longer than any other command may take, and its guest's agent is silent.
    #[tokio::test]
    async fn hv4_a_hypervisor_that_is_at_work_is_not_silent() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let mut lines = BufReader::new(reader);
            writer.write_all(GREETING.as_bytes()).await.unwrap();
            for id in 0..4 {
                let line = read_line(&mut lines).await.unwrap().unwrap();
                if String::from_utf8(line).unwrap().contains("device_add") {
                    sleep(Duration::from_millis(500)).await;
                }
                let answer = format!("{{\"return\": {{}}, \"id\": {id}}}\n");
                writer.write_all(answer.as_bytes()).await.unwrap();
            }
            // Takes what comes then, and answers nothing.
            while read_line(&mut lines).await.is_ok_and(|line| line.is_some()) {}
        });
        let (sender, _heard) = watch::channel(Heard::default());
        let qmp = Qmp::connect(&socket, own(), Duration::from_secs(5), sender).await.unwrap();
        let short = Duration::from_millis(100);
        let plug = qmp.execute_within("device_add", json!({}), Duration::from_secs(30));
        let look = async {
            sleep(Duration::from_millis(10)).await;
            tokio::join!(
                qmp.execute_within("query-status", json!({}), short),
                qmp.execute_within("query-status", json!({}), short)
            )
        };
        let (plugged, (first, second)) = tokio::join!(plug, look);
        plugged.and(first).and(second).unwrap();
        // Behind no such command it has no longer than ever.
        let silent = timeout(Duration::from_secs(20), qmp.execute_within("query-status", json!({}), short));
        let error = silent.await.unwrap().unwrap_err();
        assert!(matches!(error, QmpError::Silent("query-status", _)), "{error}");
    }

    #[tokio::test]
    async fn hv4_a_command_that_nobody_waits_for_gives_no_others_more_time() {
        // Takes all that comes, and answers nothing.
        let answers = [vec!["{\"return\": {}, \"id\": 0}\n"], vec![""; 9]].concat();
        let (_directory, socket) = qemu(GREETING, answers).await;
        let (sender, _heard) = watch::channel(Heard::default());
        let qmp = Arc::new(Qmp::connect(&socket, own(), Duration::from_secs(5), sender).await.unwrap());
        let (long, short) = (Duration::from_secs(2), Duration::from_millis(50));
        let silent = |outcome: Result<Value, QmpError>| outcome.unwrap_err().to_string();
        let plug = tokio::spawn({
            let qmp = Arc::clone(&qmp);
            async move { qmp.execute_within("device_add", json!({}), long).await }
        });
        while lock(&qmp.waiting).is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        // Behind it, it is the time that was waited that is told.
        let error = qmp.execute_within("query-status", json!({}), short).await.unwrap_err();
        let QmpError::Silent("query-status", waited) = error else { panic!("{error}") };
        assert!(waited > short && waited <= long + short, "{waited:?}");
        assert_eq!(silent(plug.await.unwrap()), "QEMU did not answer device_add within 2s");

        let plug = tokio::spawn({
            let qmp = Arc::clone(&qmp);
            async move { qmp.execute_within("device_add", json!({}), Duration::from_secs(3600)).await }
        });
        while lock(&qmp.waiting).is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        plug.abort();
        assert!(plug.await.unwrap_err().is_cancelled());
        let late = timeout(Duration::from_secs(60), qmp.execute_within("query-status", json!({}), short));
        assert_eq!(silent(late.await.unwrap()), "QEMU did not answer query-status within 50ms");
        assert!(lock(&qmp.waiting).is_empty());
    }

    #[test]
    fn hv7_a_reboot_loop_is_a_number() {
        let mut heard = Heard::default();
        for _ in 0..100 {
            note(&mut heard, "RESET", &json!({ "guest": true }));
        }
        assert_eq!(heard, Heard { reboots: 100, ..Heard::default() });
        note(&mut heard, "SHUTDOWN", &json!({ "guest": true, "reason": "guest-panic" }));
        assert!(heard.panic && !heard.power_off);
        note(&mut heard, "SHUTDOWN", &json!({ "guest": false, "reason": "host-signal" }));
        assert!(!heard.power_off);
        note(&mut heard, "SHUTDOWN", &json!({ "guest": true, "reason": "guest-shutdown" }));
        assert!(heard.power_off);
    }

    #[tokio::test]
    async fn hv5_what_is_not_qmp_is_an_error_in_bounded_time() {
        for greeting in ["", "HTTP/1.1 500\n", "{\"QMP\"", "[]\n", "{}\n"] {
            let (_directory, socket) = qemu(greeting, vec![]).await;
            let (sender, _heard) = watch::channel(Heard::default());
            let outcome = Qmp::connect(&socket, own(), Duration::from_millis(300), sender).await;
            assert!(outcome.is_err(), "{greeting}");
        }
    }

    #[tokio::test]
    async fn hv5_a_line_without_end_is_cut_at_the_limit() {
        let mut endless = BufReader::new(tokio::io::repeat(b'x'));
        let error = read_line(&mut endless).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn hv2_a_socket_that_never_appears_is_an_error_by_the_deadline() {
        let (sender, _heard) = watch::channel(Heard::default());
        let error = Qmp::connect(Path::new("/nonexistent/qmp"), own(), Duration::from_millis(50), sender)
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "QEMU does not answer on /nonexistent/qmp within 50ms");
    }
}
