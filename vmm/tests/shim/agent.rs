//! The control channel to the guest's agent.

use crate::support::*;
use lair_guest::wire::{
    VERSION, frame,
    message::{
        Answer, Ask, DeviceFault, DeviceReport, Event, Fault, Features, GpuFigures, GuestDevice, HelloReply,
        JournalEntry, Moment, Phase, Request, Statistics,
    },
};
use lair_vmm::{
    shim::{
        client::{self, ClientError},
        config::JournalTarget,
        protocol::AgentState,
    },
    vm::trace::{self, Start},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixDatagram, UnixListener},
    time::sleep,
};

fn connected(boot_id: &str) -> AgentState {
    AgentState::Connected { boot_id: boot_id.into() }
}

fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

fn ready(boot_id: &str, uptime_ms: u64) -> AgentState {
    AgentState::Ready { boot_id: boot_id.into(), uptime_ms }
}

#[tokio::test]
async fn a_boot_from_init_to_ready() {
    let host = Host::new();
    let mut config = host.config("hydra");
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
    assert_eq!(hello.links_out.len(), 1);
    let incoming: Vec<_> = hello.links_in.iter().map(|link| (link.name.as_str(), link.port)).collect();
    assert_eq!(incoming, [("web", 3000)], "A program that listens by itself is none of the agent's business");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    assert!(u128::from(hello.unix_ms).abs_diff(now) < 60_000);
    assert_eq!(shim.status().await.agent, AgentState::Absent);
    guest.control = None;

    guest.welcome("boot-1", Phase::Agent).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, connected("boot-1"));
    let moment = |name: &str, at_ms| Moment { name: name.into(), at_ms };
    let trace = vec![moment("kernel", 0), moment("\u{1b}[2J", 7)];
    guest.say(&Event::Ready { uptime_ms: 2500, trace }).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, ready("boot-1", 2500));
    // A guest that repeats itself wakes nobody.
    for uptime_ms in 0..100 {
        guest.say(&Event::Ready { uptime_ms, trace: vec![] }).await;
    }
    let times = shim.status().await.times;
    let names = |moments: &[Moment]| -> Vec<String> { moments.iter().map(|m| m.name.clone()).collect() };
    assert_eq!(names(&times.host), ["shim", "init", "agent", "ready"]);
    assert_eq!(times.guest, [moment("kernel", 0), moment("\\u{1b}[2J", 7), moment("ready", 2500)]);
    let first = guest.ticket();
    assert_ne!(hello.ticket, first, "Each channel has its own ticket");

    guest.control = None;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, AgentState::Absent);
    guest.welcome("boot-2", Phase::Agent).await;
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, connected("boot-2"));
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
    let mut watch = within(client::watch(shim.control())).await.unwrap();
    assert_eq!(within(watch.next()).await.unwrap().unwrap().silent_since_unix_ms, None);
    // Watchers hear of it: whoever can replace the device has to know.
    let silent = within(watch.next()).await.unwrap().unwrap();
    assert_eq!(silent.agent, AgentState::Absent);
    let since = silent.silent_since_unix_ms.expect("Silent since when?");
    assert!(since > 0 && since < unix_ms(), "{since}");
    guest.welcome("boot-1", Phase::Agent).await;
    shim.until_agent(|agent| *agent == connected("boot-1")).await;
    assert_eq!(shim.status().await.silent_since_unix_ms, None);
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
    let old = HelloReply::Welcome {
        version: 99,
        boot_id: "boot-1".into(),
        phase: Phase::Agent,
        features: Features::default(),
    };
    frame::write_message(&mut stream, &old).await.unwrap();
    assert_closed(&mut stream).await;
    let (_, mut stream) = guest.agent_connection().await;
    let refused = HelloReply::Refused { reason: "no\n\u{1b}thanks".into() };
    frame::write_message(&mut stream, &refused).await.unwrap();
    assert_closed(&mut stream).await;
    let (_, mut stream) = guest.agent_connection().await;
    let odd = HelloReply::Welcome {
        version: VERSION,
        boot_id: "\u{1b}[2J".into(),
        phase: Phase::Agent,
        features: Features::default(),
    };
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
    config.outgoing = vec![to_host("store", host.path("store"))];
    let mut watch = within(client::watch(shim.control())).await.unwrap();
    within(watch.next()).await.unwrap().unwrap();
    shim.reload(&host, &config).await.unwrap();
    guest.welcome("boot-1", Phase::Agent).await;
    assert_eq!(guest.hello.as_ref().unwrap().links_out.len(), 1);
    assert_ne!(guest.ticket(), before);
    let mut rest = Vec::new();
    within(tokio::io::AsyncReadExt::read_to_end(&mut old, &mut rest)).await.unwrap();
    // The reload is told, and no other state than before.
    assert_eq!(within(watch.next()).await.unwrap().unwrap().agent, ready("boot-1", 1234));
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
}

