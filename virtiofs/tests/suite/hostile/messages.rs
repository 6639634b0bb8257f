//! Messages of a hypervisor that does not behave, and its coming and going.

use super::*;

#[test]
fn vu1_message_headers() {
    let messages = [
        ("version 0", message(GET_FEATURES, 0, &[])),
        ("version 2", message(GET_FEATURES, 2, &[])),
        ("version 3", message(GET_FEATURES, 3, &[])),
        ("a flag that is none", message(GET_FEATURES, VERSION | 16, &[])),
        ("a reply", message(GET_FEATURES, VERSION | 4, &[])),
        ("4 KiB and a byte", message(SET_FEATURES, VERSION, &[0; 4097])),
        ("4 KiB", message(SET_FEATURES, VERSION, &[0; 4096])),
        ("a length of 4 GiB", [&message(SET_FEATURES, VERSION, &[])[..8], &u32::MAX.to_le_bytes()].concat()),
        ("no body", message(SET_FEATURES, VERSION, &[])),
        ("a body too short", message(SET_FEATURES, VERSION, &[0; 3])),
        ("a body too long", message(SET_FEATURES, VERSION, &[0; 9])),
        ("a body where none belongs", message(GET_FEATURES, VERSION, &[0; 8])),
    ];
    refused(&messages);
    refused_later(&messages);
}

#[test]
fn vu2_requests_unknown_or_not_offered() {
    let unknown = [0, 7, 45, 255, 4096, u32::MAX].map(|number| (number, message(number, VERSION, &[])));
    refused(&unknown);
    refused_later(&unknown);
    let (_fixture, program) = start();
    let guest = Guest::new();
    let connection = Connection::bare(&program.socket, &guest);
    let offered = connection.vhost.get_features().unwrap();
    drop(connection);
    let never = (0..u64::BITS).filter(|bit| offered >> bit & 1 == 0);
    let features: Vec<_> = never
        .map(|bit| (format!("feature {bit}"), message(SET_FEATURES, VERSION, &le64(&[offered | 1 << bit]))))
        .collect();
    assert!(features.len() > 50);
    refused(&features);
    refused_later(&features);
}

