//! The guest's journal, for the host: what systemd's journald gets, entry by entry.
//!
//! `journalctl --follow` reads it: the journal's files have a format of many versions, compressions and locks, and the program that comes with
//! the guest's journald knows its own. While the host does not take entries nothing is read: journalctl waits, and the journal itself is the
//! buffer. What comes faster than [`RATE`] is left out and counted.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{Agent, bucket::Bucket, log::MAX_LINE};
use crate::paths;
use lair_guest::wire::message::JournalEntry;
use serde::Deserialize;
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, BufReader},
    process::Command,
    sync::mpsc,
};

/// How many entries may wait for the host beyond those in the journal.
pub(super) const QUEUE: usize = 64;

/// The most entries in one message: each is below 9 KiB in JSON, and the host takes 64 KiB.
pub(super) const BATCH: usize = 7;

/// So many entries at once, then one in each interval.
const RATE: (u32, Duration) = (1000, Duration::from_millis(10));

/// The longest line of journalctl, in bytes. It leaves out fields of more than 4096.
const MAX_JSON: usize = 128 << 10;

/// The longest name of a program or a unit, in bytes.
const MAX_NAME: usize = 256;

/// The shortest and the longest wait before journalctl is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How often it is noted how far the journal has been told. An agent that is started again repeats what came since.
const NOTE_EVERY: Duration = Duration::from_secs(5);

/// Where journald keeps the journal: in memory at first, then on the disk if it is to last.
const FOLDERS: [&str; 2] = ["/run/log/journal", "/var/log/journal"];

/// How often it is looked for the journal while the system starts.
const LOOK: Duration = Duration::from_secs(1);

/// Follows the journal until the agent ends; not where there is none.
pub(super) async fn follow(agent: Arc<Agent>, entries: mpsc::Sender<JournalEntry>) {
    let follower = Follower::new("journalctl", paths::JOURNAL_CURSOR.into(), entries);
    follow_in(&FOLDERS.map(PathBuf::from), follower, &agent).await;
}

/// journalctl does not see a folder that is made after its start. So it is started when there is one, and again when the system is
/// up: by then the journal has moved to the disk, if it does.
async fn follow_in(folders: &[PathBuf], mut follower: Follower, agent: &Agent) {
    let mut ready = agent.ready.subscribe();
    while !folders.iter().any(|folder| folder.exists()) {
        if ready.borrow().is_some() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
    let mut started_for_good = ready.borrow().is_some();
    let mut wait = BACK_OFF.0;
    loop {
        let started = Instant::now();
        let ended = tokio::select! {
            ended = follower.run(agent) => ended,
            // An entry that is on its way is read again.
            Ok(_) = ready.wait_for(Option::is_some), if !started_for_good => {
                started_for_good = true;
                continue;
            }
        };
        match ended {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return agent.log.say("there is no journalctl: the journal is not told to the host");
            }
            // The program may come with the next configuration of the system.
            Ok(()) | Err(_) => {}
        }
        wait =
            if started.elapsed() > BACK_OFF.1 { BACK_OFF.0 } else { wait.saturating_mul(2).min(BACK_OFF.1) };
        tokio::time::sleep(wait).await;
    }
}

struct Follower {
    program: PathBuf,
    /// Where it is noted how far the journal has been told.
    cursor_file: PathBuf,
    cursor: Option<String>,
    noted: Instant,
    bucket: Bucket,
    entries: mpsc::Sender<JournalEntry>,
}

impl Follower {
    fn new(program: &str, cursor_file: PathBuf, entries: mpsc::Sender<JournalEntry>) -> Self {
        let cursor = fs::read_to_string(&cursor_file).ok().filter(|cursor| is_cursor(cursor));
        let now = Instant::now();
        let bucket = Bucket::new(RATE.0, RATE.1, now);
        Self { program: program.into(), cursor_file, cursor, noted: now, bucket, entries }
    }

