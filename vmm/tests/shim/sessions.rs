//! Operators' sessions.

use crate::support::*;
use lair_guest::wire::{
    frame::{self, Kind},
    message::{Exec, ExecEvent, ExecInput, HostOpen, LinkReply, TerminalSize},
};
use lair_vmm::shim::{
    client::{self, ClientError},
    protocol::{Grant, Session, SessionOpen},
};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

fn exec(command: &[&str]) -> Session {
    let command = command.iter().map(|&word| word.into()).collect();
    Session::Exec(Exec { command, environment: [("LANG".into(), "C".into())].into(), terminal: None })
}

fn shell() -> Session {
    let terminal = Some(terminal(40, 132));
    Session::Exec(Exec { command: vec![], environment: [].into(), terminal })
}

/// A session that must open, and what the guest gets of it.
async fn open(shim: &Shim, guest: &mut Guest, ticket: &str) -> (UnixStream, HostOpen, UnixStream) {
    let client = client::open_session(&shim.config.sockets.session, ticket);
    let (client, (open, agent)) = tokio::join!(within(client), guest.agent_connection());
    (client.unwrap(), open, agent)
}

/// What the shim says in place of the command's end.
async fn cut_off(client: &mut UnixStream) -> String {
    match within(frame::read_message(client)).await.unwrap() {
        ExecEvent::Failed { reason } => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_terminal_is_recorded_as_it_was_seen() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', shell()).await;
    let (mut client, opened, mut agent) = open(&shim, &mut guest, &ticket).await;
    let HostOpen::Exec(exec) = opened else { panic!("Not a command") };
    assert!(exec.is_shell() && exec.terminal == Some(terminal(40, 132)));
    let started = ExecEvent::Started { pid: 42, terminal: true };
    frame::write_message(&mut agent, &started).await.unwrap();
    assert_eq!(within(frame::read_message::<ExecEvent, _>(&mut client)).await.unwrap(), started);
    frame::write(&mut agent, Kind::Stdout, "Password: \u{1b}[31m€".as_bytes()).await.unwrap();
    send(&mut client, b"secret\r").await;
    expect(&mut agent, b"secret\r").await;
    let resize = ExecInput::Resize(TerminalSize { rows: 50, columns: 90 });
    frame::write_message(&mut client, &resize).await.unwrap();
    assert_eq!(within(frame::read_message::<ExecInput, _>(&mut agent)).await.unwrap(), resize);
    frame::write_message(&mut agent, &ExecEvent::Exited { status: 0 }).await.unwrap();

    let record = shim.audit(1).await.remove(0);
    assert_eq!((&record["kind"], &record["status"]), (&"shell".into(), &0.into()));
    assert!(record.get("recording_failed").is_none() && record.get("command").is_none());
    let name = record["recording"].as_str().unwrap();
    assert!(name.ends_with("Z-1000-shell.cast"), "{name}");
    let lines = recording(&shim, name).await;
    assert_eq!((&lines[0]["width"], &lines[0]["height"]), (&132.into(), &40.into()));
    assert_eq!(lines[0]["env"]["TERM"], "xterm");
    let events: Vec<_> = lines[1..].iter().map(|line| (line[1].as_str(), line[2].as_str())).collect();
    assert_eq!(
        events,
        [
            (Some("o"), Some("Password: \u{1b}[31m€")),
            (Some("r"), Some("90x50")),
            (Some("m"), Some("exited with status 0"))
        ]
    );
}

#[tokio::test]
async fn a_command_without_a_terminal_is_not_recorded() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["cat"])).await;
    let (_client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    frame::write(&mut agent, Kind::Stdout, b"data").await.unwrap();
    frame::write_message(&mut agent, &ExecEvent::Exited { status: 0 }).await.unwrap();
    assert!(shim.audit(1).await[0].get("recording").is_none());
    assert!(!host.path("builder-sessions").exists());
}

