//! The control channel: the host's greeting, its requests, the agent's events.
//!
//! The newest channel is the one that counts: a host side that was restarted may have left a connection that looks
//! alive. Reading and writing are apart, so that a host that asks without reading the answers stops only itself.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    Agent, credentials,
    devices::Reports,
    power::{self, Power},
    report, statistics,
};
use crate::{clock, handshake};
use lair_guest::wire::{
    frame::{self, FrameError},
    message::{Answer, Ask, DeviceReport, Event, Features, Hello, HelloReply, JournalEntry, Phase, Request},
};
use std::sync::atomic::Ordering;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{broadcast::error::RecvError, mpsc},
};

/// How many answers may wait for a host that does not read.
const QUEUE: usize = 16;

/// Serves one control channel until it ends or a newer one comes.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    agent: &Agent,
    hello: Hello,
    mut stream: S,
) -> Result<(), FrameError> {
    let reply = handshake::answer(&hello, &agent.boot_id, Phase::Agent);
    frame::write_message(&mut stream, &reply).await?;
    if matches!(reply, HelloReply::Refused { .. }) {
        return Ok(());
    }
    let mut number = 0;
    agent.newest.send_modify(|newest| {
        *newest = newest.wrapping_add(1);
        number = *newest;
    });
    if !agent.greeted.swap(true, Ordering::Relaxed) {
        agent.trace.mark("channel");
        // The host may be of a release that does not ask for it. Later on, the guest may have a time server.
        let _ = set_clock(agent, hello.unix_ms);
    }
    agent.links.lock().await.apply(hello.ticket, hello.links_out, hello.links_in).await;

    let mut newest = agent.newest.subscribe();
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let (answers, queue) = mpsc::channel(QUEUE);
    tokio::select! {
        result = hear(agent, &mut from_host, answers) => result,
        result = speak(agent, hello.features, &mut to_host, queue) => result,
        _ = newest.wait_for(|newest| *newest != number) => Ok(()),
    }
}

/// An answer, and what is to be done once it has left.
struct Reply {
    id: u64,
    answer: Answer,
    then: Option<Power>,
}

