//! Where a hypervisor puts the rings, and what it does to them while they run.

use super::*;

#[test]
fn vu5_ring_sizes() {
    let (_fixture, program) = start();
    let guest = Guest::new();
    for size in [0, 1025, 2048, 32_768, 32_769, 65_536, u32::MAX] {
        let connection = Connection::bare(&program.socket, &guest);
        assert!(!taken(&connection, 8, &le(&[REQUEST as u32, size]), &[]), "{size}");
    }
    serves(&program);
}

/// The library takes a size that is no power of two for none, and keeps the one before. So the ring gets no place.
#[test]
fn vu5_sizes_that_are_no_powers_of_two() {
    let (_fixture, program) = start();
    let guest = Guest::new();
    for size in [3, 63, 65, 100, 1000, 1023] {
        let connection = Connection::bare(&program.socket, &guest);
        connection.vhost.set_vring_num(REQUEST, size).unwrap();
        assert!(
            connection.vhost.set_vring_addr(REQUEST, &Connection::addresses(&guest, REQUEST)).is_err(),
            "{size}"
        );
    }
    // One that follows is taken.
    let mut guest = guest;
    let mut connection = Connection::bare(&program.socket, &guest);
    for queue in [HIPRIO, REQUEST] {
        connection.vhost.set_vring_num(queue, 100).unwrap();
        connection.set_up(&guest, queue, 0);
        connection.vhost.set_vring_enable(queue, true).unwrap();
    }
    connection.init(&mut guest);
    check(&connection, &mut guest);
}

/// Of another size, the queue is somebody else's memory.
#[test]
fn vq16_vu5_the_size_changes_while_the_queue_runs() {
    let (_fixture, program, mut guest, mut connection) = connected();
    for (count, size) in [SIZE / 2, SIZE * 2, 1, 1024].into_iter().enumerate() {
        connection.vhost.set_vring_num(REQUEST, size).unwrap();
        getattr(&guest, REQUEST);
        guest.offer(REQUEST, 0);
        let published = guest.used_index(REQUEST);
        connection.kick(REQUEST);
        wait_for("the queue to be given up", || {
            program.stat("lair_virtiofs_broken_queues_total") == count as u64 + 1
        });
        // For good, also when the size comes back.
        connection.vhost.set_vring_num(REQUEST, SIZE).unwrap();
        connection.kick(REQUEST);
        connection.vhost.set_vring_enable(REQUEST, false).unwrap();
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        connection.kick(REQUEST);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.used_index(REQUEST), published, "{size}");
        // Until it is set up anew.
        let base = connection.vhost.get_vring_base(REQUEST).unwrap();
        assert_eq!(base, u32::from(published), "{size}");
        connection.set_up(&guest, REQUEST, published);
        wait_for("the reply", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        guest.take_used(REQUEST);
        check(&connection, &mut guest);
    }
    let (_, lines) = program.terminate();
    assert!(lines.len() as u64 <= 4 + seconds(&lines), "{lines:#?}");
}