#[tokio::test]
async fn a_recording_that_cannot_be_written_stops_no_session_and_is_told() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.recordings = Some(host.path("missing/sessions"));
    let (shim, mut guest) = host.start_ready(config).await;
    for (digit, lines) in [('a', 1), ('b', 2)] {
        let ticket = grant(&shim, digit, shell()).await;
        let (_client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
        until(async || (!shim.stderr().is_empty()).then_some(())).await;
        frame::write(&mut agent, Kind::Stdout, b"data").await.unwrap();
        frame::write_message(&mut agent, &ExecEvent::Exited { status: 0 }).await.unwrap();
        assert_eq!(shim.audit(lines).await[lines - 1]["status"], 0);
    }
    assert_eq!(shim.audit(2).await[0]["recording_failed"], true);
    assert!(shim.stderr().starts_with("Cannot write recording "), "{}", shim.stderr());
}

#[tokio::test]
async fn a_session_that_is_cut_off_hears_why() {
    let host = Host::new();
    let (mut shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', shell()).await;
    let (mut first, _, agent) = open(&shim, &mut guest, &ticket).await;
    drop(agent);
    assert_eq!(cut_off(&mut first).await, "The agent closed before the end of the command");
    assert_closed(&mut first).await;
    let ticket = grant(&shim, 'b', shell()).await;
    let (mut second, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    within(client::stop(shim.control())).await.unwrap();
    assert_eq!(cut_off(&mut second).await, "The shim was stopped");
    assert_closed(&mut agent).await;
    assert!(within(shim.child.wait()).await.unwrap().success());
    // The recording was ended before the process.
    let records = shim.audit_now();
    let lines = recording(&shim, records[1]["recording"].as_str().unwrap()).await;
    assert_eq!(lines.last().unwrap()[2], "The shim was stopped");
}

#[tokio::test]
async fn sessions_have_a_cap() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let mut open_ones = Vec::new();
    for n in 0..65_usize {
        let ticket = format!("{n:064}");
        let grant =
            Grant { ticket: ticket.clone(), expires_unix_ms: in_ms(60_000), uid: 1000, session: shell() };
        within(client::grant(shim.control(), grant)).await.unwrap();
        if n < 64 {
            open_ones.push(open(&shim, &mut guest, &ticket).await);
        } else {
            let refused = within(client::open_session(&shim.config.sockets.session, &ticket)).await;
            let text = refused.unwrap_err().to_string();
            assert_eq!(text, "The shim refused: Limit of 64 open sessions is reached");
        }
    }
    drop(open_ones);
    assert_eq!(shim.audit(65).await.len(), 65);
}

#[tokio::test]
async fn exec_carries_streams_and_the_status() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["sh", "-c", "cat"])).await;
    let (mut client, opened, mut agent) = open(&shim, &mut guest, &ticket).await;
    let HostOpen::Exec(exec) = opened else { panic!("Not a command") };
    assert_eq!((exec.command.join(" "), exec.environment["LANG"].as_str()), ("sh -c cat".into(), "C"));
    frame::write_message(&mut agent, &ExecEvent::Started { pid: 42, terminal: false }).await.unwrap();
    let started: ExecEvent = within(frame::read_message(&mut client)).await.unwrap();
    assert_eq!(started, ExecEvent::Started { pid: 42, terminal: false });
    send(&mut client, b"input").await;
    send_eof(&mut client).await;
    assert_eq!(receive_to_eof(&mut agent).await, b"input");
    let long = vec![b'o'; 200_000];
    let output = tokio::spawn(async move {
        frame::write(&mut agent, Kind::Stdout, &long).await.unwrap();
        frame::write(&mut agent, Kind::Stderr, b"oops").await.unwrap();
        frame::write_message(&mut agent, &ExecEvent::Exited { status: 3 }).await.unwrap();
        agent
    });
    let mut payload = Vec::new();
    assert_eq!(within(frame::read(&mut client, &mut payload)).await.unwrap(), Some(Kind::Stdout));
    assert_eq!(payload.len(), 200_000);
    assert_eq!(within(frame::read(&mut client, &mut payload)).await.unwrap(), Some(Kind::Stderr));
    assert_eq!(payload, b"oops");
    let exited: ExecEvent = within(frame::read_message(&mut client)).await.unwrap();
    assert_eq!(exited, ExecEvent::Exited { status: 3 });
    assert_closed(&mut client).await;
    assert_closed(&mut within(output).await.unwrap()).await;

    let record = shim.audit(1).await.remove(0);
    assert_eq!((&record["kind"], &record["verdict"]), (&"exec".into(), &"allowed".into()));
    assert_eq!(record["command"], serde_json::json!(["sh", "-c", "cat"]));
    assert_eq!(
        (&record["from"], &record["to"], &record["uid"]),
        (&"host".into(), &"builder".into(), &1000.into())
    );
    assert_eq!((&record["status"], record.get("reason")), (&3.into(), None));
    assert_eq!((&record["bytes_out"], &record["bytes_in"]), (&5.into(), &200_004.into()));
    assert!(!record.to_string().contains(&ticket));
}