/// As each laird does that starts.
#[tokio::test]
async fn a_reload_of_the_same_configuration_leaves_the_channel_alone() {
    let host = Host::new();
    let config = host.config("hydra");
    let (shim, mut guest) = host.start_ready(config.clone()).await;
    shim.reload(&host, &config).await.unwrap();
    let dialled = tokio::time::timeout(Duration::from_millis(500), guest.agent_connection()).await;
    assert!(dialled.is_err(), "the guest was dialled again");
    let asked = answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 1).await;
    assert_eq!(asked, [Ask::Statistics]);
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
}

/// Answers everything that is asked on the channel, with these figures; what was asked.
async fn answer_with(guest: &mut Guest, figures: Statistics, asks: usize) -> Vec<Ask> {
    let mut asked = Vec::new();
    while asked.len() < asks {
        let channel = guest.control.as_mut().unwrap();
        let Request { id, ask } = within(frame::read_message(channel)).await.unwrap();
        let answer = match ask {
            Ask::Statistics => Answer::Statistics(figures.clone()),
            _ => Answer::Done,
        };
        guest.say(&Event::Reply { id, answer }).await;
        asked.push(ask);
    }
    asked
}

#[tokio::test]
async fn figures_come_with_the_signs_of_life_and_a_wrong_clock_is_set() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let behind = Statistics {
        memory_total: 7,
        uptime_ms: 2000,
        unix_ms: unix_ms() - 3_600_000,
        ..Statistics::default()
    };
    let asked = answer_with(&mut guest, behind, 2).await;
    assert_eq!(asked[0], Ask::Statistics);
    let Ask::SetClock { unix_ms: told } = asked[1] else { panic!("{asked:?}") };
    assert!(told.abs_diff(unix_ms()) < 60_000);
    let status = shim.status().await;
    let figures = status.figures.unwrap();
    assert_eq!(figures.statistics.memory_total, 7);
    assert!(figures.clock_skew_ms.abs_diff(3_600_000) < 60_000, "{}", figures.clock_skew_ms);
    let start = status.times.guest_start_ms.unwrap();
    let names: Vec<_> =
        trace::merge(&Start::default(), Some(&status.times)).into_iter().map(|point| point.name).collect();
    assert!(start > 0 && names.contains(&"ready".to_owned()), "{names:?}");
    until(async || shim.stderr().contains("clock was off by").then_some(())).await;
}

/// It knows no request but the first release's, and one that it does not know would end the channel.
#[tokio::test]
async fn vs7_an_old_agent_is_asked_nothing_that_it_does_not_know() {
    let host = Host::new();
    let config = host.config("hydra");
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    let (_, mut stream) = guest.agent_connection().await;
    let old = br#"{"hello":"welcome","version":1,"boot_id":"boot-1","phase":"agent"}"#;
    frame::write(&mut stream, frame::Kind::Message, old).await.unwrap();
    guest.control = Some(stream);
    frame::write(
        guest.control.as_mut().unwrap(),
        frame::Kind::Message,
        br#"{"event":"ready","uptime_ms":9}"#,
    )
    .await
    .unwrap();
    // Its clock is wrong as well, and it is left alone.
    let old = br#"{"event":"reply","id":1,"answer":{"statistics":{"memory_total":7,"memory_available":3,"load_thousandths":[1,2,3],"uptime_ms":9,"unix_ms":9}}}"#;
    let channel = guest.control.as_mut().unwrap();
    let Request { id: 1, ask: Ask::Statistics } = within(frame::read_message(channel)).await.unwrap() else {
        panic!("Not the figures")
    };
    frame::write(channel, frame::Kind::Message, old).await.unwrap();
    let asked = answer_with(&mut guest, Statistics::default(), 1).await;
    assert_eq!(asked, [Ask::Statistics]);
    let status = shim.status().await;
    assert_eq!(status.agent, ready("boot-1", 9));
    assert_eq!(status.figures.unwrap().statistics.tasks, 0);
}

