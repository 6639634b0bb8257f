//! Virtqueues of a guest that does not behave.

use super::*;

#[test]
fn vq2_head_outside_the_queue() {
    let (_fixture, program, mut guest, connection) = connected();
    guest.offer(REQUEST, SIZE);
    connection.kick(REQUEST);
    wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") == 1);
    // Nothing more is taken from it.
    getattr(&guest, REQUEST);
    guest.offer(REQUEST, 0);
    let published = guest.used_index(REQUEST);
    connection.kick(REQUEST);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.used_index(REQUEST), published);
    // Until it is set up anew.
    let mut connection = connection;
    connection.vhost.get_vring_base(REQUEST).unwrap();
    guest.reset();
    connection.set_up(&guest, REQUEST, 0);
    connection.init(&mut guest);
    check(&connection, &mut guest);
}

#[test]
fn vq4_avail_index_jump() {
    for jump in [SIZE + 1, 0x7fff, 0x8000, u16::MAX - SIZE, u16::MAX] {
        let (_fixture, program, guest, connection) = connected();
        let index: u16 = guest.memory.read_obj(GuestAddress(Guest::available_ring(REQUEST) + 2)).unwrap();
        let target = GuestAddress(Guest::available_ring(REQUEST) + 2);
        guest.memory.write_obj(index.wrapping_add(jump), target).unwrap();
        connection.kick(REQUEST);
        wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") == 1);
        let before = program.cpu();
        std::thread::sleep(Duration::from_millis(300));
        assert!(program.cpu() - before <= Duration::from_millis(20), "it spins after a jump of {jump}");
        drop(connection);
        let (_, lines) = program.terminate();
        assert!(lines.len() <= 6, "{lines:#?}");
    }
}

#[test]
fn vq9_no_room_for_a_header() {
    let (_fixture, _program, mut guest, connection) = connected();
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    let readable = Part { at: REQUEST_AT, len: bytes.len() as u32, write: false };
    for room in [None, Some(0), Some(1), Some(15)] {
        let parts: Vec<_> =
            [readable].into_iter().chain(room.map(|len| Part { at: REPLY_AT, len, write: true })).collect();
        guest.write(REPLY_AT, &[0xaa; 16]);
        guest.chain(REQUEST, &parts);
        assert_eq!(connection.submit(&mut guest, REQUEST), 0, "{room:?}");
        assert_eq!(guest.bytes(REPLY_AT, 16), [0xaa; 16], "{room:?}");
    }
    // Room for an error only.
    guest.chain(REQUEST, &[readable, Part { at: REPLY_AT, len: GETATTR_ROOM - 1, write: true }]);
    assert_eq!(connection.submit(&mut guest, REQUEST), 16);
    check(&connection, &mut guest);
}