#[tokio::test]
async fn other_ends_of_a_command_are_recorded() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    // Killed.
    let ticket = grant(&shim, 'a', exec(&["sleep"])).await;
    let (_client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    frame::write_message(&mut agent, &ExecEvent::Killed { signal: 9 }).await.unwrap();
    assert_eq!(shim.audit(1).await[0]["signal"], 9);
    // Not started.
    let ticket = grant(&shim, 'b', exec(&["nonesuch"])).await;
    let (_client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    let failed = ExecEvent::Failed { reason: "No such\nfile".into() };
    frame::write_message(&mut agent, &failed).await.unwrap();
    assert_eq!(shim.audit(2).await[1]["reason"], "No such\\nfile");
    // The client leaves, before and after the end of its input: the agent sees the connection close.
    for (digit, eof) in [('c', false), ('d', true)] {
        let ticket = grant(&shim, digit, exec(&["sleep"])).await;
        let (mut client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
        if eof {
            send_eof(&mut client).await;
            assert_eq!(receive_to_eof(&mut agent).await, b"");
        }
        drop(client);
        assert_closed(&mut agent).await;
    }
    let records = shim.audit(4).await;
    assert!(records[2..].iter().all(|record| record["reason"] == "The client left"), "{records:?}");
    // The agent leaves.
    let ticket = grant(&shim, 'e', exec(&["sleep"])).await;
    let (mut client, _, agent) = open(&shim, &mut guest, &ticket).await;
    drop(agent);
    assert_eq!(cut_off(&mut client).await, "The agent closed before the end of the command");
    assert_closed(&mut client).await;
    assert_eq!(shim.audit(5).await[4]["reason"], "The agent closed before the end of the command");
}

/// The agent has the command by then: that it was refused would be wrong.
#[tokio::test]
async fn a_client_that_leaves_before_the_answer_has_had_its_command() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["sleep"])).await;
    let mut message = Vec::new();
    frame::write_message(&mut message, &SessionOpen { ticket }).await.unwrap();
    let mut client = std::os::unix::net::UnixStream::connect(&shim.config.sockets.session).unwrap();
    std::io::Write::write_all(&mut client, &message).unwrap();
    // Nothing is awaited in between, and so the guest, which is this thread, cannot have answered the dial.
    drop(client);
    let (opened, mut agent) = guest.agent_connection().await;
    assert!(matches!(opened, HostOpen::Exec(_)));
    assert_closed(&mut agent).await;
    let record = shim.audit(1).await.remove(0);
    assert_eq!((&record["verdict"], &record["reason"]), (&"allowed".into(), &"The client left".into()));
    assert_eq!((&record["kind"], record.get("recording")), (&"exec".into(), None));
}