#[tokio::test]
async fn vs7_what_a_newer_agent_says_is_let_pass() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let newer = br#"{"event":"weather","sun":true}"#;
    frame::write(guest.control.as_mut().unwrap(), frame::Kind::Message, newer).await.unwrap();
    let asked = answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 2).await;
    assert_eq!(asked, [Ask::Statistics, Ask::Statistics]);
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
}

#[tokio::test]
async fn vs7_an_agent_that_comes_twice_has_one_channel() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    // It was started again: its old connection goes, the next one is of the same boot, and readiness is said anew.
    for _ in 0..3 {
        guest.control = None;
        guest.welcome("boot-1", Phase::Agent).await;
        shim.until_agent(|agent| *agent == connected("boot-1")).await;
        guest.say(&Event::Ready { uptime_ms: 1234, trace: vec![] }).await;
        shim.until_agent(|agent| *agent == ready("boot-1", 1234)).await;
    }
    let answered =
        answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 1).await;
    assert_eq!(answered, [Ask::Statistics]);
    let marks: Vec<_> = shim.status().await.times.host.into_iter().map(|moment| moment.name).collect();
    assert_eq!(marks, ["shim", "agent", "ready"], "One boot, however often its agent came");
}

/// The shim has no say in how long a boot may take (that deadline is the supervisor's); it only never invents a state.
#[tokio::test]
async fn vs7_an_agent_that_never_comes_is_absent() {
    let host = Host::new();
    let config = host.config("hydra");
    let _guest = Guest::new(&config);
    let shim = host.start(config).await;
    sleep(Duration::from_secs(2)).await;
    let status = shim.status().await;
    assert_eq!((status.agent, status.silent_since_unix_ms), (AgentState::Absent, None));
    assert!(status.figures.is_none() && status.times.guest.is_empty());
    assert_eq!(shim.stderr(), "");
}

fn journal_entry(message: &str) -> JournalEntry {
    JournalEntry {
        message: message.into(),
        priority: 3,
        identifier: "nginx".into(),
        unit: String::new(),
        realtime_us: 7,
        dropped_before: 0,
    }
}

#[tokio::test]
async fn the_guests_journal_reaches_the_hosts() {
    let host = Host::new();
    let mut config = host.config("hydra");
    let target =
        JournalTarget { socket: host.path("journal"), log: host.path("journal.log"), limit: 1 << 20 };
    config.journal = Some(target.clone());
    let journal = UnixDatagram::bind(&target.socket).unwrap();
    let (_shim, mut guest) = host.start_ready(config).await;
    assert!(guest.hello.as_ref().unwrap().features.journal);
    guest.say(&Event::Journal { entries: vec![journal_entry("hello"), journal_entry("again")] }).await;
    let mut datagram = vec![0; 1 << 16];
    for message in ["hello", "again"] {
        let length = within(journal.recv(&mut datagram)).await.unwrap();
        let text = String::from_utf8_lossy(&datagram[..length]).into_owned();
        assert!(text.starts_with("LAIR_VM\n\u{5}\0\0\0\0\0\0\0hydra\n"), "{text:?}");
        assert!(text.contains("hydra/nginx") && text.contains(message), "{text:?}");
    }
    assert!(!target.log.exists());
}