#[test]
fn vu6_ring_addresses() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    let good = Connection::addresses(&guest, REQUEST);
    for (what, addresses) in [
        ("outside", VringConfigData { desc_table_addr: 0x1000, ..good }),
        ("end", VringConfigData { used_ring_addr: guest.region().userspace_addr + MEMORY as u64, ..good }),
        ("misaligned table", VringConfigData { desc_table_addr: good.desc_table_addr + 8, ..good }),
        ("misaligned available", VringConfigData { avail_ring_addr: good.avail_ring_addr + 1, ..good }),
        ("misaligned used", VringConfigData { used_ring_addr: good.used_ring_addr + 2, ..good }),
    ] {
        let connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.set_vring_addr(REQUEST, &addresses).is_err(), "{what}");
    }
    serves(&program);
    // What lies together as no ring can, or goes on where there is no memory, is seen when the ring is started.
    let table = good.desc_table_addr;
    let end = guest.region().userspace_addr + MEMORY as u64;
    let parts = |desc_table_addr, avail_ring_addr, used_ring_addr| VringConfigData {
        desc_table_addr,
        avail_ring_addr,
        used_ring_addr,
        ..good
    };
    let (available, used) = (good.avail_ring_addr, good.used_ring_addr);
    let good_base = guest.region().userspace_addr;
    for (what, addresses) in [
        ("all in one place", parts(table, table, table)),
        ("the table on the available ring", parts(available - 1008, available, used)),
        ("the table on the used ring", parts(used, available, used)),
        ("the rings on each other", parts(table, available, available + 4)),
        ("the table beyond the end", parts(end - 1008, available, used)),
        ("the available ring beyond the end", parts(table, end - 128, used)),
        ("the used ring beyond the end", parts(table, available, end - 512)),
    ] {
        let before = program.stat("lair_virtiofs_broken_queues_total");
        let mut guest = Guest::new();
        getattr(&guest, REQUEST);
        guest.offer(REQUEST, 0);
        let region = guest.region();
        let mut connection = Connection::bare(&program.socket, &guest);
        let moved = |at: u64| at - good_base + region.userspace_addr;
        connection.set_up(&guest, REQUEST, 0);
        let addresses = VringConfigData {
            desc_table_addr: moved(addresses.desc_table_addr),
            avail_ring_addr: moved(addresses.avail_ring_addr),
            used_ring_addr: moved(addresses.used_ring_addr),
            ..addresses
        };
        connection.vhost.set_vring_addr(REQUEST, &addresses).unwrap();
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        connection.kick(REQUEST);
        wait_for(what, || program.stat("lair_virtiofs_broken_queues_total") == before + 1);
        assert!(guest.take_used(REQUEST).is_empty(), "{what}");
        assert!(program.is_running());
    }
    serves(&program);
}

#[test]
fn vu6_a_ring_across_two_regions() {
    let (_fixture, program) = start();
    let guest = Guest::new();
    let whole = guest.region();
    // The second begins in the middle of each part in turn.
    for (broken, middle) in
        [(1, Guest::table(REQUEST) + 512), (2, Guest::available_ring(REQUEST) + 64), (3, USED_RING + 64)]
    {
        let middle = middle.next_multiple_of(4096);
        let split = |begin: u64, size: u64| VhostUserMemoryRegionInfo {
            guest_phys_addr: begin,
            memory_size: size,
            userspace_addr: whole.userspace_addr + begin,
            mmap_offset: begin,
            ..whole
        };
        let regions = [split(0, middle), split(middle, MEMORY as u64 - middle)];
        let mut connection = Connection::bare(&program.socket, &guest);
        connection.vhost.set_mem_table(&regions).unwrap();
        connection.set_up(&guest, REQUEST, 0);
        let at = whole.userspace_addr + middle - 16;
        let mut addresses = Connection::addresses(&guest, REQUEST);
        match broken {
            1 => addresses.desc_table_addr = at,
            2 => addresses.avail_ring_addr = at,
            _ => addresses.used_ring_addr = at,
        }
        connection.vhost.set_vring_addr(REQUEST, &addresses).unwrap();
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") == broken);
    }
    serves(&program);
}

#[test]
fn vu7_base_far_from_the_used_index() {
    let (_fixture, program) = start();
    for base in [1, 40_000, u16::MAX] {
        let mut guest = Guest::new();
        let connection = Connection::with_base(&program.socket, &guest, [base, base]);
        connection.init(&mut guest);
        check(&connection, &mut guest);
    }
    // Numbers that are no index. What counts is the used index, so they change nothing.
    for beyond in [65_536, 65_537, u32::MAX] {
        let mut guest = Guest::new();
        let mut connection = Connection::bare(&program.socket, &guest);
        for queue in [HIPRIO, REQUEST] {
            connection.set_up(&guest, queue, 0);
            (&connection.stream).write_all(&message(10, VERSION, &le(&[queue as u32, beyond]))).unwrap();
            connection.vhost.set_vring_enable(queue, true).unwrap();
        }
        connection.init(&mut guest);
        check(&connection, &mut guest);
    }
    // A used index that the guest scribbled over: the available index is out of reach from there.
    for used in [SIZE + 1, 0x8000] {
        let before = program.stat("lair_virtiofs_broken_queues_total");
        let guest = Guest::new();
        guest.memory.write_obj(used, GuestAddress(USED_RING + 2)).unwrap();
        let _connection = Connection::new(&program.socket, &guest);
        wait_for("the queue to be given up", || {
            program.stat("lair_virtiofs_broken_queues_total") == before + 1
        });
        assert_eq!(guest.used_index(REQUEST), used);
    }
    serves(&program);
}

