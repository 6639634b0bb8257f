//! The console log, and sessions with the console.

use crate::support::*;
use lair_guest::wire::{
    frame::{self, Kind},
    message::{ExecInput, TerminalSize},
};
use lair_vmm::shim::{
    client,
    protocol::{Console, ConsoleEvent, Session},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

/// A session with the console, and what the shim says about it.
async fn open(shim: &Shim, digit: char, read_only: bool) -> (UnixStream, ConsoleEvent) {
    let session = Session::Console(Console { read_only, terminal: Some(terminal(30, 100)) });
    let ticket = grant(shim, digit, session).await;
    let mut client = within(client::open_session(&shim.config.sockets.session, &ticket)).await.unwrap();
    let attached = within(frame::read_message(&mut client)).await.unwrap();
    (client, attached)
}

/// What the console shows, until it ends so.
async fn shown(client: &mut UnixStream, end: &str) -> String {
    let (mut all, mut payload) = (Vec::new(), Vec::new());
    within(async {
        while !all.ends_with(end.as_bytes()) {
            assert_eq!(frame::read(client, &mut payload).await.unwrap(), Some(Kind::Stdout));
            all.extend_from_slice(&payload);
        }
    })
    .await;
    String::from_utf8(all).unwrap()
}

async fn typed(hypervisor: &mut UnixStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    within(hypervisor.read_exact(&mut bytes)).await.unwrap();
    assert_eq!(bytes, expected);
}

#[tokio::test]
async fn sessions_share_the_console_and_one_types() {
    let host = Host::new();
    let config = host.config("builder");
    let shim = host.start(config.clone()).await;
    let listener = UnixListener::bind(&config.console).unwrap();
    let (mut hypervisor, _) = within(listener.accept()).await.unwrap();
    hypervisor.write_all(b"booted\r\nlogin: ").await.unwrap();
    until(async || (shim.status().await.console_bytes == 15).then_some(())).await;

    let (mut first, attached) = open(&shim, 'a', false).await;
    assert_eq!(attached, ConsoleEvent::Attached { writable: true, writer: None, connected: true });
    assert_eq!(shown(&mut first, "login: ").await, "booted\r\nlogin: ");
    let (mut second, attached) = open(&shim, 'b', false).await;
    let read_only = ConsoleEvent::Attached { writable: false, writer: Some(1000), connected: true };
    assert_eq!(attached, read_only);
    let (mut third, attached) = open(&shim, 'c', true).await;
    assert_eq!(attached, ConsoleEvent::Attached { writable: false, writer: None, connected: true });

    // What the two others type goes nowhere.
    send(&mut second, b"no").await;
    send(&mut third, b"no").await;
    send(&mut first, b"root\r").await;
    typed(&mut hypervisor, b"root\r").await;
    frame::write_message(&mut first, &ExecInput::Resize(TerminalSize { rows: 1, columns: 2 })).await.unwrap();
    hypervisor.write_all(b"\x1b[1mroot\x1b[0m").await.unwrap();
    for client in [&mut first, &mut second, &mut third] {
        assert!(shown(client, "\x1b[0m").await.ends_with("\x1b[1mroot\x1b[0m"));
    }

    // The session goes on with the next hypervisor; the right to type is free once its session has left.
    drop((hypervisor, listener));
    std::fs::remove_file(&config.console).unwrap();
    let listener = UnixListener::bind(&config.console).unwrap();
    let (mut hypervisor, _) = within(listener.accept()).await.unwrap();
    hypervisor.write_all(b"again").await.unwrap();
    shown(&mut first, "again").await;
    drop(first);
    let record = shim.audit(1).await.remove(0);
    assert_eq!((&record["kind"], &record["read_only"]), (&"console".into(), &false.into()));
    assert_eq!((&record["bytes_out"], &record["reason"]), (&5.into(), &"The client left".into()));
    let name = record["recording"].as_str().unwrap();
    assert!(name.ends_with("Z-1000-console.cast"), "{name}");
    let lines = recording(&shim, name).await;
    assert_eq!((&lines[0]["width"], &lines[0]["height"]), (&100.into(), &30.into()));
    let text: String =
        lines[1..].iter().filter(|line| line[1] == "o").filter_map(|line| line[2].as_str()).collect();
    assert_eq!(text, "booted\r\nlogin: \u{1b}[1mroot\u{1b}[0magain");
    assert!(lines.iter().any(|line| line[1] == "r" && line[2] == "2x1"));

    let (mut fourth, attached) = open(&shim, 'd', false).await;
    assert_eq!(attached, ConsoleEvent::Attached { writable: true, writer: None, connected: true });
    send(&mut fourth, b"mine").await;
    typed(&mut hypervisor, b"mine").await;
    drop((second, third));
    let records = shim.audit(3).await;
    assert!(
        records[1..].iter().all(|r| r["read_only"] == true && r.get("recording").is_none()),
        "{records:?}"
    );
    let log = || std::fs::read_to_string(&config.console_log).unwrap_or_default();
    until(async || (log() == "booted\r\nlogin: \x1b[1mroot\x1b[0magain").then_some(())).await;
}

#[tokio::test]
async fn vs8_a_session_that_does_not_read_never_holds_the_guest_and_hears_what_it_missed() {
    let host = Host::new();
    let config = host.config("builder");
    let shim = host.start(config.clone()).await;
    let listener = UnixListener::bind(&config.console).unwrap();
    let (mut hypervisor, _) = within(listener.accept()).await.unwrap();
    let mut slow = Vec::new();
    for digit in '0'..='7' {
        slow.push(open(&shim, digit, digit != '0').await.0);
    }
    let before = shim.resident_kib();
    let block = vec![b'.'; 1 << 20];
    within(async {
        for _ in 0..32 {
            hypervisor.write_all(&block).await.unwrap();
        }
        hypervisor.write_all(b"the end").await.unwrap();
    })
    .await;
    until(async || (shim.status().await.console_bytes == (32 << 20) + 7).then_some(())).await;
    assert!(shim.resident_kib() < before + 16_384, "{before} to {} KiB", shim.resident_kib());
    for client in &mut slow {
        let (mut seen, mut lost, mut payload, mut end) = (0, 0, Vec::new(), Vec::new());
        within(async {
            while !end.ends_with(b"the end") {
                match frame::read(client, &mut payload).await.unwrap() {
                    Some(Kind::Stdout) => {
                        seen += u64::try_from(payload.len()).unwrap();
                        end = payload.clone();
                    }
                    Some(Kind::Message) => match frame::parse_message(&payload).unwrap() {
                        ConsoleEvent::Lost { bytes } => lost += bytes,
                        other => panic!("{other:?}"),
                    },
                    other => panic!("{other:?}"),
                }
            }
        })
        .await;
        assert_eq!((seen + lost, lost > 0), ((32 << 20) + 7, true));
    }
}

#[tokio::test]
async fn vs8_a_guest_that_does_not_read_its_console_holds_only_the_one_who_types() {
    let host = Host::new();
    let config = host.config("builder");
    let shim = host.start(config.clone()).await;
    let listener = UnixListener::bind(&config.console).unwrap();
    let (mut hypervisor, _) = within(listener.accept()).await.unwrap();
    let (mut client, attached) = open(&shim, 'a', false).await;
    let flood = async {
        loop {
            frame::write(&mut client, Kind::Data, &[b'x'; 4096]).await.unwrap();
        }
    };
    assert!(
        tokio::time::timeout(std::time::Duration::from_secs(1), flood).await.is_err(),
        "It was all taken"
    );
    hypervisor.write_all(b"still here").await.unwrap();
    shown(&mut client, "still here").await;
    shim.status().await;
    drop(client);
    // What the guest does not take is dropped in the end, so that the right to type is free again.
    assert_eq!(shim.audit(1).await[0]["reason"], "The client left");
    assert_eq!(open(&shim, 'b', false).await.1, attached);
}

#[tokio::test]
async fn a_console_session_hears_that_the_shim_stops() {
    let host = Host::new();
    let mut shim = host.start(host.config("builder")).await;
    let (mut client, attached) = open(&shim, 'a', false).await;
    assert_eq!(attached, ConsoleEvent::Attached { writable: true, writer: None, connected: false });
    within(client::stop(shim.control())).await.unwrap();
    let ended: ConsoleEvent = within(frame::read_message(&mut client)).await.unwrap();
    assert_eq!(ended, ConsoleEvent::Ended { reason: "The shim was stopped".into() });
    assert_closed(&mut client).await;
    assert!(within(shim.child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn vs4_frames_that_do_not_belong_there_end_a_console_session() {
    let host = Host::new();
    let shim = host.start(host.config("builder")).await;
    for (digit, frame) in [
        ('a', &[2_u8, 1, 0, 0, 0, b'x'][..]),
        ('b', &[0, 2, 0, 0, 0, b'{', b'}']),
        ('c', &[0, 0, 0, 15, 0]),
        ('d', &[9; 5]),
    ] {
        let (mut client, _) = open(&shim, digit, true).await;
        client.write_all(frame).await.unwrap();
        assert_ended(&mut client).await;
    }
    assert_eq!(shim.audit(4).await.len(), 4);
}

#[tokio::test]
async fn hv6_a_flood_is_drained_into_two_bounded_files() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.console_limit = 1 << 16;
    let shim = host.start(config.clone()).await;
    let hypervisor = UnixListener::bind(&config.console).unwrap();
    let (mut console, _) = within(hypervisor.accept()).await.unwrap();
    let before = shim.resident_kib();
    let line = "0123456789abcde\n".repeat(4096);
    within(async {
        for _ in 0..512 {
            console.write_all(line.as_bytes()).await.unwrap();
        }
        console.write_all(b"the last line\n").await.unwrap();
    })
    .await;
    let log = || std::fs::read(&config.console_log).unwrap_or_default();
    until(async || log().ends_with(b"the last line\n").then_some(())).await;
    let status = shim.status().await;
    assert!(status.console);
    assert_eq!(status.console_bytes, 512 * 65536 + 14);
    assert!(log().len() <= 1 << 16);
    let older = host.path("builder-console.log.1");
    assert!(std::fs::metadata(&older).unwrap().len() <= 1 << 16);
    assert!(shim.resident_kib() < before + 8192, "{before} to {} KiB", shim.resident_kib());
    assert_eq!(shim.stderr(), "");
}

#[tokio::test]
async fn the_console_is_followed_from_one_hypervisor_to_the_next() {
    let host = Host::new();
    let config = host.config("builder");
    let shim = host.start(config.clone()).await;
    assert!(!shim.status().await.console);
    for text in ["first boot\n", "second boot\n"] {
        let hypervisor = UnixListener::bind(&config.console).unwrap();
        let (mut console, _) = within(hypervisor.accept()).await.unwrap();
        until(async || shim.status().await.console.then_some(())).await;
        console.write_all(text.as_bytes()).await.unwrap();
        drop((console, hypervisor));
        std::fs::remove_file(&config.console).unwrap();
        until(async || (!shim.status().await.console).then_some(())).await;
    }
    let log = || std::fs::read_to_string(&config.console_log).unwrap_or_default();
    until(async || (log() == "first boot\nsecond boot\n").then_some(())).await;
}

#[tokio::test]
async fn a_log_that_cannot_be_written_never_holds_the_console() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.console_log = host.path("missing/console.log");
    config.audit_log = host.path("missing/audit");
    let shim = host.start(config.clone()).await;
    let hypervisor = UnixListener::bind(&config.console).unwrap();
    let (mut console, _) = within(hypervisor.accept()).await.unwrap();
    let block = vec![b'x'; 1 << 20];
    within(async {
        for _ in 0..64 {
            console.write_all(&block).await.unwrap();
        }
    })
    .await;
    until(async || (shim.status().await.console_bytes == 64 << 20).then_some(())).await;
    assert_eq!(shim.stderr().lines().count(), 1, "{}", shim.stderr());
    // With a disk again, the log goes on.
    std::fs::create_dir(host.path("missing")).unwrap();
    until(async || {
        console.write_all(b"again\n").await.unwrap();
        std::fs::read(&config.console_log).ok()
    })
    .await;
}