/// The library lets a frontend take protocol features that were not offered, and talk before SET_OWNER. Neither gives it anything.
#[test]
fn vu2_what_the_library_lets_pass_gives_nothing() {
    let (_fixture, mut program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    // Without SET_OWNER.
    let stream = raw_connection(&program.socket);
    let mut vhost = Frontend::from_stream(stream, 2);
    assert!(vhost.get_features().unwrap() & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
    assert!(!vhost.get_protocol_features().unwrap().contains(VhostUserProtocolFeatures::all()));
    vhost.set_owner().unwrap();
    assert!(vhost.set_owner().is_ok(), "no answer was asked for");
    assert!(vhost.get_features().is_err(), "a second SET_OWNER");
    drop(vhost);
    // All protocol features there are, and then all that they are for.
    let guest = Guest::new();
    let (file, _peer) = UnixStream::pair().unwrap();
    let log = tempfile::tempfile().unwrap();
    log.set_len(1 << 20).unwrap();
    let answered = |request: u32, body: &[u8], fds: &[RawFd]| {
        let connection = Connection::bare(&program.socket, &guest);
        take_protocol_features(&connection, u64::MAX);
        taken(&connection, request, body, fds)
    };
    for (what, request, body, fds) in [
        ("a log", 6, le64(&[1 << 20, 0]), vec![log.as_raw_fd()]),
        ("a log of another file", 6, le64(&[1 << 40, 0]), vec![log.as_raw_fd()]),
        ("a log's eventfd", 7, le64(&[0]), vec![log.as_raw_fd()]),
        ("to send an RARP", 19, le64(&[0]), vec![]),
        ("an MTU", 20, le64(&[1500]), vec![]),
        ("an IOTLB message", 22, vec![0; 40], vec![]),
        ("an endianness", 23, le(&[1, 1]), vec![]),
        ("a crypto session", 26, vec![0; 64], vec![]),
        ("postcopy", 28, vec![], vec![]),
        ("postcopy listening", 29, vec![], vec![]),
        ("postcopy's end", 30, vec![], vec![]),
        ("a GPU's socket", 33, vec![], vec![file.as_raw_fd()]),
        ("a status", 39, le64(&[0xf]), vec![]),
        ("the status", 40, vec![], vec![]),
        ("a shared object", 41, vec![1; 16], vec![]),
        ("to move the state", 42, le(&[0, 0]), vec![log.as_raw_fd()]),
        ("whether the state was moved", 43, vec![], vec![]),
        ("shared memory", 44, vec![], vec![]),
    ] {
        assert!(!answered(request, &body, &fds), "{what}");
    }
    // A channel for messages of ours, which there are none of.
    assert!(answered(21, &[], &[file.as_raw_fd()]));
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert!(program.is_running());
    serves(&program);
}

#[test]
fn vu9_ring_255() {
    let mut messages = Vec::new();
    for ring in [2, 31, 32, 63, 64, 127, 128, 254, 255] {
        for (what, request, body) in [
            ("num", 8, le(&[ring, 64])),
            ("address", 9, [le(&[ring, 0]), vec![0; 32]].concat()),
            ("base", 10, le(&[ring, 0])),
            ("get base", 11, le(&[ring, 0])),
            ("kick", 12, le64(&[u64::from(ring) | 256])),
            ("call", 13, le64(&[u64::from(ring) | 256])),
            ("err", 14, le64(&[u64::from(ring) | 256])),
            ("enable", 18, le(&[ring, 1])),
        ] {
            messages.push((format!("{what} {ring}"), message(request, VERSION, &body)));
        }
    }
    for ring in [256, 1 << 16, u32::MAX] {
        for request in [8, 10, 11, 18] {
            messages.push((format!("{request} {ring}"), message(request, VERSION, &le(&[ring, 1]))));
        }
    }
    refused_later(&messages);
}

#[test]
fn vu13_inflight_is_not_offered() {
    let mut messages = Vec::new();
    // mmap size and offset, queues, queue size: sound ones, and some that are not.
    for body in [
        [le64(&[4096, 0]), vec![2, 0, 64, 0, 0, 0, 0, 0]].concat(),
        [le64(&[0, 0]), vec![0; 8]].concat(),
        [le64(&[u64::MAX, u64::MAX]), vec![0xff; 8]].concat(),
        vec![0; 24],
    ] {
        messages.push((format!("get {body:?}"), message(31, VERSION, &body)));
        messages.push((format!("set {body:?}"), message(32, VERSION, &body)));
    }
    refused(&messages);
    refused_later(&messages);
    // With a region, which says version 9 and is scribbled all over; also by a frontend that took what was not offered.
    let (_fixture, program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let mut region = tempfile::tempfile().unwrap();
    region.write_all(&[9; 4096]).unwrap();
    let guest = Guest::new();
    let body = [le64(&[4096, 0]), vec![2, 0, 64, 0, 0, 0, 0, 0]].concat();
    for take in [false, true] {
        for request in [31, 32] {
            let connection = Connection::bare(&program.socket, &guest);
            if take {
                take_protocol_features(&connection, u64::MAX);
            }
            let fds = if request == 32 { vec![region.as_raw_fd()] } else { vec![] };
            assert!(!taken(&connection, request, &body, &fds), "{request}");
        }
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    serves(&program);
}

/// Sends messages with more descriptors than belong to them, 10,000 in all.
#[test]
fn vu10_surplus_descriptors() {
    let (_fixture, mut program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let file = tempfile::tempfile().unwrap();
    let guest = Guest::new();
    let mut sent = 0;
    // Those that hold no more than one: the one before must go.
    let connection = Connection::bare(&program.socket, &guest);
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    for _ in 0..2000 {
        connection.vhost.set_vring_call(REQUEST, &call).unwrap();
        connection.vhost.set_vring_call(HIPRIO, &call).unwrap();
        connection.vhost.set_vring_err(REQUEST, &call).unwrap();
        connection.vhost.set_vring_kick(REQUEST, &call).unwrap();
        sent += 4;
    }
    for _ in 0..500 {
        connection.vhost.set_mem_table(&[guest.region()]).unwrap();
        sent += 1;
    }
    // One region's, and two queues'.
    let now = program.descriptors();
    assert!(now <= before.map(|before| before + 10), "{now:?} where there were {before:?}");
    assert!(program.guest_mappings() <= 1);
    drop(connection);
    // Those that are refused, at once and after the handshake; with up to more than a message may hold.
    for request in 0..=45 {
        for (body, count) in [(0, 1), (0, 8), (8, 2), (8, 32), (8, 33), (40, 2), (40, 253), (32, 3)] {
            for later in [false, true] {
                let stream = if later {
                    Connection::bare(&program.socket, &guest).stream
                } else {
                    raw_connection(&program.socket)
                };
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let bytes = message(request, VERSION, &[0; 40][..body]);
                for _ in 0..3 {
                    // The program may have hung up already.
                    let _ = stream.send_with_fds(&[&bytes[..]], &vec![file.as_raw_fd(); count]);
                    sent += 1;
                }
                let _ = stream.shutdown(Shutdown::Write);
                assert!(hung_up(stream), "{request}, {body} bytes, {count} descriptors");
            }
        }
    }
    assert!(sent > 10_000, "{sent}");
    assert!(program.is_running());
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert_eq!(program.guest_mappings(), 0);
    serves(&program);
    let (_, lines) = program.terminate();
    assert!(lines.len() as u64 <= 4 + seconds(&lines), "{lines:#?}");
}

/// A whole session, message by message, with the descriptors of each.
fn script(guest: &Guest, kick: RawFd, call: RawFd) -> Vec<(Vec<u8>, Vec<RawFd>)> {
    let region = guest.region();
    let mut script = vec![
        (3, vec![], vec![]),
        (GET_FEATURES, vec![], vec![]),
        (15, vec![], vec![]),
        (SET_PROTOCOL_FEATURES, le64(&[1]), vec![]),
        (SET_FEATURES, le64(&[1 << 29 | 1 << 30 | 1 << 32]), vec![]),
        (5, table(1, &[region]), vec![region.mmap_handle]),
    ];
    for queue in [HIPRIO, REQUEST] {
        let at = Connection::addresses(guest, queue);
        let ring = queue as u32;
        let addresses = le64(&[at.desc_table_addr, at.used_ring_addr, at.avail_ring_addr, 0]);
        script.extend([
            (8, le(&[ring, u32::from(SIZE)]), vec![]),
            (10, le(&[ring, 0]), vec![]),
            (9, [le(&[ring, 0]), addresses].concat(), vec![]),
            (13, le64(&[u64::from(ring)]), vec![call]),
            (12, le64(&[u64::from(ring)]), vec![kick]),
            (18, le(&[ring, 1]), vec![]),
        ]);
    }
    script.push((11, le(&[REQUEST as u32, 0]), vec![]));
    script.into_iter().map(|(request, body, fds)| (message(request, VERSION, &body), fds)).collect()
}

#[test]
fn vu11_disconnect_anywhere() {
    let (_fixture, mut program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let threads = program.threads();
    let guest = Guest::new();
    let (kick, call) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    // There is always a kick.
    kick.write(1).unwrap();
    let script = script(&guest, kick.as_raw_fd(), call.as_raw_fd());
    let mut cuts = 0;
    for (number, (bytes, fds)) in script.iter().enumerate() {
        for end in 0..bytes.len() {
            let stream = raw_connection(&program.socket);
            for (bytes, fds) in &script[..number] {
                stream.send_with_fds(&[&bytes[..]], fds).unwrap();
            }
            if end > 0 {
                stream.send_with_fds(&[&bytes[..end]], fds).unwrap();
            }
            // Sometimes with nothing read, sometimes orderly.
            if cuts % 2 == 0 {
                stream.shutdown(Shutdown::Write).unwrap();
                assert!(hung_up(stream), "message {number}, byte {end}");
            }
            cuts += 1;
        }
    }
    assert!(cuts > 400, "{cuts}");
    assert!(program.is_running());
    wait_for("descriptors to be closed", || program.descriptors() == before);
    wait_for("threads to end", || program.threads() == threads);
    assert_eq!(program.guest_mappings(), 0);
    // And the whole of it is a session.
    let stream = raw_connection(&program.socket);
    for (bytes, fds) in &script {
        stream.send_with_fds(&[&bytes[..]], fds).unwrap();
    }
    let mut replies = [0; 20 + 20 + 20];
    (&stream).read_exact(&mut replies).unwrap();
    assert_eq!(replies[40..], message(11, VERSION | 4, &le(&[REQUEST as u32, 0])));
    drop(stream);
    // A live one: everything set up, a request in the queue.
    for _ in 0..10 {
        let mut guest = Guest::new();
        let connection = Connection::new(&program.socket, &guest);
        getattr(&guest, REQUEST);
        guest.offer(REQUEST, 0);
        connection.kick(REQUEST);
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    wait_for("threads to end", || program.threads() == threads);
    assert_eq!(program.guest_mappings(), 0);
    serves(&program);
}

#[test]
fn vu12_second_frontend_is_refused() {
    let (_fixture, program, mut guest, connection) = connected();
    for _ in 0..5 {
        let begin = Instant::now();
        assert!(hung_up(raw_connection(&program.socket)));
        assert!(begin.elapsed() < Duration::from_secs(5));
        check(&connection, &mut guest);
    }
    assert_eq!(program.stat("lair_virtiofs_refused_connections_total"), 5);
    drop(connection);
    serves(&program);
}

#[test]
fn vu14_a_silent_frontend_costs_nothing() {
    let (_fixture, program) = start();
    let idle = |what: &str| {
        std::thread::sleep(Duration::from_millis(100));
        let before = program.cpu();
        std::thread::sleep(Duration::from_millis(400));
        assert!(program.cpu() - before <= Duration::from_millis(20), "{what}");
    };
    let stream = raw_connection(&program.socket);
    idle("no message");
    (&stream).write_all(&message(GET_FEATURES, VERSION, &[])[..7]).unwrap();
    idle("part of one");
    drop(stream);
    let mut guest = Guest::new();
    let connection = Connection::bare(&program.socket, &guest);
    idle("half a handshake");
    drop(connection);
    let connection = Connection::new(&program.socket, &guest);
    idle("no request");
    connection.init(&mut guest);
    for _ in 0..20 {
        check(&connection, &mut guest);
    }
    idle("after many requests");
    check(&connection, &mut guest);
}