#[tokio::test]
async fn vs11_a_ticket_is_good_once_and_in_its_time() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let session = &shim.config.sockets.session;
    let refused = |ticket: String| async move {
        let error = within(client::open_session(session, &ticket)).await.unwrap_err();
        let ClientError::Refused(reason) = error else { panic!("{error}") };
        reason
    };
    let ticket = grant(&shim, 'a', exec(&["true"])).await;
    let (_client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    let unknown = "The session is not allowed: The ticket is unknown, or was used already";
    assert_eq!(refused(ticket).await, unknown);
    assert_eq!(refused("b".repeat(64)).await, unknown);
    assert_eq!(refused(String::new()).await, unknown);
    let expires_unix_ms = in_ms(150);
    let late = Grant { ticket: "c".repeat(64), expires_unix_ms, uid: 1000, session: exec(&["true"]) };
    within(client::grant(shim.control(), late)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(refused("c".repeat(64)).await, "The session is not allowed: The ticket has expired");
    let expired = Grant { ticket: "d".repeat(64), expires_unix_ms: 5, uid: 1000, session: exec(&["true"]) };
    assert!(matches!(within(client::grant(shim.control(), expired)).await, Err(ClientError::Refused(_))));
    let records = shim.audit(4).await;
    assert!(records.iter().all(|record| record["verdict"] == "refused" && record["kind"] == "session"));
    assert_eq!(records[0]["uid"], nix::unistd::getuid().as_raw(), "Who tried, as the kernel says");
    // The session that was granted goes on.
    frame::write_message(&mut agent, &ExecEvent::Exited { status: 0 }).await.unwrap();
    assert_eq!(shim.audit(5).await[4]["status"], 0);
}

#[tokio::test]
async fn connect_speaks_frames_to_the_client_whatever_listens() {
    let host = Host::new();
    let mut config = host.config("hydra");
    config.incoming = vec![framed("web", 3000, &["host"])];
    let (shim, guest) = host.start_ready(config).await;
    let session = &shim.config.sockets.session;

    let mut ssh = guest.listen(22);
    let ticket = grant(&shim, 'a', Session::Connect { port: 22 }).await;
    let mut client = within(client::open_session(session, &ticket)).await.unwrap();
    let mut sshd = within(ssh.recv()).await.unwrap();
    sshd.write_all(b"SSH-2.0").await.unwrap();
    expect(&mut client, b"SSH-2.0").await;
    send(&mut client, b"bye").await;
    send_eof(&mut client).await;
    let mut bye = String::new();
    within(sshd.read_to_string(&mut bye)).await.unwrap();
    assert_eq!(bye, "bye");
    drop(sshd);
    assert_eq!(receive_to_eof(&mut client).await, b"");

    let mut web = guest.listen(3000);
    let ticket = grant(&shim, 'b', Session::Connect { port: 3000 }).await;
    let client = client::open_session(session, &ticket);
    let (client, mut agent) = tokio::join!(within(client), accept_framed(&mut web));
    let mut client = client.unwrap();
    send(&mut agent, b"page").await;
    send_eof(&mut agent).await;
    assert_eq!(receive_to_eof(&mut client).await, b"page");
    drop(client);

    let records = shim.audit(2).await;
    assert_eq!((&records[0]["kind"], &records[0]["port"]), (&"connect".into(), &22.into()));
    assert_eq!((&records[0]["bytes_out"], &records[0]["bytes_in"]), (&3.into(), &7.into()));
    assert_eq!((&records[1]["port"], &records[1]["bytes_in"]), (&3000.into(), &4.into()));
    assert_eq!(shim.link("web").await.connections, 0, "An operator is no link");
}

#[tokio::test]
async fn a_port_that_is_closed_or_the_agents_own_is_refused() {
    let host = Host::new();
    let mut config = host.config("hydra");
    config.incoming = vec![framed("web", 3000, &["host"])];
    let (shim, guest) = host.start_ready(config).await;
    let mut web = guest.listen(3000);
    for (digit, port, expected) in [
        ('a', 1, "Port 1 is the agent's own, commands go by exec"),
        ('b', 23, "The guest cannot be reached: Nothing in the guest listens on vsock port 23"),
    ] {
        let ticket = grant(&shim, digit, Session::Connect { port }).await;
        let error = within(client::open_session(&shim.config.sockets.session, &ticket)).await.unwrap_err();
        assert_eq!(error.to_string(), format!("The shim refused: {expected}"));
    }
    let ticket = grant(&shim, 'c', Session::Connect { port: 3000 }).await;
    let no = async {
        let mut agent = within(web.recv()).await.unwrap();
        let reply = LinkReply::Refused { reason: "down".into() };
        frame::write_message(&mut agent, &reply).await.unwrap();
    };
    let client = client::open_session(&shim.config.sockets.session, &ticket);
    let (client, ()) = tokio::join!(within(client), no);
    assert!(client.unwrap_err().to_string().ends_with("The guest's agent refused: down"));
    let records = shim.audit(3).await;
    assert!(records.iter().all(|r| r["verdict"] == "refused" && r["uid"] == 1000 && r["kind"] == "connect"));
}

#[tokio::test]
async fn vs8_output_without_end_waits_for_its_reader() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["yes"])).await;
    let (client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    let before = shim.resident_kib();
    let block = vec![b'y'; 1 << 20];
    let mut written = 0;
    let yes = async {
        loop {
            frame::write(&mut agent, Kind::Stdout, &block).await.unwrap();
            written += 1;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(2), yes).await.is_err());
    assert!(written < 4, "{written} MiB without a reader");
    assert!(shim.resident_kib() < before + 4096, "{before} to {} KiB", shim.resident_kib());
    drop(client);
    assert_closed(&mut agent).await;
}