/// What a chain against the rules gets: a used length of 0, and nothing written anywhere.
fn bad_chains(cases: &[(&str, &[Descriptor])]) {
    let (_fixture, program, mut guest, connection) = connected();
    let sound = request(Opcode::Getattr as u32, 1, &[0; 16]);
    for (what, descriptors) in cases {
        guest.write(REQUEST_AT, &sound);
        guest.write(REPLY_AT, &[0xaa; 256]);
        for (i, desc) in descriptors.iter().enumerate() {
            guest.descriptor(REQUEST, i as u16, *desc);
        }
        assert_eq!(connection.submit(&mut guest, REQUEST), 0, "{what}");
        assert_eq!(guest.bytes(REPLY_AT, 256), [0xaa; 256], "{what}");
        assert_eq!(guest.bytes(REQUEST_AT, sound.len()), sound, "{what}");
    }
    assert_eq!(program.stat("lair_virtiofs_bad_chains_total"), cases.len() as u64);
    assert_eq!(program.stat("lair_virtiofs_broken_queues_total"), 0);
    check(&connection, &mut guest);
    let (_, lines) = program.terminate();
    assert!(lines.len() as u64 <= 4 + seconds(&lines), "{lines:#?}");
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn readable(len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor::new(REQUEST_AT, len, flags, next)
}

fn writable(flags: u16, next: u16) -> Descriptor {
    Descriptor::new(REPLY_AT, 256, WRITE | flags, next)
}

#[test]
fn vq1_descriptor_loops() {
    bad_chains(&[
        ("of one", &[readable(40, NEXT, 0)]),
        ("of two", &[readable(40, NEXT, 1), writable(NEXT, 1)]),
        ("of two that write", &[readable(40, NEXT, 1), writable(NEXT, 2), writable(NEXT, 1)]),
        ("of three, with lengths of 0", &[readable(0, NEXT, 1), readable(0, NEXT, 2), readable(0, NEXT, 0)]),
    ]);
}

#[test]
fn vq3_next_outside_the_table() {
    bad_chains(&[
        ("of the request", &[readable(56, NEXT, SIZE)]),
        ("of the reply", &[readable(56, NEXT, 1), writable(NEXT, u16::MAX)]),
        ("far", &[readable(56, NEXT, 0x8000)]),
    ]);
}

#[test]
fn vq5_lengths() {
    // 63 times 16 MiB to write, and one that makes it more than 4 GiB.
    let mut many = vec![readable(56, NEXT, 1)];
    many.extend((1..63).map(|i| Descriptor::new(0, 1 << 24, NEXT | WRITE, i + 1)));
    many.push(Descriptor::new(0, u32::MAX - (62 << 24) + 1, WRITE, 0));
    bad_chains(&[
        ("4 GiB to read", &[readable(u32::MAX, 0, 0)]),
        ("4 GiB to write", &[readable(56, NEXT, 1), Descriptor::new(REPLY_AT, u32::MAX, WRITE, 0)]),
        (
            "above 4 GiB together",
            &[Descriptor::new(0, 1 << 23, NEXT, 1), Descriptor::new(0, u32::MAX, WRITE, 0)],
        ),
        ("many that are 4 GiB together", &many),
        ("beyond the memory by one", &[readable(56, NEXT, 1), Descriptor::new(1, MEMORY as u32, WRITE, 0)]),
    ]);
    // A length of 0 is a request of no bytes.
    let (_fixture, program, mut guest, connection) = connected();
    guest.descriptor(REQUEST, 0, readable(0, NEXT, 1));
    guest.descriptor(REQUEST, 1, writable(0, 0));
    assert_eq!(connection.submit(&mut guest, REQUEST), 16);
    assert_eq!(guest.bytes(REPLY_AT, 8), [16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff], "EIO");
    guest.descriptor(REQUEST, 0, readable(0, 0, 0));
    assert_eq!(connection.submit(&mut guest, REQUEST), 0);
    assert_eq!(program.stat("lair_virtiofs_malformed_requests_total"), 2);
    check(&connection, &mut guest);
}

#[test]
fn vq6_addresses_outside() {
    let end = MEMORY as u64;
    let at = |address| Descriptor::new(address, 4096, WRITE, 0);
    let ask = readable(56, NEXT, 1);
    bad_chains(&[
        ("the request in a hole", &[Descriptor::new(end + 4096, 56, 0, 0)]),
        ("the reply in a hole", &[ask, at(end)]),
        ("half of it", &[ask, at(end - 2048)]),
        ("near the end of all", &[ask, at(u64::MAX - 2048)]),
        ("at the end of all", &[ask, at(u64::MAX)]),
        ("in a BAR", &[ask, at(0xfebf_0000)]),
        ("in the interrupt controller", &[ask, at(0xfee0_0000)]),
    ]);
}

/// Memory with a hole in its middle: a buffer may go from one region to the next, but not over the hole.
#[test]
fn vq6_buffers_across_regions() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let whole = guest.region();
    let part = |begin: u64, end: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: begin,
        memory_size: end - begin,
        userspace_addr: whole.userspace_addr + begin,
        mmap_offset: begin,
        ..whole
    };
    let (middle, hole, end) = (REPLY_AT + 4096, REPLY_AT + 0x30_0000, MEMORY as u64);
    let mut connection = Connection::bare(&program.socket, &guest);
    let regions = [part(0, middle), part(middle, hole), part(hole + 4096, end)];
    connection.vhost.set_mem_table(&regions).unwrap();
    for queue in [HIPRIO, REQUEST] {
        connection.set_up(&guest, queue, 0);
        connection.vhost.set_vring_enable(queue, true).unwrap();
    }
    connection.init(&mut guest);
    check(&connection, &mut guest);
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    let ask = Part { at: REQUEST_AT, len: bytes.len() as u32, write: false };
    for (at, expected) in
        [(middle - 60, GETATTR_ROOM), (hole - GETATTR_ROOM as u64, GETATTR_ROOM), (hole - 60, 0)]
    {
        guest.write(hole - 60, &[0xaa; 200]);
        guest.chain(REQUEST, &[ask, Part { at, len: GETATTR_ROOM, write: true }]);
        assert_eq!(connection.submit(&mut guest, REQUEST), expected, "{at:#x}");
        if expected > 0 {
            assert_eq!(guest.bytes(at, 4), GETATTR_ROOM.to_le_bytes());
        }
        assert_eq!(guest.bytes(hole, 100), [0xaa; 100]);
    }
    check(&connection, &mut guest);
}

