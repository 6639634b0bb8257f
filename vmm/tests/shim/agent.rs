//! The control channel to the guest's agent.

use crate::support::*;
use lair_guest::wire::{
    VERSION, frame,
    message::{Answer, Ask, Event, HelloReply, Phase, Request},
};
use lair_vmm::shim::{
    client::{self, ClientError},
    protocol::AgentState,
};
use std::time::Duration;
use tokio::{io::AsyncWriteExt, time::sleep};

fn connected(boot_id: &str) -> AgentState {
    AgentState::Connected { boot_id: boot_id.into() }
}

fn ready(boot_id: &str, uptime_ms: u64) -> AgentState {
    AgentState::Ready { boot_id: boot_id.into(), uptime_ms }
}

#[tokio::test]
async fn a_boot_from_init_to_ready() {
    let host = Host::new();
    let mut config = host.config("hydra");
    std::fs::write(host.path("key"), b"\x00secret\xff").unwrap();
    config.credentials.insert("signing-key".into(), host.path("key"));
    config.credentials.insert("missing".into(), host.path("missing"));
    config.outgoing = vec![to_host("store", host.path("store"))];
    config.incoming = vec![framed("web", 3000, &["host"]), raw("ssh", 22, &["host"])];
    let shim = host.start(config.clone()).await;
    let mut watch = within(client::watch(shim.control())).await.unwrap();
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, AgentState::Absent);
    // No hypervisor, then one without an agent: the shim goes on trying.
    sleep(Duration::from_millis(300)).await;
    let mut guest = Guest::new(&config);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(shim.status().await.agent, AgentState::Absent);

    guest.start_agent();
    guest.welcome("boot-1", Phase::Init).await;
    let hello = guest.hello.take().unwrap();
    assert_eq!(hello.version, VERSION);
    assert_eq!(hello.ticket.len(), 64);
    assert_eq!(
        hello.credentials.into_iter().collect::<Vec<_>>(),
        [("signing-key".into(), "AHNlY3JldP8=".into())]
    );
    assert_eq!(hello.links_out.len(), 1);
    let incoming: Vec<_> = hello.links_in.iter().map(|link| (link.name.as_str(), link.port)).collect();
    assert_eq!(incoming, [("web", 3000)], "A program that listens by itself is none of the agent's business");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    assert!(u128::from(hello.unix_ms).abs_diff(now) < 60_000);
    assert_eq!(shim.status().await.agent, AgentState::Absent);
    guest.control = None;

    guest.welcome("boot-1", Phase::Agent).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, connected("boot-1"));
    guest.say(&Event::Ready { uptime_ms: 2500 }).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, ready("boot-1", 2500));
    // A guest that repeats itself wakes nobody.
    for uptime_ms in 0..100 {
        guest.say(&Event::Ready { uptime_ms }).await;
    }
    let first = guest.ticket();
    assert_ne!(hello.ticket, first, "Each channel has its own ticket");

    guest.control = None;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, AgentState::Absent);
    guest.welcome("boot-2", Phase::Agent).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, connected("boot-2"));
    let stderr = until(async || Some(shim.stderr()).filter(|text| text.contains("missing"))).await;
    assert!(!stderr.contains("secret") && stderr.lines().count() <= 5, "{stderr}");
}

#[tokio::test]
async fn requests_reach_the_agent_and_answers_come_back() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let mut channel = guest.control.take().unwrap();
    let agent = tokio::spawn(async move {
        loop {
            let Ok(Request { id, ask }) = frame::read_message(&mut channel).await else { return };
            let answer = match ask {
                Ask::PowerOff => Answer::Failed("not now".into()),
                Ask::Reboot => return,
                _ => Answer::Done,
            };
            // An answer that nobody asked for is ignored.
            for (id, answer) in [(id + 1000, Answer::Failed("wrong".into())), (id, answer)] {
                frame::write_message(&mut channel, &Event::Reply { id, answer }).await.unwrap();
            }
        }
    });
    assert_eq!(within(client::ask(shim.control(), Ask::Ping)).await.unwrap(), Answer::Done);
    let refused = within(client::ask(shim.control(), Ask::PowerOff)).await.unwrap();
    assert_eq!(refused, Answer::Failed("not now".into()));
    // It goes away with the request.
    let lost = within(client::ask(shim.control(), Ask::Reboot)).await.unwrap_err();
    assert!(matches!(&lost, ClientError::Refused(reason) if reason.contains("lost")), "{lost}");
    within(agent).await.unwrap();
    shim.until_agent(|agent| *agent == AgentState::Absent).await;
    let absent = within(client::ask(shim.control(), Ask::Ping)).await.unwrap_err();
    assert!(matches!(&absent, ClientError::Refused(reason) if reason.contains("not connected")), "{absent}");
}

#[tokio::test]
async fn a_request_without_an_answer_fails_in_time() {
    let host = Host::new();
    let (shim, _guest) = host.start_ready(host.config("hydra")).await;
    let error = within(client::ask(shim.control(), Ask::Statistics)).await.unwrap_err();
    assert!(matches!(&error, ClientError::Refused(reason) if reason.contains("within 10 s")), "{error}");
}