/// A reset in place of the end would leave the command alive.
#[tokio::test]
async fn vs8_an_agent_with_output_in_flight_sees_a_clean_end() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    for (digit, terminal) in [('a', false), ('b', true)] {
        let session = if terminal { shell() } else { exec(&["yes"]) };
        let ticket = grant(&shim, digit, session).await;
        let (client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
        fill(&mut agent, Kind::Stdout).await;
        drop(client);
        assert_closed(&mut agent).await;
    }
}

#[tokio::test]
async fn vs8_a_client_that_leaves_is_noticed_while_the_guest_takes_no_input() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["sleep"])).await;
    let (mut client, _, _agent) = open(&shim, &mut guest, &ticket).await;
    let flood = async {
        loop {
            frame::write(&mut client, Kind::Data, &[0; 65536]).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), flood).await.is_err());
    drop(client);
    // The agent neither reads nor writes.
    assert_eq!(shim.audit(1).await[0]["reason"], "The client left");
}

#[tokio::test]
async fn the_last_input_of_a_client_that_leaves_arrives() {
    let host = Host::new();
    let (shim, mut guest) = host.start_ready(host.config("builder")).await;
    let ticket = grant(&shim, 'a', exec(&["cat"])).await;
    let (mut client, _, mut agent) = open(&shim, &mut guest, &ticket).await;
    let text = vec![b'x'; 100_000];
    send(&mut client, &text).await;
    drop(client);
    expect(&mut agent, &text).await;
    assert_closed(&mut agent).await;
}

#[tokio::test]
async fn cl6_requests_that_are_none_are_answered_and_others_go_on() {
    let host = Host::new();
    let (shim, _guest) = host.start_ready(host.config("builder")).await;
    let mut control = within(UnixStream::connect(shim.control())).await.unwrap();
    for bad in
        [&b"{"[..], b"[]", b"{\"control\":\"explode\"}", b"{\"control\":\"grant\",\"ticket\":1}", b"\xff"]
    {
        frame::write(&mut control, Kind::Message, bad).await.unwrap();
        let reply: serde_json::Value = within(frame::read_message(&mut control)).await.unwrap();
        assert_eq!(reply["reply"], "failed", "{reply}");
    }
    frame::write(&mut control, Kind::Message, b"{\"control\":\"status\"}").await.unwrap();
    let reply: serde_json::Value = within(frame::read_message(&mut control)).await.unwrap();
    assert_eq!((&reply["reply"], &reply["vm"]), (&"status".into(), &"builder".into()));
    let bad = Grant { ticket: "short".into(), expires_unix_ms: in_ms(1000), uid: 0, session: exec(&["x"]) };
    let error = within(client::grant(shim.control(), bad)).await.unwrap_err();
    assert_eq!(error.to_string(), "The shim refused: A ticket has 64 hexadecimal digits");
}