#[test]
fn vq7_indirect_tables() {
    let at = |address, len, flags| Descriptor::new(address, len, INDIRECT | flags, 1);
    // In the request's place there is no descriptor that makes sense.
    bad_chains(&[
        ("no length", &[at(REQUEST_AT, 0, 0)]),
        ("17 bytes", &[at(REQUEST_AT, 17, 0)]),
        ("8 bytes", &[at(REQUEST_AT, 8, 0)]),
        ("65,536 descriptors", &[at(REQUEST_AT, 16 << 16, 0)]),
        ("as large as can be", &[at(REQUEST_AT, 0xffff_fff0, 0)]),
        ("with a next", &[at(REQUEST_AT, 16, NEXT), writable(0, 0)]),
        ("in a hole", &[at(MEMORY as u64 + 4096, 16, 0)]),
        ("partly in a hole", &[at(MEMORY as u64 - 16, 32, 0)]),
        ("at the end of all", &[at(u64::MAX - 15, 16, 0)]),
        // Descriptor 0 of it is itself.
        ("nested", &[at(Guest::table(REQUEST), 16, 0)]),
        (
            "nested, in its middle",
            &[at(Guest::table(REQUEST) + 16, 32, 0), readable(40, NEXT, 1), at(REQUEST_AT, 16, 0)],
        ),
    ]);
}

#[test]
fn vq8_read_after_write() {
    bad_chains(&[
        ("at once", &[writable(NEXT, 1), readable(56, 0, 0)]),
        ("later", &[readable(40, NEXT, 1), writable(NEXT, 2), readable(16, NEXT, 3), writable(0, 0)]),
        ("of no length", &[readable(56, NEXT, 1), writable(NEXT, 2), readable(0, 0, 0)]),
    ]);
}

#[test]
fn vq10_same_head_many_times() {
    let (_fixture, program, mut guest, connection) = connected();
    getattr(&guest, REQUEST);
    for _ in 0..SIZE {
        guest.offer(REQUEST, 0);
    }
    connection.kick(REQUEST);
    wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    assert_eq!(guest.take_used(REQUEST), vec![(0, GETATTR_ROOM); usize::from(SIZE)]);
    check(&connection, &mut guest);
    // One more than the size at once breaks the queue.
    let published = guest.used_index(REQUEST);
    let index = GuestAddress(Guest::available_ring(REQUEST) + 2);
    guest.memory.write_obj(published.wrapping_add(SIZE + 1), index).unwrap();
    connection.kick(REQUEST);
    wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") == 1);
    assert_eq!(guest.used_index(REQUEST), published);
}