#[test]
fn vu8_descriptors_that_are_no_eventfds() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    serves(&program);
    let before = program.descriptors_at_rest();
    let file = tempfile::tempfile().unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let set_up = |fd: Option<&dyn AsRawFd>| {
        let mut connection = Connection::bare(&program.socket, &guest);
        connection.set_up(&guest, REQUEST, 0);
        connection.vhost.get_vring_base(REQUEST).unwrap();
        let body = le64(&[REQUEST as u64 | if fd.is_none() { 256 } else { 0 }]);
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        // The library's frontend would check it; the socket under it does not.
        connection.stream.send_with_fds(&[&message(12, VERSION, &body)[..]], &fds).unwrap();
        connection
    };
    // What cannot be waited for is refused at the latest when the queue is enabled.
    for fd in
        [&file as &dyn AsRawFd, &null(), guest.memory.iter().next().unwrap().file_offset().unwrap().file()]
    {
        assert!(set_up(Some(fd)).vhost.set_vring_enable(REQUEST, true).is_err());
    }
    // What can be waited for, but is not the like of an eventfd, costs the connection when it is read, if it costs anything.
    for fd in [&pipe as &dyn AsRawFd, &socket] {
        let mut connection = set_up(Some(fd));
        let _ = connection.vhost.set_vring_enable(REQUEST, true);
    }
    // None: nobody would wake the queue, so it does not run.
    let mut connection = set_up(None);
    connection.vhost.set_vring_enable(REQUEST, true).unwrap();
    assert!(connection.vhost.get_features().is_ok());
    drop(connection);
    // None, but the message does not say so; some, but the message says none.
    for (body, fds) in [(1, vec![]), (1 | 256, vec![pipe.as_raw_fd()]), (1, vec![pipe.as_raw_fd(); 2])] {
        for request in [12, 13, 14] {
            let connection = Connection::bare(&program.socket, &guest);
            assert!(!taken(&connection, request, &le64(&[body]), &fds), "{request} {body} {fds:?}");
        }
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert!(program.is_running());
    serves(&program);
}

#[test]
fn vu8_a_pipe_for_kicks() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    for bytes in [&b""[..], b"x", b"12345678", b"123456789"] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut connection = Connection::bare(&program.socket, &guest);
        connection.set_up(&guest, REQUEST, 0);
        connection.vhost.get_vring_base(REQUEST).unwrap();
        let body = le64(&[REQUEST as u64]);
        connection.stream.send_with_fds(&[&message(12, VERSION, &body)[..]], &[reader.as_raw_fd()]).unwrap();
        let _ = connection.vhost.set_vring_enable(REQUEST, true);
        writer.write_all(bytes).unwrap();
        // At its end, it is readable for ever.
        drop(writer);
        let stream = connection.stream.try_clone().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(hung_up(stream), "{bytes:?}");
        assert!(program.is_running());
    }
    serves(&program);
}

/// The worker must not stay in a read.
#[test]
fn vu8_one_blocking_kick_for_two_queues() {
    let (_fixture, program) = start();
    let kick = EventFd::new(0).unwrap();
    let guest = Guest::new();
    let mut connection = Connection::bare(&program.socket, &guest);
    for queue in [HIPRIO, REQUEST] {
        connection.set_up(&guest, queue, 0);
        connection.vhost.set_vring_kick(queue, &kick).unwrap();
        connection.vhost.set_vring_enable(queue, true).unwrap();
    }
    for _ in 0..50 {
        kick.write(1).unwrap();
        std::thread::sleep(Duration::from_micros(100));
    }
    drop(connection);
    serves(&program);
}