#[tokio::test]
async fn vs5_a_flooded_journal_is_bounded_and_nothing_else_waits_for_it() {
    let host = Host::new();
    let mut config = host.config("hydra");
    // The host has no journal.
    let target = JournalTarget { socket: host.path("none"), log: host.path("journal.log"), limit: 64 << 20 };
    config.journal = Some(target.clone());
    let (shim, mut guest) = host.start_ready(config).await;
    let before = shim.resident_kib();
    let flood = Event::Journal { entries: vec![journal_entry(&"x".repeat(2000)); 20] };
    for _ in 0..2000 {
        guest.say(&flood).await;
    }
    let asked = answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 1).await;
    assert_eq!(asked, [Ask::Statistics]);
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
    assert!(shim.resident_kib() < before + 16_384, "{before} to {} KiB", shim.resident_kib());
    sleep(Duration::from_millis(1100)).await;
    guest.say(&Event::Journal { entries: vec![journal_entry("after the flood")] }).await;
    let text = || std::fs::read_to_string(&target.log).unwrap_or_default();
    let text = until(async || Some(text()).filter(|text| text.contains("after the flood"))).await;
    // On a busy machine the flood takes seconds; in each of them a number of entries is kept, and the rest told as one.
    assert!(text.contains("entries of this guest's journal were left out"), "{} bytes", text.len());
    assert!(text.lines().count() < 20_000, "{} lines", text.lines().count());
}

fn xid_report(number: u32, count: u64) -> DeviceReport {
    let address = || "0000:01:00.0".to_owned();
    let device = GuestDevice {
        address: address(),
        vendor: 0x10de,
        device: 0x2684,
        class: 0x03_00_00,
        driver: Some("nvidia".into()),
        port: Some("0000:00:1a.0".into()),
    };
    let fault = DeviceFault {
        address: address(),
        fault: Fault::Xid { number },
        count,
        text: "NVRM: Xid\u{1b}[2J".into(),
    };
    DeviceReport { devices: vec![device], faults: vec![fault], ..DeviceReport::default() }
}

#[tokio::test]
async fn what_a_guest_says_of_its_devices_is_told_and_belongs_to_its_boot() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    assert!(guest.hello.as_ref().unwrap().features.devices);
    let mut watch = within(client::watch(shim.control())).await.unwrap();
    assert!(within(watch.next()).await.unwrap().unwrap().devices.is_none());
    guest.say(&Event::Devices { report: xid_report(79, 1) }).await;
    let told = within(watch.next()).await.unwrap().unwrap().devices.unwrap();
    assert_eq!((told.boot_id.as_str(), told.report.faults[0].fault), ("boot-1", Fault::Xid { number: 79 }));
    assert_eq!(told.report.faults[0].text, "NVRM: Xid\\u{1b}[2J");
    assert_eq!(told.report.devices[0].port.as_deref(), Some("0000:00:1a.0"));
    // Figures are there for who asks, and wake nobody.
    let gpus = vec![GpuFigures { temperature: Some(70), ..GpuFigures::default() }];
    guest.say(&Event::Devices { report: DeviceReport { gpus, ..xid_report(79, 1) } }).await;
    until(async || shim.status().await.devices.unwrap().report.gpus.first().cloned()).await;
    assert!(tokio::time::timeout(Duration::from_millis(300), watch.next()).await.is_err());
    // The next boot's log is another.
    guest.control = None;
    guest.welcome("boot-2", Phase::Agent).await;
    shim.until_agent(|agent| *agent == connected("boot-2")).await;
    assert_eq!(shim.status().await.devices, None);
}

#[tokio::test]
async fn vs5_a_guest_that_floods_with_reports_is_bounded_and_heard_in_the_end() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    let before = shim.resident_kib();
    let counted = Arc::new(AtomicU64::new(0));
    let (mut watch, changes) = (within(client::watch(shim.control())).await.unwrap(), counted.clone());
    let watching = tokio::spawn(async move {
        while let Ok(Some(_)) = watch.next().await {
            changes.fetch_add(1, Ordering::Relaxed);
        }
    });
    let began = std::time::Instant::now();
    for count in 1..=5000 {
        guest.say(&Event::Devices { report: xid_report(31, count) }).await;
    }
    let asked = answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 2).await;
    assert_eq!(asked, [Ask::Statistics, Ask::Statistics]);
    let count = async || Some(shim.status().await.devices?.report.faults[0].count).filter(|n| *n == 5000);
    until(count).await;
    let seconds = began.elapsed().as_secs() + 1;
    assert!(counted.load(Ordering::Relaxed) <= 2 * seconds + 3, "{counted:?} in {seconds} s");
    assert!(shim.resident_kib() < before + 16_384, "{before} to {} KiB", shim.resident_kib());
    watching.abort();
}