    /// Runs journalctl once, to its end.
    async fn run(&mut self, agent: &Agent) -> io::Result<()> {
        let mut command = Command::new(&self.program);
        command.args([
            "--follow",
            "--no-tail",
            "--boot",
            "--quiet",
            "--no-pager",
            "--output=json",
            "--output-fields=MESSAGE,PRIORITY,SYSLOG_IDENTIFIER,_COMM,_SYSTEMD_UNIT",
        ]);
        if let Some(cursor) = &self.cursor {
            command.arg(format!("--after-cursor={cursor}"));
        }
        command.env_clear().envs(agent.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn()?;
        if let Some(stdout) = child.stdout.take() {
            self.read(&mut BufReader::new(stdout)).await?;
        }
        child.wait().await.map(drop)
    }

    async fn read<R: AsyncBufRead + Unpin>(&mut self, from: &mut R) -> io::Result<()> {
        let mut line = Vec::new();
        while let Some(whole) = next_line(from, &mut line).await? {
            let parsed = if whole { serde_json::from_slice::<Raw>(&line).ok() } else { None };
            let Some(raw) = parsed else { continue };
            let cursor = raw.cursor.clone().filter(|cursor| is_cursor(cursor));
            if let Some(dropped_before) = self.bucket.take(Instant::now()) {
                // The wait for the host is here. There is one as long as the agent runs.
                let _ = self.entries.send(raw.entry(dropped_before)).await;
            }
            self.cursor = cursor.or(self.cursor.take());
            if self.noted.elapsed() >= NOTE_EVERY {
                self.noted = Instant::now();
                self.note();
            }
        }
        Ok(())
    }

    /// Notes how far the journal has been told. Without it an agent that is started again repeats this boot's.
    fn note(&self) {
        let Some(cursor) = &self.cursor else { return };
        let write = |path: &Path| {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
            file.write_all(cursor.as_bytes())
        };
        let _ = write(&self.cursor_file);
    }
}

/// A cursor becomes an argument: only what one looks like is taken.
fn is_cursor(text: &str) -> bool {
    (1..=512).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"=;-".contains(&byte))
}

/// Reads one line without its end; whether it is whole, or what is longer than [`MAX_JSON`] is missing. `None` at the end.
async fn next_line<R: AsyncBufRead + Unpin>(from: &mut R, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    let mut whole = true;
    loop {
        let buffer = from.fill_buf().await?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let (part, ended) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => (buffer.get(..end).unwrap_or_default(), true),
            None => (buffer, false),
        };
        whole &= line.len().saturating_add(part.len()) <= MAX_JSON;
        if whole {
            line.extend_from_slice(part);
        }
        let taken = part.len().saturating_add(usize::from(ended));
        from.consume(taken);
        if ended {
            return Ok(Some(whole));
        }
    }
}

/// An entry as journalctl writes it (systemd's "Journal Export Formats", JSON).
#[derive(Debug, Deserialize)]
struct Raw {
    #[serde(rename = "MESSAGE", default)]
    message: Option<Field>,
    #[serde(rename = "PRIORITY", default)]
    priority: Option<Field>,
    #[serde(rename = "SYSLOG_IDENTIFIER", default)]
    identifier: Option<Field>,
    #[serde(rename = "_COMM", default)]
    program: Option<Field>,
    #[serde(rename = "_SYSTEMD_UNIT", default)]
    unit: Option<Field>,
    #[serde(rename = "__REALTIME_TIMESTAMP", default)]
    realtime: Option<Field>,
    #[serde(rename = "__CURSOR", default)]
    cursor: Option<String>,
}

/// Text; bytes where it is none; a list where an entry has the field several times.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Field {
    Text(String),
    Bytes(Vec<u8>),
    Several(Vec<Field>),
}

impl Field {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Self::Several(fields) => fields.into_iter().next().map(Self::text).unwrap_or_default(),
        }
    }
}

impl Raw {
    fn entry(self, dropped_before: u64) -> JournalEntry {
        let number = |field: Option<Field>| field.map(Field::text).and_then(|text| text.parse().ok());
        let name = |field: Option<Field>| field.map(|field| clean(&field.text(), MAX_NAME));
        JournalEntry {
            message: match self.message {
                Some(field) => clean(&field.text(), MAX_LINE),
                // journalctl's way to say so.
                None => "[a message of more than 4096 bytes]".into(),
            },
            priority: number(self.priority).and_then(|number| u8::try_from(number).ok()).unwrap_or(6),
            identifier: name(self.identifier).or(name(self.program)).unwrap_or_default(),
            unit: name(self.unit).unwrap_or_default(),
            realtime_us: number(self.realtime).unwrap_or_default(),
            dropped_before,
        }
    }
}