/// Full and blocking: the worker must not stay in a write, whenever it gets it.
#[test]
fn vu8_a_call_that_nobody_reads() {
    let (_fixture, program) = start();
    let full = || {
        let call = EventFd::new(0).unwrap();
        call.write(u64::MAX - 1).unwrap();
        call
    };
    for later in [false, true] {
        let mut guest = Guest::new();
        let mut connection = Connection::bare(&program.socket, &guest);
        connection.set_up(&guest, REQUEST, 0);
        if !later {
            connection.vhost.set_vring_call(REQUEST, &full()).unwrap();
        }
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        getattr(&guest, REQUEST);
        for round in 1..=10 {
            if later {
                connection.vhost.set_vring_call(REQUEST, &full()).unwrap();
            }
            // So that it wants an interrupt for each.
            guest.take_used(REQUEST);
            guest.offer(REQUEST, 0);
            connection.kick(REQUEST);
            wait_for("a reply", || guest.used_index(REQUEST) == round);
        }
        // The connection is not held up either.
        assert_eq!(connection.vhost.get_vring_base(REQUEST).unwrap(), 10);
    }
    serves(&program);
}

#[test]
fn vu15_reset_device_under_load() {
    let (_fixture, program, mut guest, mut connection) = connected();
    let node = lookup(&connection, &mut guest, &tree("big"));
    let features = connection.vhost.get_features().unwrap();
    for round in 0..20 {
        busy(&connection, &mut guest, node);
        std::thread::sleep(Duration::from_micros(round * 50));
        connection.vhost.reset_device().unwrap();
        let published = guest.used_index(REQUEST);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.used_index(REQUEST), published, "published after the reset");
        // Nothing runs before it is set up anew, kicked or not.
        connection.kick(REQUEST);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.used_index(REQUEST), published, "it runs after the reset");
        assert_eq!(connection.vhost.get_vring_base(REQUEST).unwrap(), u32::from(published));
        connection.vhost.set_features(features).unwrap();
        connection.set_up(&guest, REQUEST, published);
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        wait_for("the rest", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        let used = guest.take_used(REQUEST);
        assert_eq!(used, vec![(0, 16 + (1 << 20)); 32], "each once");
    }
    check(&connection, &mut guest);
    drop(connection);
    serves(&program);
}

/// It is obsolete, and back-ends may ignore it, as it comes from frontends that go on.
#[test]
fn vu15_reset_owner_under_load_loses_nothing() {
    let (_fixture, program, mut guest, mut connection) = connected();
    let node = lookup(&connection, &mut guest, &tree("big"));
    for round in 0..10 {
        busy(&connection, &mut guest, node);
        std::thread::sleep(Duration::from_micros(round * 100));
        connection.vhost.reset_owner().unwrap();
        connection.vhost.set_owner().unwrap();
        connection.vhost.set_features(connection.vhost.get_features().unwrap()).unwrap();
        wait_for("the rest", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        assert_eq!(guest.take_used(REQUEST), vec![(0, 16 + (1 << 20)); 32], "each once");
        let base = connection.vhost.get_vring_base(REQUEST).unwrap();
        assert_eq!(base, u32::from(guest.used_index(REQUEST)));
        connection.set_up(&guest, REQUEST, base as u16);
    }
    check(&connection, &mut guest);
    drop(connection);
    serves(&program);
}

/// A worker that has just been woken by the old descriptor finds a new one, on which there is no kick.
#[test]
fn vu15_kicks_beside_restarts() {
    let (_fixture, mut program, mut guest, mut connection) = connected();
    getattr(&guest, REQUEST);
    let connections = program.stat("lair_virtiofs_connections_total");
    for round in 0..2000 {
        guest.offer(REQUEST, 0);
        let kick = connection.kick_of(REQUEST);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..20).for_each(|_| kick.write(1).unwrap()));
            let base = connection.vhost.get_vring_base(REQUEST).unwrap();
            connection.set_up(&guest, REQUEST, base as u16);
        });
        wait_for(&format!("the reply of round {round}"), || {
            guest.used_index(REQUEST) == guest.offered(REQUEST)
        });
        assert_eq!(guest.take_used(REQUEST).len(), 1, "round {round}");
    }
    assert!(program.is_running());
    check(&connection, &mut guest);
    assert_eq!(program.stat("lair_virtiofs_connections_total"), connections);
}