/// Reads requests. Ends well when the host closes.
async fn hear<R: AsyncRead + Unpin>(
    agent: &Agent,
    from: &mut R,
    answers: mpsc::Sender<Reply>,
) -> Result<(), FrameError> {
    while let Some(Request { id, ask }) = frame::read_message_or_end(from).await? {
        let (answer, then) = match ask {
            Ask::Ping => (Answer::Done, None),
            Ask::Statistics => {
                // With the sign of life that the host asks for, so that a guest that nobody looks at sleeps.
                agent.devices.look();
                let figures = statistics::read(&agent.disks);
                (figures.map_or_else(|e| Answer::Failed(report::chain(&e)), Answer::Statistics), None)
            }
            Ask::PowerOff => (Answer::Done, Some(Power::Off)),
            Ask::Reboot => (Answer::Done, Some(Power::Reboot)),
            Ask::SetClock { unix_ms } => (set_clock(agent, unix_ms), None),
            Ask::Credentials(sent) => (credentials::take(agent, sent).await, None),
        };
        if answers.send(Reply { id, answer, then }).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Makes the clock follow the host's, and says so.
fn set_clock(agent: &Agent, host_unix_ms: u64) -> Answer {
    match clock::follow(host_unix_ms) {
        Ok(correction) => {
            if let Some(line) = correction.in_words() {
                agent.log.say(&line);
            }
            Answer::Done
        }
        Err(errno) => {
            let reason = format!("the clock could not be set: {errno}");
            agent.log.say(&reason);
            Answer::Failed(reason)
        }
    }
}

/// Writes answers and events.
async fn speak<W: AsyncWrite + Unpin>(
    agent: &Agent,
    features: Features,
    to: &mut W,
    mut answers: mpsc::Receiver<Reply>,
) -> Result<(), FrameError> {
    let mut ready = agent.ready.subscribe();
    // So that a state reached before is seen as a change.
    ready.mark_changed();
    let mut ended = agent.ended.subscribe();
    let mut devices = features.devices.then(|| agent.devices.reports());
    loop {
        let event = tokio::select! {
            reply = answers.recv() => {
                let Some(Reply { id, answer, then }) = reply else { return Ok(()) };
                frame::write_message(to, &Event::Reply { id, answer }).await?;
                if let Some(power) = then
                    && let Err(error) = power::ask(power, agent.own_init)
                {
                    agent.log.say(&format!("could not ask PID 1 to end the guest: {error}"));
                }
                continue;
            }
            changed = ready.changed() => match (changed, *ready.borrow_and_update()) {
                (Ok(()), Some(uptime_ms)) => Event::Ready { uptime_ms, trace: agent.trace.read() },
                _ => continue,
            },
            entries = agent.journal(), if features.journal => Event::Journal { entries },
            report = next(&mut devices) => Event::Devices { report },
            service = ended.recv() => match service {
                Ok((service, how)) => Event::ServiceEnded { service, how },
                // The host did not read for so long that the oldest are gone.
                Err(RecvError::Lagged(_) | RecvError::Closed) => continue,
            },
        };
        let mut unsent = Unsent::of(agent, &event);
        frame::write_message(to, &event).await?;
        unsent.entries = 0;
    }
}

/// The next report of devices, for a host that takes them.
async fn next(devices: &mut Option<Reports>) -> DeviceReport {
    match devices {
        Some(devices) => devices.next().await,
        None => std::future::pending().await,
    }
}

/// Entries of the journal that are being written. Where that fails, or is given up for a newer channel, they count as left out.
struct Unsent<'a> {
    agent: &'a Agent,
    entries: u64,
}

impl<'a> Unsent<'a> {
    fn of(agent: &'a Agent, event: &Event) -> Self {
        let Event::Journal { entries } = event else { return Self { agent, entries: 0 } };
        let with_dropped =
            |sum: u64, entry: &JournalEntry| sum.saturating_add(entry.dropped_before).saturating_add(1);
        Self { agent, entries: entries.iter().fold(0, with_dropped) }
    }
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.agent.journal_lost.fetch_add(self.entries, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agent;
    use super::*;
    use lair_guest::wire::{VERSION, message::GuestDevice};
    use std::{collections::BTreeMap, sync::Arc, time::Duration};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
        task::JoinHandle,
        time::timeout,
    };

    fn hello(version: u32) -> Hello {
        Hello {
            version,
            ticket: "0".repeat(64),
            links_out: vec![],
            links_in: vec![],
            credentials: BTreeMap::new(),
            unix_ms: 0,
            features: Features::default(),
        }
    }

    type Task = JoinHandle<Result<(), FrameError>>;

    fn open(agent: &Arc<Agent>, version: u32) -> (DuplexStream, Task) {
        open_as(agent, hello(version))
    }

    /// By a host that takes the journal.
    fn open_for_journal(agent: &Arc<Agent>) -> (DuplexStream, Task) {
        open_as(agent, Hello { features: Features::OURS, ..hello(VERSION) })
    }

    fn open_as(agent: &Arc<Agent>, hello: Hello) -> (DuplexStream, Task) {
        let (host, guest) = tokio::io::duplex(1 << 12);
        let agent = agent.clone();
        (host, tokio::spawn(async move { serve(&agent, hello, guest).await }))
    }

    fn entry(message: &str) -> JournalEntry {
        JournalEntry {
            message: message.into(),
            priority: 6,
            identifier: String::new(),
            unit: String::new(),
            realtime_us: 0,
            dropped_before: 0,
        }
    }

    async fn event(host: &mut DuplexStream) -> Event {
        timeout(Duration::from_secs(5), frame::read_message(host)).await.expect("no event").unwrap()
    }

    async fn welcome(host: &mut DuplexStream) {
        let reply: HelloReply = frame::read_message(host).await.unwrap();
        assert!(
            matches!(reply, HelloReply::Welcome { phase: Phase::Agent, boot_id, .. } if boot_id == "boot")
        );
    }

    #[tokio::test]
    async fn requests_are_answered_with_their_id() {
        let agent = Arc::new(agent(false));
        let (mut host, session) = open(&agent, VERSION);
        welcome(&mut host).await;
        frame::write_message(&mut host, &Request { id: 7, ask: Ask::Ping }).await.unwrap();
        assert!(matches!(event(&mut host).await, Event::Reply { id: 7, answer: Answer::Done }));
        frame::write_message(&mut host, &Request { id: 8, ask: Ask::Statistics }).await.unwrap();
        let Event::Reply { id: 8, answer: Answer::Statistics(figures) } = event(&mut host).await else {
            panic!("no figures");
        };
        assert!(figures.memory_total > figures.memory_available && figures.uptime_ms > 0);
        drop(host);
        session.await.unwrap().unwrap();
    }

    /// Only what cannot change this machine's clock is asked here: [`clock::judge`] has its own tests.
    #[tokio::test]
    async fn a_senseless_clock_of_the_host_changes_nothing() {
        let agent = Arc::new(agent(false));
        let (mut host, _session) = open(&agent, VERSION);
        welcome(&mut host).await;
        let before = clock::unix_ms();
        frame::write_message(&mut host, &Request { id: 1, ask: Ask::SetClock { unix_ms: 0 } }).await.unwrap();
        assert!(matches!(event(&mut host).await, Event::Reply { id: 1, answer: Answer::Done }));
        assert!(clock::unix_ms() >= before);
    }

    #[tokio::test]
    async fn readiness_is_said_once_on_every_channel() {
        let agent = Arc::new(agent(false));
        let (mut first, _task) = open(&agent, VERSION);
        welcome(&mut first).await;
        agent.set_ready();
        let Event::Ready { uptime_ms: 1.., trace } = event(&mut first).await else { panic!("not ready") };
        assert_eq!(trace[0].name, "kernel");
        agent.set_ready();
        assert!(timeout(Duration::from_millis(50), first.read_u8()).await.is_err(), "said twice");

        let (mut second, _task) = open(&agent, VERSION);
        welcome(&mut second).await;
        assert!(matches!(event(&mut second).await, Event::Ready { .. }));
        agent.ended.send(("daemon".into(), "exit status 1".into())).unwrap();
        assert!(
            matches!(event(&mut second).await, Event::ServiceEnded { service, .. } if service == "daemon")
        );
    }

    #[tokio::test]
    async fn the_journal_waits_for_a_host_that_knows_it() {
        let agent = Arc::new(agent(true));
        agent.journal_source.send(entry("one")).await.unwrap();
        // A host of the first release, with its own greeting.
        let hello = format!(
            r#"{{"version":{VERSION},"ticket":"t","links_out":[],"links_in":[],"credentials":{{"key":"c2Vj"}},"unix_ms":0}}"#
        );
        let (mut old, _task) = open_as(&agent, serde_json::from_str(&hello).unwrap());
        welcome(&mut old).await;
        frame::write_message(&mut old, &Request { id: 1, ask: Ask::Ping }).await.unwrap();
        assert!(matches!(event(&mut old).await, Event::Reply { .. }));
        let (mut host, _task) = open_for_journal(&agent);
        welcome(&mut host).await;
        assert!(matches!(event(&mut host).await, Event::Journal { entries } if entries[0].message == "one"));
        for _ in 0..20 {
            agent.journal_source.send(entry("more")).await.unwrap();
        }
        let mut count = 0;
        while count < 20 {
            let Event::Journal { entries } = event(&mut host).await else { panic!("no journal") };
            count += entries.len();
        }
    }

    #[tokio::test]
    async fn vs7_devices_are_told_on_each_channel_of_a_host_that_knows_them() {
        let agent = Arc::new(agent(false));
        agent.devices.found(GuestDevice {
            address: "0000:01:00.0".into(),
            vendor: 0x10de,
            device: 0x2684,
            class: 0x03_00_00,
            driver: None,
            port: None,
        });
        let (mut old, _task) = open(&agent, VERSION);
        welcome(&mut old).await;
        frame::write_message(&mut old, &Request { id: 1, ask: Ask::Ping }).await.unwrap();
        assert!(matches!(event(&mut old).await, Event::Reply { .. }));
        for _ in 0..2 {
            let (mut host, _task) = open_as(&agent, Hello { features: Features::OURS, ..hello(VERSION) });
            welcome(&mut host).await;
            let Event::Devices { report } = event(&mut host).await else { panic!("no devices") };
            assert_eq!(report.devices[0].vendor, 0x10de);
        }
    }

    #[tokio::test]
    async fn vs7_entries_that_a_lost_channel_took_with_it_are_counted() {
        let agent = Arc::new(agent(true));
        let all = agent.journal_source.capacity();
        // Longer than what the channel holds: the host is gone, or has a newer channel, while they are written.
        for leaves in [true, false] {
            let (mut host, task) = open_for_journal(&agent);
            welcome(&mut host).await;
            let long = JournalEntry { dropped_before: 2, ..entry(&"x".repeat(8000)) };
            agent.journal_source.send(long).await.unwrap();
            while agent.journal_source.capacity() < all {
                tokio::task::yield_now().await;
            }
            if leaves {
                drop(host);
                let _ = timeout(Duration::from_secs(20), task).await.unwrap().unwrap();
            }
            let (mut next, _task) = open_for_journal(&agent);
            welcome(&mut next).await;
            for dropped in [3, 0] {
                agent.journal_source.send(entry("after")).await.unwrap();
                let Event::Journal { entries } = event(&mut next).await else { panic!("no journal") };
                assert_eq!((entries.len(), entries[0].dropped_before), (1, dropped));
            }
        }
    }

    #[tokio::test]
    async fn vs7_the_newest_channel_wins() {
        let agent = Arc::new(agent(false));
        let (mut first, first_task) = open(&agent, VERSION);
        welcome(&mut first).await;
        let (mut second, second_task) = open(&agent, VERSION);
        welcome(&mut second).await;
        timeout(Duration::from_secs(5), first_task).await.unwrap().unwrap().unwrap();
        assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
        frame::write_message(&mut second, &Request { id: 1, ask: Ask::Ping }).await.unwrap();
        event(&mut second).await;
        assert!(!second_task.is_finished());
    }

    #[tokio::test]
    async fn vs7_a_refused_greeting_does_not_end_the_channel_in_use() {
        let agent = Arc::new(agent(false));
        let (mut first, first_task) = open(&agent, VERSION);
        welcome(&mut first).await;
        let (mut other, other_task) = open(&agent, VERSION + 1);
        let reply: HelloReply = frame::read_message(&mut other).await.unwrap();
        assert!(matches!(reply, HelloReply::Refused { .. }));
        other_task.await.unwrap().unwrap();
        assert!(!first_task.is_finished());
    }

    #[tokio::test]
    async fn vs4_an_unexpected_frame_ends_the_channel() {
        for bytes in [&b"\x01\x01\0\0\0x"[..], b"\0\x02\0\0\0{}", b"\0\0\0\0\0", b"\0\xff\xff\xff\xff"] {
            let agent = Arc::new(agent(false));
            let (mut host, task) = open(&agent, VERSION);
            welcome(&mut host).await;
            host.write_all(bytes).await.unwrap();
            assert!(timeout(Duration::from_secs(5), task).await.unwrap().unwrap().is_err(), "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn vs8_a_host_that_asks_without_reading_is_not_buffered_for_ever() {
        let agent = Arc::new(agent(false));
        let (mut host, _task) = open(&agent, VERSION);
        let flood = async {
            for id in 0..100_000 {
                frame::write_message(&mut host, &Request { id, ask: Ask::Statistics }).await.unwrap();
            }
        };
        assert!(timeout(Duration::from_millis(500), flood).await.is_err(), "no back-pressure");
    }
}
