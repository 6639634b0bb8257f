//! The control channel to the guest's agent: opened by the host, again and again until it answers, watched by a sign
//! of life, replaced when the configuration changes.
//!
//! ```text
//!   Absent --Welcome(agent)--> Connected --Ready--> Ready
//!     ^                            |                  |
//!     '------ channel lost --------+------------------'
//! ```
//! The first half of `lair-guest`, in the initramfs, takes its greeting the same way and then ends the channel; the
//! state stays Absent. A channel that replaces one of the same boot keeps the state.
//!
//! Input is the guest's: messages are bounded, its words are cut and escaped before they are logged.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    clock::{Cause, HostClocks},
    credentials, limits,
    message::{self, MessageError},
    note::{chain, foreign},
    protocol::AgentState,
    state::{Asked, Shim, unix_ms},
    ticket::Ticket,
    vsock::DialError,
};
use lair_guest::wire::{
    AGENT_PORT, VERSION,
    frame::{self, FrameError},
    message::{Answer, Ask, Event, Features, Hello, HelloReply, HostOpen, Phase, Request},
};
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

/// Why there is no control channel, or why it ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("The agent cannot be reached")]
    Dial(#[from] DialError),
    #[error("There are no random numbers for a ticket")]
    Random(#[source] getrandom::Error),
    #[error("The agent did not take the greeting")]
    Hello(#[from] MessageError),
    #[error("The agent refused the control channel: {0}")]
    Refused(String),
    #[error("The agent speaks protocol version {0}, this shim speaks {VERSION}")]
    Version(u32),
    #[error("The agent's boot id is not one: {0}")]
    BootId(String),
    #[error("The control channel failed")]
    Frame(#[from] FrameError),
    #[error("The agent closed the control channel")]
    Closed,
    #[error("The agent gave no sign of life for {} s", limits::PING.as_secs())]
    Silent,
    #[error("The agent takes no requests")]
    Stuck,
    #[error("The first half of lair-guest asks for its credentials again, which it has had in this boot")]
    Twice,
}

impl ChannelError {
    /// Whether it is worth a line on standard error. A guest that is not up yet is not.
    fn is_news(&self) -> bool {
        !matches!(self, Self::Dial(_) | Self::Closed)
    }

    /// Whether the way to the agent is open and the agent says nothing on it.
    fn is_silence(&self) -> bool {
        matches!(self, Self::Silent | Self::Stuck | Self::Hello(MessageError::TimedOut(_)))
    }
}

/// Keeps the control channel until the shim ends.
pub(super) async fn keep(shim: &Shim) {
    let (shortest, longest) = limits::BACK_OFF;
    let mut pause = shortest;
    loop {
        let since = Instant::now();
        let error = channels(shim).await;
        shim.set_agent(None);
        shim.guest().lost();
        let heard = shim.guest().heard_unix_ms.filter(|_| error.is_silence());
        shim.observe(|seen| {
            seen.agent = AgentState::Absent;
            seen.silent_since = seen.silent_since.or(heard);
        });
        if error.is_news() {
            shim.notes.say(&chain(&error));
        }
        if since.elapsed() >= limits::LASTING {
            pause = shortest;
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(longest);
    }
}

/// Opens a channel and keeps it, and each one that takes its place for a new configuration.
async fn channels(shim: &Shim) -> ChannelError {
    let mut channel = match open(shim).await {
        Ok(channel) => channel,
        Err(error) => return error,
    };
    loop {
        let under_way = Cell::new(false);
        let mut opening = pin!(async {
            shim.renewed.notified().await;
            under_way.set(true);
            open(shim).await
        });
        let renewed = tokio::select! {
            // The agent drops the old channel as soon as it takes the new one, which may be seen first.
            error = run(shim, channel) => if under_way.get() { opening.await } else { return error },
            // The old channel is kept until the new one is open, and lost only then.
            renewed = &mut opening => renewed,
        };
        match renewed {
            Ok(new) => channel = new,
            Err(error) => return error,
        }
    }
}

/// An open control channel.
struct Channel {
    stream: UnixStream,
    boot_id: String,
    phase: Phase,
    features: Features,
}

async fn open(shim: &Shim) -> Result<Channel, ChannelError> {
    let mut stream = shim.dialer.dial(AGENT_PORT).await?;
    let ticket = Ticket::random().map_err(ChannelError::Random)?;
    let (links_out, links_in) = shim.links.for_agent();
    let hello = HostOpen::Control(Hello {
        version: VERSION,
        ticket: ticket.text().into(),
        links_out,
        links_in,
        credentials: BTreeMap::new(),
        unix_ms: unix_ms(),
        features: Features { journal: shim.journal.is_some(), ..Features::OURS },
    });
    shim.tickets().offer(ticket);
    message::send(&mut stream, &hello).await?;
    match message::receive(&mut stream).await? {
        HelloReply::Welcome { version, .. } if version != VERSION => Err(ChannelError::Version(version)),
        HelloReply::Welcome { boot_id, .. } if !is_boot_id(&boot_id) => {
            Err(ChannelError::BootId(foreign(&boot_id)))
        }
        HelloReply::Welcome { boot_id, phase, features, .. } => {
            if shim.tickets().taken(&boot_id) {
                shim.guest_rebooted();
            }
            shim.guest().contact(&boot_id, phase);
            shim.observe(|seen| seen.silent_since = None);
            Ok(Channel { stream, boot_id, phase, features })
        }
        HelloReply::Refused { reason } => Err(ChannelError::Refused(foreign(&reason))),
    }
}

/// A boot id goes into states and logs: only what one looks like is taken.
fn is_boot_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Serves one channel until it ends.
async fn run(shim: &Shim, channel: Channel) -> ChannelError {
    let Channel { mut stream, boot_id, phase, features } = channel;
    if phase == Phase::Init {
        // It takes its credentials; what comes after that is the agent.
        return credentials::deliver(shim, &mut stream, &boot_id).await;
    }
    shim.observe(|seen| {
        let same = matches!(&seen.agent, AgentState::Ready { boot_id: known, .. } if *known == boot_id);
        if !same {
            seen.agent = AgentState::Connected { boot_id: boot_id.clone() };
        }
    });
    let (requests, queue) = mpsc::channel(limits::ASKS);
    shim.set_agent(Some(requests.clone()));
    let pending = Pending::default();
    let (mut reader, mut writer) = stream.split();
    tokio::select! {
        error = events(shim, &boot_id, &mut reader, &pending) => error,
        error = send_requests(queue, &mut writer, &pending) => error,
        error = keep_in_touch(shim, &boot_id, features, &requests) => error,
    }
}

/// Requests whose answers have not come.
#[derive(Default)]
struct Pending(Mutex<HashMap<u64, oneshot::Sender<Answer>>>);

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a request, unless too many wait already.
    fn insert(&self, id: u64, answer: oneshot::Sender<Answer>) -> bool {
        let mut waiting = self.lock();
        waiting.retain(|_, answer| !answer.is_closed());
        let room = waiting.len() < limits::ASKS;
        if room {
            waiting.insert(id, answer);
        } else {
            // Whoever asked may be gone.
            let _ = answer
                .send(Answer::Failed(format!("Limit of {} unanswered requests is reached", limits::ASKS)));
        }
        room
    }
}

async fn events<R: AsyncRead + Unpin>(
    shim: &Shim,
    boot_id: &str,
    reader: &mut R,
    pending: &Pending,
) -> ChannelError {
    loop {
        let event = message::next(reader, limits::EVENT_BYTES).await;
        if matches!(event, Ok(Some(_))) {
            shim.guest().heard();
        }
        match event {
            Ok(Some(Event::Ready { uptime_ms, trace })) => {
                // Said once for a channel: a guest that repeats it changes nothing and wakes nobody.
                if matches!(shim.observed.borrow().agent, AgentState::Connected { .. }) {
                    shim.guest().ready(trace, uptime_ms);
                    shim.observe(|seen| {
                        seen.agent = AgentState::Ready { boot_id: boot_id.into(), uptime_ms };
                    });
                }
            }
            Ok(Some(Event::Journal { entries })) => {
                if let Some(journal) = &shim.journal {
                    journal.take(entries);
                }
            }
            Ok(Some(Event::Devices { report })) => {
                let news = shim.guest().devices.take(boot_id, report, Instant::now());
                if news {
                    shim.observe(|seen| seen.devices = seen.devices.wrapping_add(1));
                }
            }
            Ok(Some(Event::Unknown)) => {}
            Ok(Some(Event::ServiceEnded { service, how })) => {
                shim.notes.say(&format!(
                    "Service {} in the guest ended: {}",
                    foreign(&service),
                    foreign(&how)
                ));
            }
            Ok(Some(Event::Reply { id, answer })) => {
                if let Some(waiting) = pending.lock().remove(&id) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(answer);
                }
            }
            Ok(None) => return ChannelError::Closed,
            Err(error) => return error.into(),
        }
    }
}

async fn send_requests<W: AsyncWrite + Unpin>(
    mut queue: mpsc::Receiver<Asked>,
    writer: &mut W,
    pending: &Pending,
) -> ChannelError {
    let mut id = 0_u64;
    while let Some(Asked { ask, answer }) = queue.recv().await {
        id = id.wrapping_add(1);
        if !pending.insert(id, answer) {
            continue;
        }
        let sent = async {
            frame::write_message(writer, &Request { id, ask }).await?;
            writer.flush().await.map_err(FrameError::Io)
        };
        match timeout(limits::PING, sent).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return ChannelError::Stuck,
        }
    }
    // Whoever keeps in touch holds a sender as long as this runs.
    ChannelError::Closed
}

/// Asks for the guest's figures again and again: any answer is a sign of life. A hypervisor's vsock can die without closing anything.
/// What the figures tell of the guest's clock is acted upon, and credentials that have changed are given to it.
async fn keep_in_touch(
    shim: &Shim,
    boot_id: &str,
    features: Features,
    requests: &mpsc::Sender<Asked>,
) -> ChannelError {
    // A channel that is new may be so because the configuration is.
    let mut at_once = true;
    loop {
        let asked = HostClocks::now();
        match ask(requests, Ask::Statistics, limits::PING).await {
            Ok(Answer::Statistics(figures)) => {
                let off = shim.guest().answered(figures, asked);
                if let Some((skew_ms, cause)) = off
                    && features.set_clock
                    && let Err(error) = set_clock(shim, requests, skew_ms, cause).await
                {
                    return error;
                }
            }
            Ok(_) => {}
            Err(error) => return error,
        }
        if shim.guest().devices.news(Instant::now()) {
            shim.observe(|seen| seen.devices = seen.devices.wrapping_add(1));
        }
        if features.credentials
            && let Err(error) = credentials::renew(shim, requests, boot_id, at_once).await
        {
            return error;
        }
        at_once = false;
        sleep(limits::PING_EVERY).await;
    }
}

async fn set_clock(
    shim: &Shim,
    requests: &mpsc::Sender<Asked>,
    skew_ms: i64,
    cause: Cause,
) -> Result<(), ChannelError> {
    let why = match cause {
        Cause::Pause(ms) => format!(" after a pause of {ms} ms"),
        Cause::Off => String::new(),
    };
    let how = match ask(requests, Ask::SetClock { unix_ms: unix_ms() }, limits::PING).await? {
        Answer::Failed(reason) => format!("could not be set: {}", foreign(&reason)),
        Answer::Done | Answer::Statistics(_) => "is set".into(),
    };
    shim.notes.say(&format!("The guest's clock was off by {skew_ms} ms{why} and {how}"));
    Ok(())
}

/// Asks, and waits for the answer; without one in time the agent is silent.
pub(super) async fn ask(
    requests: &mpsc::Sender<Asked>,
    ask: Ask,
    limit: Duration,
) -> Result<Answer, ChannelError> {
    let (answer, answered) = oneshot::channel();
    let asked = async {
        // An error means that the channel is about to end anyway.
        let _ = requests.send(Asked { ask, answer }).await;
        answered.await
    };
    match timeout(limit, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        _ => Err(ChannelError::Silent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_agent_is_told_from_one_that_refuses() {
        let (requests, mut queue) = mpsc::channel(4);
        let agent = tokio::spawn(async move {
            let asked: Asked = queue.recv().await.unwrap();
            assert_eq!(asked.ask, Ask::Statistics);
            asked.answer.send(Answer::Failed("any answer is a sign of life".into())).unwrap();
            queue.recv().await
        });
        let answer = ask(&requests, Ask::Statistics, Duration::from_secs(60)).await;
        assert!(matches!(answer, Ok(Answer::Failed(_))));
        let silence = ask(&requests, Ask::Ping, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(silence, ChannelError::Silent) && silence.is_silence());
        assert!(agent.await.unwrap().is_some());
        assert!(!ChannelError::Closed.is_silence() && ChannelError::Stuck.is_silence());
    }

    #[test]
    fn unanswered_requests_are_bounded() {
        let pending = Pending::default();
        let waiting: Vec<_> = (0..100)
            .map(|id| {
                let (answer, answered) = oneshot::channel();
                (pending.insert(id, answer), answered)
            })
            .collect();
        assert_eq!(waiting.iter().filter(|(kept, _)| *kept).count(), limits::ASKS);
        drop(waiting);
        let (answer, _answered) = oneshot::channel();
        assert!(pending.insert(100, answer), "Those that were given up make room");
    }

    #[test]
    fn boot_ids_are_checked() {
        assert!(is_boot_id("0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d"));
        for bad in ["", "a b", "a\n", &"a".repeat(65), "\u{1b}[2J"] {
            assert!(!is_boot_id(bad), "{bad:?}");
        }
    }
}
