//! Links: what is carried, what is refused, what is recorded.

use crate::support::*;
use lair_guest::wire::{
    VERSION, frame,
    message::{LinkOpen, LinkReply},
};
use lair_vmm::shim::protocol::{Dial, DialReply};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixListener, UnixStream},
    time::sleep,
};

/// Two VMs, and a link from `builder` to port 50051 of `hydra`.
async fn two_vms(host: &Host, incoming: lair_vmm::shim::config::Incoming) -> ((Shim, Guest), (Shim, Guest)) {
    let mut hydra = host.config("hydra");
    hydra.incoming = vec![incoming];
    let mut builder = host.config("builder");
    builder.outgoing = vec![to_vm("queue", &hydra)];
    (host.start_ready(builder).await, host.start_ready(hydra).await)
}

#[tokio::test]
async fn a_link_between_two_vms_carries_data_and_half_close() {
    let host = Host::new();
    let ((builder, builder_guest), (hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let mut port = hydra_guest.listen(50051);
    let (mut near, mut far) = tokio::join!(builder_guest.open_link("queue"), accept_framed(&mut port));
    send(&mut near, b"build").await;
    expect(&mut far, b"build").await;
    // Counters of an open connection move.
    let link = until(async || Some(builder.link("queue").await).filter(|link| link.bytes_out == 5)).await;
    assert_eq!((link.from.as_str(), link.to.as_str()), ("builder", "hydra"));
    assert_eq!((link.connections, link.open, link.refused, link.bytes_in), (1, 1, 0, 0));
    assert!(builder.audit_now().is_empty(), "Recorded before its end");

    send_eof(&mut near).await;
    assert_eq!(receive_to_eof(&mut far).await, b"");
    let log = vec![b'l'; 1_000_000];
    let answer = tokio::spawn(async move {
        for part in log.chunks(400_000) {
            send(&mut far, part).await;
        }
        send_eof(&mut far).await;
        far
    });
    assert_eq!(receive_to_eof(&mut near).await.len(), 1_000_000);
    assert_closed(&mut near).await;
    assert_closed(&mut within(answer).await.unwrap()).await;

    let records = builder.audit(1).await;
    let record = &records[0];
    assert_eq!(records.len(), 1);
    assert_eq!((&record["kind"], &record["link"]), (&"link".into(), &"queue".into()));
    assert_eq!((&record["from"], &record["to"]), (&"builder".into(), &"hydra".into()));
    assert_eq!((&record["verdict"], record.get("reason")), (&"allowed".into(), None));
    assert_eq!((&record["bytes_out"], &record["bytes_in"]), (&5.into(), &1_000_000.into()));
    assert_eq!(builder.link("queue").await.open, 0);
    assert!(hydra.audit_now().is_empty(), "The carrier records, and nobody else");
}

#[tokio::test]
async fn a_program_in_the_guest_gets_plain_bytes() {
    let host = Host::new();
    let ((_builder, builder_guest), (_hydra, hydra_guest)) =
        two_vms(&host, raw("queue", 50051, &["builder"])).await;
    let mut port = hydra_guest.listen(50051);
    let mut near = builder_guest.open_link("queue").await;
    let mut far = within(port.recv()).await.unwrap();
    send(&mut near, b"GET /").await;
    send_eof(&mut near).await;
    let mut request = String::new();
    within(far.read_to_string(&mut request)).await.unwrap();
    assert_eq!(request, "GET /");
    far.write_all(b"200").await.unwrap();
    drop(far);
    assert_eq!(receive_to_eof(&mut near).await, b"200");
}

#[tokio::test]
async fn a_link_reaches_a_socket_of_the_host() {
    let host = Host::new();
    let store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store")), to_host("gone", host.path("nothing-there"))];
    let (shim, guest) = host.start_ready(config).await;
    let mut near = guest.open_link("store").await;
    let (mut far, _) = within(store.accept()).await.unwrap();
    send(&mut near, b"query").await;
    let mut query = [0; 5];
    within(far.read_exact(&mut query)).await.unwrap();
    far.write_all(b"valid").await.unwrap();
    expect(&mut near, b"valid").await;
    drop((near, far));
    let record = shim.audit(1).await.remove(0);
    assert_eq!(record["to"], host.path("store").display().to_string());

    let reason = guest.refused_link("gone", &guest.ticket()).await;
    assert_eq!(reason, "Link gone cannot be opened: Nothing answers at the end of the link");
    let record = shim.audit(2).await.remove(1);
    assert_eq!(record["verdict"], "refused");
    let reason = record["reason"].as_str().unwrap();
    assert!(reason.contains("nothing-there"), "The log tells the path, the guest is not told: {reason}");
    assert_eq!(shim.link("gone").await.refused, 1);
}

#[tokio::test]
async fn the_host_opens_links_into_a_guest() {
    let host = Host::new();
    let port_of_web = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = host.config("hydra");
    let (mut web, mut ssh) = (framed("web", 3000, &["host"]), raw("ssh", 22, &["host"]));
    web.host_listen = Some(port_of_web.to_string());
    ssh.host_listen = Some(host.path("ssh").display().to_string());
    config.incoming = vec![web, ssh];
    let (shim, guest) = host.start_ready(config).await;
    let (mut web, mut ssh) = (guest.listen(3000), guest.listen(22));

    let mut client = within(TcpStream::connect(port_of_web)).await.unwrap();
    let mut agent = accept_framed(&mut web).await;
    client.write_all(b"GET /").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(receive_to_eof(&mut agent).await, b"GET /");
    send(&mut agent, b"200 OK").await;
    send_eof(&mut agent).await;
    let mut page = String::new();
    within(client.read_to_string(&mut page)).await.unwrap();
    assert_eq!(page, "200 OK");

    let mut client = within(UnixStream::connect(host.path("ssh"))).await.unwrap();
    let mut sshd = within(ssh.recv()).await.unwrap();
    sshd.write_all(b"SSH-2.0").await.unwrap();
    let mut banner = [0; 7];
    within(client.read_exact(&mut banner)).await.unwrap();
    assert_eq!(&banner, b"SSH-2.0");
    drop((client, sshd));

    let records = shim.audit(2).await;
    let of = |link: &str| records.iter().find(|record| record["link"] == link).unwrap();
    assert_eq!((&of("web")["from"], &of("web")["to"]), (&"host".into(), &"hydra".into()));
    assert_eq!((&of("web")["bytes_out"], &of("web")["bytes_in"]), (&5.into(), &6.into()));
    assert!(of("web").get("uid").is_none());
    assert_eq!(of("ssh")["uid"], nix::unistd::getuid().as_raw());
    assert_eq!(shim.link("web").await.connections, 1);
}

#[tokio::test]
async fn a_client_of_the_host_is_turned_away_while_the_guest_is_down() {
    let host = Host::new();
    let mut config = host.config("hydra");
    let mut web = framed("web", 3000, &["host"]);
    web.host_listen = Some(host.path("web").display().to_string());
    config.incoming = vec![web];
    let shim = host.start(config).await;
    let mut client = within(UnixStream::connect(host.path("web"))).await.unwrap();
    assert_closed(&mut client).await;
    assert_eq!(shim.audit(1).await[0]["verdict"], "refused");
    assert_eq!(shim.link("web").await.refused, 1);
}

#[tokio::test]
async fn vs9_a_wrong_ticket_opens_nothing() {
    let host = Host::new();
    let ((builder, mut builder_guest), (hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let mut port = hydra_guest.listen(50051);
    let old = builder_guest.ticket();
    for wrong in ["", "0", &"0".repeat(64), &old[..63], &format!("{old}0"), &old.to_uppercase()] {
        assert_eq!(builder_guest.refused_link("queue", wrong).await, "The ticket is not one of this boot");
    }
    // A process without the ticket does not learn what links there are.
    assert_eq!(builder_guest.refused_link("no-such", "x").await, "The ticket is not one of this boot");
    // Another boot: what was captured in the one before is worthless.
    builder_guest.control = None;
    builder_guest.welcome("boot-2", lair_guest::wire::message::Phase::Agent).await;
    until(async || Some(builder_guest.refused_link("queue", &old).await).filter(|r| r.contains("ticket")))
        .await;
    assert_untouched(&mut port);
    let _open = tokio::join!(builder_guest.open_link("queue"), accept_framed(&mut port));
    let refused = builder.audit(8).await;
    assert!(refused.iter().all(|record| record["verdict"] == "refused" && record["bytes_out"] == 0));
    assert!(hydra.audit_now().is_empty());
    assert!(
        !std::fs::read_to_string(&builder.config.audit_log).unwrap().contains(&old),
        "A secret in the log"
    );
}

#[tokio::test]
async fn cl11_another_protocol_version_is_refused_with_both_numbers() {
    let host = Host::new();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (_shim, guest) = host.start_ready(config).await;
    let mut stream = guest.connect().await;
    let open = LinkOpen { version: 99, ticket: guest.ticket(), link: "store".into() };
    frame::write_message(&mut stream, &open).await.unwrap();
    let LinkReply::Refused { reason } = within(frame::read_message(&mut stream)).await.unwrap() else {
        panic!("It was opened")
    };
    assert_eq!(reason, format!("Protocol version 99 is not spoken here, version {VERSION} is"));
}

#[tokio::test]
async fn vs2_a_link_that_is_not_offered_is_refused() {
    let host = Host::new();
    let ((builder, builder_guest), (hydra, _hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let reason = builder_guest.refused_link("other", &builder_guest.ticket()).await;
    assert_eq!(reason, "Link other is not open to this VM");
    let hostile = "x\n\u{1b}[2J".repeat(100);
    let reason = builder_guest.refused_link(&hostile, &builder_guest.ticket()).await;
    assert!(!reason.contains('\u{1b}') && reason.len() < 2000, "{reason}");
    let records = builder.audit(2).await;
    assert_eq!((&records[0]["link"], &records[0]["to"]), (&"other".into(), &"".into()));
    assert!(hydra.audit_now().is_empty());
}

#[tokio::test]
async fn vs3_the_target_has_its_own_policy() {
    let host = Host::new();
    // The builder's configuration says yes, that of hydra does not know this builder.
    let ((builder, builder_guest), (hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["another"])).await;
    let mut port = hydra_guest.listen(50051);
    let reason = builder_guest.refused_link("queue", &builder_guest.ticket()).await;
    assert_eq!(reason, "Link queue cannot be opened: VM hydra refused: Link queue is not open to builder");
    // Whoever reaches the dial socket is a VM, never the host.
    let mut direct = within(UnixStream::connect(&hydra.config.sockets.dial)).await.unwrap();
    let dial = Dial { link: "queue".into(), from: "host".into() };
    frame::write_message(&mut direct, &dial).await.unwrap();
    let reply = within(frame::read_message::<DialReply, _>(&mut direct)).await.unwrap();
    assert!(matches!(reply, DialReply::Refused { .. }));
    assert_untouched(&mut port);
    let records = hydra.audit(2).await;
    let froms: Vec<_> = records.iter().map(|record| record["from"].as_str().unwrap()).collect();
    assert_eq!(froms, ["builder", "host"]);
    assert_eq!(builder.audit(1).await[0]["verdict"], "refused");
}

#[tokio::test]
async fn a_target_that_is_down_or_refuses_is_told() {
    let host = Host::new();
    let ((mut builder, builder_guest), (mut hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let ticket = builder_guest.ticket();
    let reason = builder_guest.refused_link("queue", &ticket).await;
    assert!(reason.contains("Nothing in the guest listens on vsock port 50051"), "{reason}");
    let mut port = hydra_guest.listen(50051);
    let no = async {
        let mut agent = within(port.recv()).await.unwrap();
        let reply = LinkReply::Refused { reason: "nothing at\n/run/service.sock".into() };
        frame::write_message(&mut agent, &reply).await.unwrap();
    };
    let (reason, ()) = tokio::join!(builder_guest.refused_link("queue", &ticket), no);
    assert_eq!(reason, "Link queue cannot be opened: VM hydra did not open the link");
    let reasons = builder.audit(2).await;
    assert!(reasons[1]["reason"].as_str().unwrap().contains("nothing at\\n/run"), "{reasons:?}");
    hydra.child.kill().await.unwrap();
    let reason = builder_guest.refused_link("queue", &ticket).await;
    assert_eq!(reason, "Link queue cannot be opened: VM hydra is not running");
    assert!(builder.child.try_wait().unwrap().is_none());
}

#[tokio::test]
async fn vs4_what_is_no_request_ends_its_connection_only() {
    let host = Host::new();
    let store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (shim, guest) = host.start_ready(config).await;
    let deep = format!("{}{}", "[".repeat(1500), "]".repeat(1500));
    let mut nested = frame::header(frame::Kind::Message, deep.len()).unwrap().to_vec();
    nested.extend_from_slice(deep.as_bytes());
    let cases: [&[u8]; 7] = [
        &[0, 0, 0, 0, 0],
        &[0, 0xff, 0xff, 0xff, 0xff],
        &[0, 0, 0, 16, 0],
        &[0, 2, 0, 0, 0, 0xff, 0xfe],
        &[1, 1, 0, 0, 0, b'x'],
        &[255; 64],
        &nested,
    ];
    for bytes in cases {
        let mut stream = guest.connect().await;
        stream.write_all(bytes).await.unwrap();
        assert_closed(&mut stream).await;
    }
    assert_eq!(shim.audit(7).await.len(), 7);
    // Inside an open link: the same, and the record says who it was.
    let mut near = guest.open_link("store").await;
    let (mut far, _) = within(store.accept()).await.unwrap();
    near.write_all(&[2, 1, 0, 0, 0, b'x']).await.unwrap();
    assert_closed(&mut near).await;
    assert_closed(&mut far).await;
    let record = shim.audit(8).await.remove(7);
    assert!(record["reason"].as_str().unwrap().contains("The opener broke the protocol"), "{record}");
}

#[tokio::test]
async fn vs4_a_slow_request_is_served_and_an_endless_one_is_not() {
    let host = Host::new();
    let _store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (shim, guest) = host.start_ready(config).await;
    let open = LinkOpen { version: VERSION, ticket: guest.ticket(), link: "store".into() };
    let mut request = Vec::new();
    frame::write_message(&mut request, &open).await.unwrap();
    let mut slow = guest.connect().await;
    for byte in request {
        slow.write_all(&[byte]).await.unwrap();
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(within(frame::read_message::<LinkReply, _>(&mut slow)).await.unwrap(), LinkReply::Opened);

    let mut endless = guest.connect().await;
    endless.write_all(&[0, 100, 0]).await.unwrap();
    let started = Instant::now();
    assert_closed(&mut endless).await;
    assert!(started.elapsed() > Duration::from_secs(5), "Closed without a deadline");
    let record = shim.audit(1).await.remove(0);
    assert_eq!(record["reason"], "The peer did not say what it wants within 10 s");
}

#[tokio::test]
async fn vs6_one_byte_frames_arrive_whole() {
    let host = Host::new();
    let store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (shim, guest) = host.start_ready(config).await;
    let mut near = guest.open_link("store").await;
    let (mut far, _) = within(store.accept()).await.unwrap();
    let sender = tokio::spawn(async move {
        for n in 0..20_000_u32 {
            near.write_all(&[1, 1, 0, 0, 0, n.to_le_bytes()[0]]).await.unwrap();
        }
        send_eof(&mut near).await;
        near
    });
    let mut all = Vec::new();
    within(far.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), 20_000);
    assert!(all.iter().zip(0_u32..).all(|(byte, n)| *byte == n.to_le_bytes()[0]));
    let _near = within(sender).await.unwrap();
    assert_eq!(shim.link("store").await.bytes_out, 20_000);
}

#[tokio::test]
async fn vs8_a_reader_that_stops_holds_the_writer_and_no_memory() {
    let host = Host::new();
    let store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (shim, guest) = host.start_ready(config).await;
    let mut near = guest.open_link("store").await;
    let (_far, _) = within(store.accept()).await.unwrap();
    let before = shim.resident_kib();
    let block = vec![0; 1 << 20];
    let flood = async {
        loop {
            frame::write(&mut near, frame::Kind::Data, &block).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(2), flood).await.is_err());
    let carried = shim.link("store").await.bytes_out;
    assert!(carried < 4 << 20, "{carried} bytes without a reader");
    assert!(shim.resident_kib() < before + 4096, "{before} to {} KiB", shim.resident_kib());
}

#[tokio::test]
async fn vs8_both_ends_see_a_clean_end_with_data_in_flight() {
    let host = Host::new();
    let ((builder, builder_guest), (_hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let mut port = hydra_guest.listen(50051);
    for opener_leaves in [true, false] {
        let (near, far) = tokio::join!(builder_guest.open_link("queue"), accept_framed(&mut port));
        let (gone, mut left) = if opener_leaves { (near, far) } else { (far, near) };
        fill(&mut left, frame::Kind::Data).await;
        drop(gone);
        assert_closed(&mut left).await;
    }
    // The host ends what two guests would go on with.
    let (mut near, mut far) = tokio::join!(builder_guest.open_link("queue"), accept_framed(&mut port));
    fill(&mut near, frame::Kind::Data).await;
    fill(&mut far, frame::Kind::Data).await;
    within(lair_vmm::shim::client::stop(builder.control())).await.unwrap();
    for end in [&mut near, &mut far] {
        within(end.read_to_end(&mut Vec::new())).await.expect("It was reset");
    }
}

#[tokio::test]
async fn vs5_a_flood_of_refusals_is_a_few_lines_and_a_count() {
    let host = Host::new();
    let (shim, guest) = host.start_ready(host.config("builder")).await;
    let started = Instant::now();
    for _ in 0..500 {
        guest.refused_link("store", "wrong").await;
    }
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 2;
    let records = until(async || {
        let records = shim.audit_now();
        let told = records.iter().filter(|record| record["kind"] == "link").count();
        let counted: u64 = records.iter().filter_map(|record| record["suppressed"].as_u64()).sum();
        (told + usize::try_from(counted).unwrap() == 500).then_some(records)
    })
    .await;
    assert!(records.len() <= 12 * seconds, "{} lines in {seconds} s", records.len());
    assert_eq!(shim.stderr(), "");
}

#[tokio::test]
async fn vs1_connections_that_say_nothing_are_capped() {
    let host = Host::new();
    let _store = UnixListener::bind(host.path("store")).unwrap();
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("store", host.path("store"))];
    let (shim, guest) = host.start_ready(config).await;
    let before = shim.open_descriptors();
    let mut idle = Vec::new();
    for _ in 0..64 {
        idle.push(guest.connect().await);
    }
    until(async || (shim.open_descriptors() >= before + 60).then_some(())).await;
    for _ in 0..200 {
        assert_closed(&mut guest.connect().await).await;
    }
    assert!(shim.open_descriptors() <= before + 70);
    let record = shim.audit(1).await.remove(0);
    assert_eq!(record["reason"], "Limit of 64 connections without a first message is reached");
    drop(idle);
    // As soon as there is room, links open again.
    until(async || {
        let mut stream = guest.connect().await;
        let open = LinkOpen { version: VERSION, ticket: guest.ticket(), link: "store".into() };
        frame::write_message(&mut stream, &open).await.ok()?;
        within(frame::read_message::<LinkReply, _>(&mut stream)).await.ok()
    })
    .await;
}

#[tokio::test]
async fn cl10_unasked_descriptors_are_closed() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::{io::IoSlice, os::fd::AsRawFd};
    let host = Host::new();
    let shim = host.start(host.config("hydra")).await;
    let before = shim.open_descriptors();
    let mut request = Vec::new();
    let dial = Dial { link: "queue".into(), from: "builder".into() };
    frame::write_message(&mut request, &dial).await.unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for socket in [&shim.config.sockets.dial, &shim.config.sockets.session, &shim.config.sockets.control] {
        for _ in 0..50 {
            let client = std::os::unix::net::UnixStream::connect(socket).unwrap();
            let fds = [file.as_raw_fd(); 100];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(&request)], &rights, MsgFlags::empty(), None)
                .unwrap();
            client.set_nonblocking(true).unwrap();
            // An answer of some kind, or the end.
            let mut client = UnixStream::from_std(client).unwrap();
            let _ = within(client.read(&mut [0; 256])).await;
        }
    }
    // 15,000 came. The shim opens a few of its own meanwhile: its audit log with the first record, its dials of the guest.
    until(async || (shim.open_descriptors() <= before + 8).then_some(())).await;
}

#[tokio::test]
async fn a_reload_closes_connections_of_removed_links_only() {
    let host = Host::new();
    let (one, two) =
        (UnixListener::bind(host.path("one")).unwrap(), UnixListener::bind(host.path("two")).unwrap());
    let mut config = host.config("builder");
    config.outgoing = vec![to_host("one", host.path("one")), to_host("two", host.path("two"))];
    let (shim, mut guest) = host.start_ready(config.clone()).await;
    let (mut near_one, mut near_two) = (guest.open_link("one").await, guest.open_link("two").await);
    let (mut far_one, mut far_two) = (one.accept().await.unwrap().0, two.accept().await.unwrap().0);
    let ticket = guest.ticket();

    config.outgoing = vec![to_host("new", host.path("one")), to_host("two", host.path("two"))];
    shim.reload(&host, &config).await.unwrap();
    assert_closed(&mut near_one).await;
    assert_closed(&mut far_one).await;
    let record = shim.audit(1).await.remove(0);
    assert_eq!((&record["link"], &record["reason"]), (&"one".into(), &"The link was removed".into()));
    send(&mut near_two, b"still").await;
    let mut still = [0; 5];
    within(far_two.read_exact(&mut still)).await.unwrap();
    assert_eq!((shim.link("two").await.bytes_out, shim.link("two").await.open), (5, 1));

    // The agent is told; until it has answered, its ticket is good.
    assert_eq!(guest.refused_link("one", &ticket).await, "Link one is not open to this VM");
    let (_new, reply) = guest.ask_link("new", &ticket).await;
    assert_eq!(reply, LinkReply::Opened);
    guest.welcome("boot-1", lair_guest::wire::message::Phase::Agent).await;
    let names: Vec<_> = guest.hello.as_ref().unwrap().links_out.iter().map(|link| &link.name).collect();
    assert_eq!(names, ["new", "two"]);
    // One that cannot be read changes nothing.
    std::fs::write(host.path("builder.json"), "{").unwrap();
    let error = within(lair_vmm::shim::client::reload(shim.control())).await.unwrap_err();
    assert!(error.to_string().contains("Malformed configuration"), "{error}");
    assert_eq!(shim.link("two").await.open, 1);
}

#[tokio::test]
async fn a_reload_starts_and_ends_listeners_of_the_host() {
    let host = Host::new();
    let mut config = host.config("hydra");
    let (shim, guest) = host.start_ready(config.clone()).await;
    let mut port = guest.listen(22);
    let mut ssh = raw("ssh", 22, &["host"]);
    ssh.host_listen = Some(host.path("ssh").display().to_string());
    config.incoming = vec![ssh.clone()];
    shim.reload(&host, &config).await.unwrap();
    let mut client = within(UnixStream::connect(host.path("ssh"))).await.unwrap();
    let _sshd = within(port.recv()).await.unwrap();

    ssh.host_listen = Some("192.0.2.1:22".into());
    config.incoming = vec![ssh.clone()];
    let error = shim.reload(&host, &config).await.unwrap_err().to_string();
    assert!(error.contains("Link ssh cannot listen on 192.0.2.1:22: it takes a loopback address"), "{error}");
    assert!(!host.path("ssh").exists());
    assert_eq!(shim.link("ssh").await.open, 1, "The link is the same, only its place has changed");

    config.incoming = vec![];
    shim.reload(&host, &config).await.unwrap();
    assert_closed(&mut client).await;
}

#[tokio::test]
async fn a_guest_that_is_cut_off_leaves_no_complete_stream() {
    let host = Host::new();
    let ((builder, builder_guest), (_hydra, hydra_guest)) =
        two_vms(&host, framed("queue", 50051, &["builder"])).await;
    let mut port = hydra_guest.listen(50051);
    let (mut near, mut far) = tokio::join!(builder_guest.open_link("queue"), accept_framed(&mut port));
    send(&mut far, b"half of it").await;
    expect(&mut near, b"half of it").await;
    drop(far);
    assert_closed(&mut near).await;
    let record = builder.audit(1).await.remove(0);
    assert_eq!(record["reason"], "The target closed the connection in the middle of it");
    assert_eq!(record["bytes_in"], 10);
}