/// The same request, waiting for a disk as often as the queue allows.
#[test]
fn vq10_same_head_many_times_while_it_waits() {
    let (fixture, _program, mut guest, connection) = connected();
    let node = lookup(&connection, &mut guest, &tree("big"));
    let file = fixture.host(&path(1, "tree")).join("big");
    let bytes = request(Opcode::Read as u32, node, &read_in(0, 5000));
    for _ in 0..10 {
        chill(&file);
        guest.write(REQUEST_AT, &bytes);
        guest.chain(
            REQUEST,
            &[
                Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
                Part { at: REPLY_AT, len: 16 + 5000, write: true },
            ],
        );
        for _ in 0..SIZE {
            guest.offer(REQUEST, 0);
        }
        connection.kick(REQUEST);
        wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        assert_eq!(guest.take_used(REQUEST), vec![(0, 16 + 5000); usize::from(SIZE)]);
        assert_eq!(parse(&bytes, &guest.bytes(REPLY_AT, 16 + 5000)).unwrap(), big()[..5000]);
    }
    check(&connection, &mut guest);
}

#[test]
fn vq11_bytes_change_while_processed() {
    let (_fixture, _program, mut guest, connection) = connected();
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    let readable = Part { at: REQUEST_AT, len: bytes.len() as u32, write: false };
    let memory = guest.memory.clone();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0u32;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                memory.write_obj(value, GuestAddress(REQUEST_AT + u64::from(value >> 27) * 4)).unwrap();
            }
        });
        for _ in 0..300 {
            guest.chain(REQUEST, &[readable, Part { at: REPLY_AT, len: 8192, write: true }]);
            let used = connection.submit(&mut guest, REQUEST) as usize;
            assert!(used == 0 || (16..=8192).contains(&used));
            if used > 0 {
                let reply = guest.bytes(REPLY_AT, used);
                assert_eq!(u32::from_le_bytes(reply[..4].try_into().unwrap()) as usize, used);
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn vq12_buffers_overlap() {
    let (_fixture, mut program, mut guest, connection) = connected();
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    let readable = Part { at: REQUEST_AT, len: bytes.len() as u32, write: false };
    // The reply over the request.
    guest.chain(REQUEST, &[readable, Part { at: REQUEST_AT, len: GETATTR_ROOM, write: true }]);
    assert_eq!(connection.submit(&mut guest, REQUEST), GETATTR_ROOM);
    // And over the ring itself.
    guest.write(REQUEST_AT, &bytes);
    guest.chain(REQUEST, &[readable, Part { at: Guest::table(REQUEST), len: GETATTR_ROOM, write: true }]);
    guest.offer(REQUEST, 0);
    connection.kick(REQUEST);
    std::thread::sleep(Duration::from_millis(20));
    drop(connection);
    assert!(program.is_running());
    serves(&program);
}

/// Two requests with one buffer for both replies, and a reply that lands on the next request.
#[test]
fn vq12_replies_overlap_other_requests() {
    let (_fixture, program, mut guest, connection) = connected();
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    let length = bytes.len() as u32;
    for (first, second) in [(REPLY_AT, REPLY_AT), (REPLY_AT, REPLY_AT + 8), (REQUEST_AT + 0x1000, REPLY_AT)] {
        guest.write(REQUEST_AT, &bytes);
        guest.write(REQUEST_AT + 0x1000, &bytes);
        guest.descriptor(REQUEST, 0, Descriptor::new(REQUEST_AT, length, NEXT, 1));
        guest.descriptor(REQUEST, 1, Descriptor::new(first, GETATTR_ROOM, WRITE, 0));
        guest.descriptor(REQUEST, 2, Descriptor::new(REQUEST_AT + 0x1000, length, NEXT, 3));
        guest.descriptor(REQUEST, 3, Descriptor::new(second, GETATTR_ROOM, WRITE, 0));
        guest.offer(REQUEST, 0);
        guest.offer(REQUEST, 2);
        connection.kick(REQUEST);
        wait_for("both replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        let used = guest.take_used(REQUEST);
        assert_eq!(used[0], (0, GETATTR_ROOM));
        // The second one may have been overwritten before it was taken: then it is malformed.
        assert!(used[1].0 == 2 && matches!(used[1].1, 16 | GETATTR_ROOM), "{used:?}");
    }
    assert_eq!(program.stat("lair_virtiofs_broken_queues_total"), 0);
    check(&connection, &mut guest);
}

#[test]
fn vq13_hostile_event_indexes() {
    let (_fixture, _program, mut guest, connection) = connected();
    let used_event = Guest::available_ring(REQUEST) + 4 + 2 * u64::from(SIZE);
    let avail_event = USED_RING + 4 + 8 * u64::from(SIZE);
    for hostile in [0u16, 1, 0x7fff, 0x8000, u16::MAX] {
        getattr(&guest, REQUEST);
        guest.memory.write_obj(hostile, GuestAddress(used_event)).unwrap();
        // It is the device's to write, which is no reason to rely on it.
        guest.memory.write_obj(hostile, GuestAddress(avail_event)).unwrap();
        guest.offer(REQUEST, 0);
        connection.kick(REQUEST);
        wait_for("the reply", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        // Asked for rightly again, interrupts come again.
        guest.take_used(REQUEST);
        connection.interrupted(REQUEST, Duration::from_millis(5));
        check(&connection, &mut guest);
    }
}

/// With every reply a wish for an interrupt, or with none that makes sense, there are no more interrupts than batches.
#[test]
fn vq13_interrupts_are_few() {
    for event_idx in [false, true] {
        let (_fixture, program) = start();
        let mut guest = Guest::new();
        let mut connection = Connection::bare(&program.socket, &guest);
        let features = connection.vhost.get_features().unwrap();
        let without = features & !(u64::from(!event_idx) << VIRTIO_RING_F_EVENT_IDX);
        connection.vhost.set_features(without).unwrap();
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        connection.set_up(&guest, REQUEST, 0);
        connection.vhost.set_vring_call(REQUEST, &call).unwrap();
        getattr(&guest, REQUEST);
        // All there before the queue runs, so that there are as few batches as can be.
        for _ in 0..SIZE {
            guest.offer(REQUEST, 0);
        }
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        assert_eq!(guest.take_used(REQUEST).len(), usize::from(SIZE));
        connection.vhost.get_vring_base(REQUEST).unwrap();
        let interrupts = call.read().unwrap();
        assert!((1..=4).contains(&interrupts), "{interrupts} with {event_idx}");
    }
}

#[test]
fn vq14_kick_storm() {
    let (_fixture, program, mut guest, connection) = connected();
    let before = program.private_memory();
    let done = AtomicBool::new(false);
    let kicks = [connection.kick_of(REQUEST), connection.kick_of(HIPRIO)];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for kick in &kicks {
                    // Full is as good.
                    (0..1000).for_each(|_| drop(kick.write(1)));
                }
            }
        });
        for _ in 0..50 {
            check(&connection, &mut guest);
        }
        done.store(true, Ordering::Relaxed);
    });
    check(&connection, &mut guest);
    assert!(program.private_memory() < before + (2 << 20));
    // It is over with the storm.
    std::thread::sleep(Duration::from_millis(100));
    let before = program.cpu();
    std::thread::sleep(Duration::from_millis(300));
    assert!(program.cpu() - before <= Duration::from_millis(20), "it spins");
    let (_, lines) = program.terminate();
    assert!(lines.len() <= 4, "{lines:#?}");
}