/// vhost-device-vsock can lose its worker: connections stay open and nothing goes through.
#[tokio::test]
async fn an_agent_without_a_sign_of_life_is_dialled_again() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let _silent = guest.control.take();
    guest.welcome("boot-1", Phase::Agent).await;
    assert_eq!(shim.status().await.agent, connected("boot-1"));
    assert!(shim.stderr().contains("no sign of life for 15 s"), "{}", shim.stderr());
}

#[tokio::test]
async fn a_dial_that_hangs_is_given_up_but_not_closed() {
    let host = Host::new();
    let config = host.config("hydra");
    let mut guest = Guest::new(&config);
    // The guest takes connections and says nothing: the agent's program is stopped.
    guest.start_agent();
    let shim = host.start(config).await;
    let (_, _first) = guest.agent_connection().await;
    // The greeting has its own deadline; after it there is a new attempt.
    guest.welcome("boot-1", Phase::Agent).await;
    shim.until_agent(|agent| *agent == connected("boot-1")).await;
}

#[tokio::test]
async fn vs7_an_agent_of_another_version_is_not_taken() {
    let host = Host::new();
    let config = host.config("hydra");
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    let (_, mut stream) = guest.agent_connection().await;
    let old = HelloReply::Welcome { version: 99, boot_id: "boot-1".into(), phase: Phase::Agent };
    frame::write_message(&mut stream, &old).await.unwrap();
    assert_closed(&mut stream).await;
    let (_, mut stream) = guest.agent_connection().await;
    let refused = HelloReply::Refused { reason: "no\n\u{1b}thanks".into() };
    frame::write_message(&mut stream, &refused).await.unwrap();
    assert_closed(&mut stream).await;
    let (_, mut stream) = guest.agent_connection().await;
    let odd = HelloReply::Welcome { version: VERSION, boot_id: "\u{1b}[2J".into(), phase: Phase::Agent };
    frame::write_message(&mut stream, &odd).await.unwrap();
    assert_closed(&mut stream).await;
    assert_eq!(shim.status().await.agent, AgentState::Absent);
    let stderr = shim.stderr();
    assert!(stderr.contains(&format!("speaks protocol version 99, this shim speaks {VERSION}")), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "{stderr}");
}

#[tokio::test]
async fn vs4_an_event_that_is_none_ends_the_channel_and_the_next_one_works() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    for bytes in
        [&[0, 0xff, 0xff, 0xff, 0xff][..], &[0, 1, 0, 0, 0, b'{'], &[1, 0, 0, 0, 0], &[9, 9, 9, 9, 9]]
    {
        let mut channel = guest.control.take().unwrap();
        channel.write_all(bytes).await.unwrap();
        // Whatever the shim had sent before is not asked here: only that it closes.
        let mut rest = Vec::new();
        let _ = within(tokio::io::AsyncReadExt::read_to_end(&mut channel, &mut rest)).await;
        guest.welcome("boot-1", Phase::Agent).await;
        shim.until_agent(|agent| *agent == connected("boot-1")).await;
    }
}

#[tokio::test]
async fn vs5_a_flood_of_events_is_a_line_a_second() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let event = Event::ServiceEnded { service: "nix\u{1b}[2J-daemon".into(), how: "exit 1".repeat(1000) };
    let started = std::time::Instant::now();
    for _ in 0..2000 {
        guest.say(&event).await;
    }
    // An answer after them: all of them are read.
    let ask = tokio::spawn({
        let control = shim.control().to_owned();
        async move { client::ask(&control, Ask::Ping).await }
    });
    let channel = guest.control.as_mut().unwrap();
    loop {
        let Request { id, .. } = within(frame::read_message(channel)).await.unwrap();
        let reply = Event::Reply { id, answer: Answer::Done };
        frame::write_message(channel, &reply).await.unwrap();
        sleep(Duration::from_millis(20)).await;
        if ask.is_finished() {
            break;
        }
    }
    let stderr = shim.stderr();
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 2;
    assert!(stderr.lines().count() <= seconds, "{} lines in {seconds} s", stderr.lines().count());
    assert!(stderr.contains("Service nix\\u{1b}[2J-daemon") && stderr.len() < 1000 * seconds, "{stderr}");
}

#[tokio::test]
async fn a_reload_replaces_the_channel_and_keeps_the_state() {
    let host = Host::new();
    let mut config = host.config("hydra");
    let (shim, mut guest) = host.start_ready(config.clone()).await;
    let mut old = guest.control.take().unwrap();
    let before = guest.ticket();
    std::fs::write(host.path("key"), "new").unwrap();
    config.credentials.insert("key".into(), host.path("key"));
    let mut watch = within(client::watch(shim.control())).await.unwrap();
    within(watch.next()).await.unwrap().unwrap();
    shim.reload(&host, &config).await.unwrap();
    guest.welcome("boot-1", Phase::Agent).await;
    assert_eq!(guest.hello.as_ref().unwrap().credentials["key"], "bmV3");
    assert_ne!(guest.ticket(), before);
    let mut rest = Vec::new();
    within(tokio::io::AsyncReadExt::read_to_end(&mut old, &mut rest)).await.unwrap();
    // The reload is told, and no other state than before.
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, ready("boot-1", 1234));
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
}