/// At most so many bytes of a text, without what a terminal would obey.
fn clean(text: &str, longest: usize) -> String {
    let end = (0..=longest.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    let kept = text.get(..end).unwrap_or_default().trim_end();
    kept.chars().map(|c| if c.is_control() && c != '\t' && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::agent;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn follower(dir: &Path, program: &str) -> (Follower, mpsc::Receiver<JournalEntry>) {
        let (entries, receiver) = mpsc::channel(QUEUE);
        (Follower::new(program, dir.join("cursor"), entries), receiver)
    }

    async fn read(text: &[u8]) -> Vec<JournalEntry> {
        let dir = tempfile::tempdir().unwrap();
        let (mut follower, mut entries) = follower(dir.path(), "none");
        follower.read(&mut &text[..]).await.unwrap();
        drop(follower);
        let mut all = Vec::new();
        while let Some(entry) = entries.recv().await {
            all.push(entry);
        }
        all
    }

    #[tokio::test]
    async fn entries_are_read_as_journalctl_writes_them() {
        let text = concat!(
            r#"{"__CURSOR":"s=1;i=2","__REALTIME_TIMESTAMP":"1700000000000001","PRIORITY":"3","MESSAGE":"broken\nin two","#,
            r#""SYSLOG_IDENTIFIER":"nginx","_SYSTEMD_UNIT":"nginx.service","LAIR_VM":"other"}"#,
            "\n",
            r#"{"MESSAGE":[104,105,27,255],"_COMM":["a","b"],"PRIORITY":"300"}"#,
            "\nno json\n",
            r#"{"MESSAGE":null,"__REALTIME_TIMESTAMP":7}"#,
            "\n",
            r#"{"MESSAGE":null}"#,
            "\n",
        );
        let entries = read(text.as_bytes()).await;
        let entry = |message: &str, priority, identifier: &str, unit: &str, realtime_us| JournalEntry {
            message: message.into(),
            priority,
            identifier: identifier.into(),
            unit: unit.into(),
            realtime_us,
            dropped_before: 0,
        };
        assert_eq!(
            entries,
            [
                entry("broken\nin two", 3, "nginx", "nginx.service", 1_700_000_000_000_001),
                entry("hi\u{fffd}\u{fffd}", 6, "a", "", 0),
                entry("[a message of more than 4096 bytes]", 6, "", "", 0),
            ]
        );
    }

    #[tokio::test]
    async fn vs5_long_lines_and_fields_are_cut() {
        let long = "ä".repeat(MAX_LINE);
        let text = format!(
            "{}\n{{\"MESSAGE\":\"{long}\",\"_COMM\":\"{long}\"}}\n{{\"MESSAGE\":\"cut",
            "x".repeat(MAX_JSON + 1)
        );
        let entries = read(text.as_bytes()).await;
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].message.len(), entries[0].identifier.len()), (MAX_LINE, MAX_NAME));
        // A batch of the worst is a message that the host takes.
        let worst = JournalEntry { message: "\u{fffd}".repeat(MAX_LINE / 3), ..entries[0].clone() };
        let quotes = JournalEntry {
            message: "\"".repeat(MAX_LINE),
            identifier: "\"".repeat(MAX_NAME),
            ..worst.clone()
        };
        for entry in [worst, quotes] {
            assert!(serde_json::to_vec(&vec![entry; BATCH]).unwrap().len() < 60 << 10);
        }
    }

    #[tokio::test]
    async fn vs5_a_flood_is_cut_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (mut follower, mut entries) = follower(dir.path(), "none");
        let taken = tokio::spawn(async move {
            let (mut passed, mut dropped) = (0, 0);
            while let Some(entry) = entries.recv().await {
                passed += 1;
                dropped += entry.dropped_before;
            }
            (passed, dropped)
        });
        let flood = "{\"MESSAGE\":\"x\"}\n".repeat(20_000);
        follower.read(&mut flood.as_bytes()).await.unwrap();
        tokio::time::sleep(2 * RATE.1).await;
        follower.read(&mut &b"{\"MESSAGE\":\"last\"}\n"[..]).await.unwrap();
        drop(follower);
        let (passed, dropped) = taken.await.unwrap();
        assert_eq!(passed + dropped, 20_001);
        assert!(passed >= 1000 && dropped > 1000, "{passed} and {dropped}");
    }

    #[tokio::test]
    async fn a_host_that_does_not_take_entries_stops_the_reading() {
        let dir = tempfile::tempdir().unwrap();
        let (mut follower, mut entries) = follower(dir.path(), "none");
        let text = "{\"MESSAGE\":\"x\"}\n".repeat(QUEUE + 10);
        let reading = tokio::spawn(async move { follower.read(&mut text.as_bytes()).await.unwrap() });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!reading.is_finished());
        let mut count = 0;
        while let Some(entry) = entries.recv().await {
            assert_eq!(entry.dropped_before, 0);
            count += 1;
        }
        assert_eq!(count, QUEUE + 10);
    }

    #[tokio::test]
    async fn journalctl_is_started_for_a_journal_and_again_when_the_system_is_up() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("journalctl");
        let script = "#!/bin/sh\necho \"$*\" >>\"$0.said\"\n\
                      echo '{\"MESSAGE\":\"x\",\"__CURSOR\":\"s=1;i=7\"}'\nexec sleep 300\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let agent = Arc::new(agent(true));
        let (follower, mut entries) = follower(dir.path(), program.to_str().unwrap());
        let (folder, following) = (dir.path().join("journal"), agent.clone());
        let folders = [folder.clone(), dir.path().join("never")];
        let task = tokio::spawn(async move { follow_in(&folders, follower, &following).await });
        tokio::time::sleep(2 * LOOK).await;
        let said = || fs::read_to_string(dir.path().join("journalctl.said")).unwrap_or_default();
        assert_eq!(said(), "", "There is no journal yet");
        fs::create_dir(folder).unwrap();
        let next = async |entries: &mut mpsc::Receiver<JournalEntry>| {
            tokio::time::timeout(Duration::from_secs(20), entries.recv()).await.expect("no entry").unwrap()
        };
        next(&mut entries).await;
        agent.set_ready();
        next(&mut entries).await;
        let runs = said();
        let runs: Vec<_> = runs.lines().map(|line| line.contains("--after-cursor=s=1;i=7")).collect();
        assert_eq!(runs, [false, true]);
        assert!(!task.is_finished());
        task.abort();
    }

    #[tokio::test]
    async fn a_system_without_a_journal_is_not_asked_for_it_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(true);
        agent.set_ready();
        let (follower, _entries) = follower(dir.path(), "/nonexistent/journalctl");
        follow_in(&[dir.path().join("never")], follower, &agent).await;
        let (follower, _entries) = super::tests::follower(dir.path(), "/nonexistent/journalctl");
        follow_in(&[dir.path().into()], follower, &agent).await;
    }

    #[tokio::test]
    async fn the_next_run_goes_on_where_this_one_ended() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("journalctl");
        let script = "#!/bin/sh\necho \"$*\" >>\"$0.said\"\necho '{\"MESSAGE\":\"x\",\"__CURSOR\":\"s=1;i=7\"}'\n\
                      echo '{\"MESSAGE\":\"y\",\"__CURSOR\":\"--evil\"}'\n";
        fs::write(&program, script.replace("--evil", "x y")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let program = program.to_str().unwrap();
        let agent = agent(true);
        let (mut follower, _entries) = follower(dir.path(), program);
        for _ in 0..2 {
            follower.run(&agent).await.unwrap();
        }
        follower.note();
        let (mut next, _entries) = super::tests::follower(dir.path(), program);
        next.run(&agent).await.unwrap();
        let said = fs::read_to_string(dir.path().join("journalctl.said")).unwrap();
        let cursors: Vec<_> = said.lines().map(|line| line.split(' ').nth(7)).collect();
        assert_eq!(cursors, [None, Some("--after-cursor=s=1;i=7"), Some("--after-cursor=s=1;i=7")]);
        let (mut none, _entries) = super::tests::follower(dir.path(), "/nonexistent/journalctl");
        assert_eq!(none.run(&agent).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