/// The memory goes and comes back again and again, while requests are answered and reads wait.
#[test]
fn vq15_memory_is_removed_while_the_worker_runs() {
    let (fixture, mut program, mut guest, mut connection) = connected();
    let region = guest.region();
    let file = fixture.host(&path(1, "tree")).join("big");
    let node = lookup(&connection, &mut guest, &tree("big"));
    let before = program.stat("lair_virtiofs_broken_queues_total");
    let mut broken = 0;
    for round in 0..60 {
        if round % 2 == 0 {
            chill(&file);
        }
        busy(&connection, &mut guest, node);
        std::thread::sleep(Duration::from_micros(round * 30));
        connection.vhost.remove_mem_region(&region).unwrap();
        assert!(program.is_running(), "round {round}");
        connection.kick(REQUEST);
        // A burst that had begun goes on in the memory as it was, and is the last one.
        std::thread::sleep(Duration::from_millis(3));
        connection.vhost.add_mem_region(&region).unwrap();
        let base = connection.vhost.get_vring_base(REQUEST).unwrap();
        broken += u64::from(guest.used_index(REQUEST) != guest.offered(REQUEST));
        // What was taken by one that was cut short is taken again: the frontend goes on at the used index, whatever was said.
        assert!(base <= u32::from(guest.used_index(REQUEST)), "round {round}");
        connection.set_up(&guest, REQUEST, base as u16);
        wait_for("the rest", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        let used = guest.take_used(REQUEST);
        assert_eq!(used, vec![(0, 16 + (1 << 20)); 32], "round {round}");
        assert!(guest.bytes(REPLY_AT + 16, 1 << 20) == big()[..1 << 20], "round {round}");
    }
    assert!(broken > 0, "it always was too late");
    assert!(program.stat("lair_virtiofs_broken_queues_total") > before);
    assert_eq!(program.guest_mappings(), 1);
    check(&connection, &mut guest);
    drop(connection);
    wait_for("the memory to be unmapped", || program.guest_mappings() == 0);
    serves(&program);
    let (_, lines) = program.terminate();
    assert!(lines.len() as u64 <= 4 + seconds(&lines), "{lines:#?}");
}

#[test]
fn vq17_used_ring_never_read() {
    let (_fixture, program, mut guest, connection) = connected();
    getattr(&guest, REQUEST);
    let before = program.private_memory();
    for _ in 0..400 {
        for _ in 0..SIZE {
            guest.offer(REQUEST, 0);
        }
        connection.kick(REQUEST);
        wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    }
    assert!(program.stats().contains("opcode=\"getattr\"} 25600\n"));
    assert!(program.private_memory() < before + (2 << 20), "{before} and then {}", program.private_memory());
}

#[test]
fn fu15_two_requests_with_one_unique() {
    let (_fixture, _program, mut guest, connection) = connected();
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    for i in [0u16, 2] {
        guest.descriptor(REQUEST, i, Descriptor::new(REQUEST_AT, bytes.len() as u32, NEXT, i + 1));
        let at = REPLY_AT + 0x1000 * u64::from(i);
        guest.descriptor(REQUEST, i + 1, Descriptor::new(at, GETATTR_ROOM, WRITE, 0));
        guest.offer(REQUEST, i);
    }
    connection.kick(REQUEST);
    wait_for("both replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    assert_eq!(guest.take_used(REQUEST), [(0, GETATTR_ROOM), (2, GETATTR_ROOM)]);
    let reply = guest.bytes(REPLY_AT, GETATTR_ROOM as usize);
    assert!(parse(&bytes, &reply).is_ok());
    assert_eq!(guest.bytes(REPLY_AT + 0x2000, GETATTR_ROOM as usize), reply);
}

#[test]
fn a_long_write_is_refused_without_being_copied() {
    let (_fixture, _program, mut guest, connection) = connected();
    let bytes = request(Opcode::Write as u32, 1, &vec![7; 1 << 20]);
    guest.write(REQUEST_AT, &bytes);
    let parts = [
        Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
        Part { at: REPLY_AT, len: 24, write: true },
    ];
    guest.chain(REQUEST, &parts);
    assert_eq!(connection.submit(&mut guest, REQUEST), 16);
    assert_eq!(guest.bytes(REPLY_AT + 4, 4), (-30i32).to_le_bytes());
}

#[test]
fn the_control_socket_cannot_be_held() {
    let (_fixture, program, mut guest, connection) = connected();
    let control = program.socket.with_file_name("control");
    let dawdlers: Vec<_> =
        (0..3).map(|_| std::os::unix::net::UnixStream::connect(&control).unwrap()).collect();
    check(&connection, &mut guest);
    assert!(program.stats().contains("lair_virtiofs_view_paths 3\n"));
    drop(dawdlers);
    let unknown = "error: unknown command \"halt\"; there are stats, denied, grant and revoke\n";
    assert_eq!(program.control(b"halt\n"), unknown);
    assert_eq!(program.control(&[b'x'; 64]), "");
    assert_eq!(program.control(&[&[b'x'; 64][..], b"\n"].concat()), "");
    assert!(Path::new(&control).exists());
    check(&connection, &mut guest);
}