/// A guest that was never asked for its journal, or a VM of an earlier configuration.
#[tokio::test]
async fn a_journal_that_nobody_wants_is_let_pass() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("hydra")).await;
    assert!(!guest.hello.as_ref().unwrap().features.journal);
    guest.say(&Event::Journal { entries: vec![journal_entry("hello")] }).await;
    answer_with(&mut guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 2).await;
    assert_eq!(shim.status().await.agent, ready("boot-1", 1234));
}

#[tokio::test]
async fn vs10_readiness_forged_early_or_never_said_is_that_vms_own() {
    let host = Host::new();
    let (honest, mut honest_guest) = host.start_ready(host.config("hydra")).await;
    let config = host.config("liar");
    let mut liar = Guest::new(&config);
    let shim = host.start(config).await;
    liar.start_agent();
    // In the initramfs, where nothing can be ready.
    liar.welcome("boot-1", Phase::Init).await;
    liar.say(&Event::Ready { uptime_ms: 1, trace: vec![] }).await;
    assert_eq!(shim.status().await.agent, AgentState::Absent);
    liar.control = None;
    // At once, with a trace from the end of time.
    liar.welcome("boot-1", Phase::Agent).await;
    let forged = Moment { name: "x".repeat(10_000), at_ms: u64::MAX };
    liar.say(&Event::Ready { uptime_ms: u64::MAX, trace: vec![forged; 5] }).await;
    shim.until_agent(|agent| *agent == ready("boot-1", u64::MAX)).await;
    let asked = answer_with(
        &mut liar,
        Statistics { uptime_ms: u64::MAX, unix_ms: u64::MAX, ..Statistics::default() },
        1,
    );
    asked.await;
    assert!(!shim.status().await.times.host.is_empty());
    let asked =
        answer_with(&mut honest_guest, Statistics { unix_ms: unix_ms(), ..Statistics::default() }, 1).await;
    assert_eq!(asked, [Ask::Statistics]);
    assert_eq!(honest.status().await.agent, ready("boot-1", 1234));
}

/// A guest's kernel without room resets connections, at any point.
#[tokio::test]
async fn vs6_a_guest_that_resets_every_dial_is_dialled_ever_more_slowly() {
    let host = Host::new();
    let config = host.config("hydra");
    let guest = UnixListener::bind(&config.vsock).unwrap();
    let dials = Arc::new(AtomicU64::new(0));
    let counted = dials.clone();
    let resetting = tokio::spawn(async move {
        loop {
            let (mut stream, _) = guest.accept().await.unwrap();
            // Every other one after its greeting has begun: what is unread makes it a reset.
            if counted.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
                let _ = stream.write_all(b"OK 1073741824\n\0").await;
            }
        }
    });
    let shim = host.start(config.clone()).await;
    sleep(Duration::from_secs(4)).await;
    let attempts = dials.load(Ordering::Relaxed);
    // Pauses of 50 ms, doubled up to 1 s: seven in four seconds, fewer on a busy machine.
    assert!((2..=9).contains(&attempts), "{attempts} dials");
    let descriptors = shim.open_descriptors();
    assert_eq!(shim.status().await.agent, AgentState::Absent);
    assert!(shim.stderr().lines().count() <= 5, "{}", shim.stderr());
    // The guest recovers.
    resetting.abort();
    let mut guest = Guest::new(&config);
    guest.boot("boot-1").await;
    shim.until_agent(|agent| *agent == ready("boot-1", 1234)).await;
    assert!(shim.open_descriptors() <= descriptors + 4);
}
