//! The real program with peers that do not behave: rows VU and VQ.

use crate::{
    driver::request,
    frontend::{
        Connection, Guest, HIPRIO, MEMORY, Part, Program, REPLY_AT, REQUEST, REQUEST_AT, SIZE, hung_up,
        message, null, raw_connection, wait_for,
    },
    serve::{check, start},
};
use lair_virtiofs::fuse::Opcode;
use std::{
    io::Write,
    os::fd::AsRawFd,
    path::Path,
    time::{Duration, Instant},
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, vhost_user::VhostUserFrontend};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{eventfd::EventFd, sock_ctrl_msg::ScmSocket};

const VERSION: u32 = 1;
const GETATTR_ROOM: u32 = 16 + 104;

/// That a new connection is served as if nothing had been.
fn serves(program: &Program) {
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    check(&connection, &mut guest);
}

fn getattr(guest: &Guest, queue: usize) {
    let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
    guest.write(REQUEST_AT, &bytes);
    let parts = [
        Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
        Part { at: REPLY_AT, len: GETATTR_ROOM, write: true },
    ];
    guest.chain(queue, &parts);
}

fn connected() -> (crate::fixture::Fixture, Program, Guest, Connection) {
    let (fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    (fixture, program, guest, connection)
}

/// Sends each message on a connection of its own. That ends, and the program serves the next one.
fn refused(messages: &[(&str, Vec<u8>)]) {
    let (_fixture, mut program) = start();
    for (what, bytes) in messages {
        let mut stream = raw_connection(&program.socket);
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(hung_up(stream), "{what}");
        assert!(program.is_running(), "{what}");
    }
    serves(&program);
}

#[test]
fn vu1_message_headers() {
    refused(&[
        ("version 0", message(1, 0, &[])),
        ("version 2", message(1, 2, &[])),
        ("a reply", message(1, VERSION | 4, &[])),
        ("5 KiB", message(2, VERSION, &[0; 5 << 10])),
        ("a length of 4 GiB", [&message(2, VERSION, &[])[..8], &u32::MAX.to_le_bytes()].concat()),
        ("no body", message(2, VERSION, &[])),
        ("a body too short", message(2, VERSION, &[0; 3])),
        ("a body too long", message(2, VERSION, &[0; 9])),
    ]);
}

#[test]
fn vu2_requests_unknown_or_not_offered() {
    refused(&[
        ("request 0", message(0, VERSION, &[])),
        ("request 4096", message(4096, VERSION, &[])),
        ("before SET_OWNER", message(8, VERSION, &[0, 0, 0, 0, 64, 0, 0, 0])),
        ("features never offered", message(2, VERSION, &u64::MAX.to_le_bytes())),
        ("protocol features never offered", message(16, VERSION, &u64::MAX.to_le_bytes())),
    ]);
}

#[test]
fn vu9_ring_255() {
    let state = |index: u32, value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
    refused(&[
        ("num", message(8, VERSION, &state(255, 64))),
        ("address", message(9, VERSION, &[&state(255, 0)[..], &[0; 32]].concat())),
        ("base", message(10, VERSION, &state(255, 0))),
        ("get base", message(11, VERSION, &state(255, 0))),
        ("get base of the last", message(11, VERSION, &state(u32::MAX, 0))),
        ("kick", message(12, VERSION, &(255u64 | 256).to_le_bytes())),
        ("call", message(13, VERSION, &(255u64 | 256).to_le_bytes())),
        ("err", message(14, VERSION, &(255u64 | 256).to_le_bytes())),
        ("enable", message(18, VERSION, &state(255, 1))),
    ]);
}

#[test]
fn vu13_inflight_is_not_offered() {
    refused(&[("get", message(31, VERSION, &[0; 24])), ("set", message(32, VERSION, &[0; 24]))]);
}

#[test]
fn vu3_memory_tables() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    let good = guest.region();
    let pipe = std::io::pipe().unwrap();
    let short = tempfile::tempfile().unwrap();
    short.set_len(4096).unwrap();
    let second = VhostUserMemoryRegionInfo { guest_phys_addr: MEMORY as u64 - 4096, ..good };
    for (what, regions) in [
        ("size 0", vec![VhostUserMemoryRegionInfo { memory_size: 0, ..good }]),
        ("overflow", vec![VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4096, ..good }]),
        ("user overflow", vec![VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4096, ..good }]),
        ("overlap", vec![good, second]),
        ("unaligned offset", vec![VhostUserMemoryRegionInfo { mmap_offset: 7, memory_size: 4096, ..good }]),
        ("beyond the file", vec![VhostUserMemoryRegionInfo { mmap_offset: 4096, ..good }]),
        ("offset overflow", vec![VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 4095, ..good }]),
        ("short file", vec![VhostUserMemoryRegionInfo { mmap_handle: short.as_raw_fd(), ..good }]),
        ("pipe", vec![VhostUserMemoryRegionInfo { mmap_handle: pipe.0.as_raw_fd(), ..good }]),
        ("null", vec![VhostUserMemoryRegionInfo { mmap_handle: null().as_raw_fd(), ..good }]),
    ] {
        let connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.set_mem_table(&regions).is_err(), "{what}");
        assert!(program.is_running(), "{what}");
    }
    serves(&program);
}

#[test]
fn vu4_memory_regions_added_and_removed() {
    let (_fixture, program, guest, mut connection) = connected();
    let region = guest.region();
    let unknown = VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 40, ..region };
    assert!(connection.vhost.remove_mem_region(&unknown).is_err());
    assert!(connection.vhost.add_mem_region(&region).is_err(), "it overlaps itself");
    drop(connection);
    // The region that holds the live rings goes.
    let mut guest = Guest::new();
    let region = guest.region();
    let mut connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    connection.vhost.remove_mem_region(&region).unwrap();
    getattr(&guest, REQUEST);
    guest.offer(REQUEST, 0);
    connection.kick(REQUEST);
    // The other queue too, if it has not run yet.
    wait_for("the queue to be given up", || program.stat("lair_virtiofs_broken_queues_total") > 0);
    drop(connection);
    serves(&program);
}

#[test]
fn vu5_ring_sizes() {
    let (_fixture, program) = start();
    let guest = Guest::new();
    for size in [0, 1025, 2048, 32_768, u16::MAX] {
        let connection = Connection::bare(&program.socket, &guest);
        assert!(connection.vhost.set_vring_num(REQUEST, size).is_err(), "{size}");
    }
    serves(&program);
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
    // Rings on top of each other, or out of memory at their end: nothing sensible, but nothing bad for us.
    let table = good.desc_table_addr;
    let end = guest.region().userspace_addr + MEMORY as u64 - 16;
    for addresses in [
        VringConfigData { desc_table_addr: table, avail_ring_addr: table, used_ring_addr: table, ..good },
        VringConfigData { desc_table_addr: end, avail_ring_addr: end, used_ring_addr: end, ..good },
    ] {
        let mut connection = Connection::bare(&program.socket, &guest);
        connection.set_up(&guest, REQUEST, 0);
        connection.vhost.set_vring_addr(REQUEST, &addresses).unwrap();
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        connection.kick(REQUEST);
        connection.kick(REQUEST);
        std::thread::sleep(Duration::from_millis(20));
        assert!(program.is_running());
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
    let guest = Guest::new();
    let connection = Connection::bare(&program.socket, &guest);
    let beyond = [(REQUEST as u32).to_le_bytes(), 65_536u32.to_le_bytes()].concat();
    (&connection.stream).write_all(&message(10, VERSION, &beyond)).unwrap();
    drop(connection);
    serves(&program);
}

#[test]
fn vu8_descriptors_that_are_no_eventfds() {
    let (_fixture, mut program) = start();
    let guest = Guest::new();
    let send = |request: u32, fd: &dyn AsRawFd| {
        let connection = Connection::bare(&program.socket, &guest);
        for queue in [HIPRIO, REQUEST] {
            connection.vhost.set_vring_num(queue, SIZE).unwrap();
            connection.vhost.set_vring_addr(queue, &Connection::addresses(&guest, queue)).unwrap();
        }
        let body = (REQUEST as u64).to_le_bytes();
        // The library's frontend would check it; the socket under it does not.
        let bytes = message(request, VERSION, &body);
        connection.stream.send_with_fds(&[&bytes[..]], &[fd.as_raw_fd()]).unwrap();
        connection
    };
    let file = tempfile::tempfile().unwrap();
    drop(send(12, &file));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut connection = send(12, &reader);
    let _ = connection.vhost.set_vring_enable(REQUEST, true);
    writer.write_all(b"x").unwrap();
    drop(writer);
    drop(connection);
    assert!(program.is_running());
    serves(&program);
    // One blocking kick for two queues: the worker must not stay in a read.
    let kick = EventFd::new(0).unwrap();
    let mut guest = Guest::new();
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
    guest.reset();
    serves(&program);
    // A call that nobody reads, full and blocking.
    let connection = {
        let mut connection = Connection::bare(&program.socket, &guest);
        let call = EventFd::new(0).unwrap();
        call.write(u64::MAX - 1).unwrap();
        connection.set_up(&guest, REQUEST, 0);
        connection.vhost.set_vring_call(REQUEST, &call).unwrap();
        connection.vhost.set_vring_enable(REQUEST, true).unwrap();
        connection
    };
    getattr(&guest, REQUEST);
    guest.offer(REQUEST, 0);
    connection.kick(REQUEST);
    wait_for("a reply", || guest.used_index(REQUEST) == 1);
    drop(connection);
    serves(&program);
}

#[test]
fn vu10_surplus_descriptors() {
    let (_fixture, mut program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let file = tempfile::tempfile().unwrap();
    for request in 1..=44 {
        for body in [&[0; 0][..], &[0; 8], &[0; 40]] {
            let stream = raw_connection(&program.socket);
            let bytes = message(request, VERSION, body);
            for _ in 0..3 {
                // The program may have hung up already.
                let _ = stream.send_with_fds(&[&bytes[..]], &[file.as_raw_fd(); 8]);
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(hung_up(stream), "{request}");
        }
    }
    assert!(program.is_running());
    wait_for("descriptors to be closed", || program.descriptors() == before);
}

#[test]
fn vu11_disconnect_anywhere() {
    let (_fixture, program) = start();
    serves(&program);
    let before = program.descriptors_at_rest();
    let guest = Guest::new();
    let region = guest.region();
    let memory: Vec<u8> = [1u64, region.guest_phys_addr, region.memory_size, region.userspace_addr, 0]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    let script = [
        message(3, VERSION, &[]),
        message(1, VERSION, &[]),
        message(2, VERSION, &(1u64 << 30 | 1 << 32).to_le_bytes()),
        message(5, VERSION, &memory),
        message(8, VERSION, &[0, 0, 0, 0, 64, 0, 0, 0]),
        message(10, VERSION, &[0; 8]),
    ]
    .concat();
    for end in (0..script.len()).step_by(3) {
        let mut stream = raw_connection(&program.socket);
        stream.write_all(&script[..end]).unwrap();
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    // And a live one: everything set up, a request in the queue.
    for _ in 0..10 {
        let mut guest = Guest::new();
        let connection = Connection::new(&program.socket, &guest);
        getattr(&guest, REQUEST);
        guest.offer(REQUEST, 0);
        connection.kick(REQUEST);
    }
    wait_for("descriptors to be closed", || program.descriptors() == before);
    assert!(program.has_no_guest());
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
    let stream = raw_connection(&program.socket);
    std::thread::sleep(Duration::from_millis(100));
    let before = program.cpu();
    std::thread::sleep(Duration::from_millis(400));
    assert!(program.cpu() - before <= Duration::from_millis(20));
    drop(stream);
    serves(&program);
}

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
    for jump in [u16::from(SIZE.is_power_of_two()) * (SIZE + 1), 0x8000, u16::MAX] {
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

#[test]
fn vq_bad_chains_cost_only_the_request() {
    let (_fixture, program, mut guest, connection) = connected();
    let hole = MEMORY as u64 + 4096;
    let cases: [(&str, &[Descriptor]); 6] = [
        ("vq1 loop", &[Descriptor::new(REQUEST_AT, 40, 1, 0)]),
        ("vq3 next", &[Descriptor::new(REQUEST_AT, 40, 1, SIZE)]),
        ("vq5 long", &[Descriptor::new(REQUEST_AT, u32::MAX, 0, 0)]),
        ("vq6 hole", &[Descriptor::new(hole, 40, 0, 0)]),
        ("vq7 indirect", &[Descriptor::new(REQUEST_AT, 17, 4, 0)]),
        ("vq8 order", &[Descriptor::new(REPLY_AT, 16, 3, 1), Descriptor::new(REQUEST_AT, 40, 0, 0)]),
    ];
    for (what, descriptors) in &cases {
        for (i, desc) in descriptors.iter().enumerate() {
            guest.descriptor(REQUEST, i as u16, *desc);
        }
        assert_eq!(connection.submit(&mut guest, REQUEST), 0, "{what}");
    }
    assert_eq!(program.stat("lair_virtiofs_bad_chains_total"), cases.len() as u64);
    check(&connection, &mut guest);
}

#[test]
fn vq10_same_head_many_times() {
    let (_fixture, _program, mut guest, connection) = connected();
    getattr(&guest, REQUEST);
    for _ in 0..SIZE {
        guest.offer(REQUEST, 0);
    }
    connection.kick(REQUEST);
    wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    assert_eq!(guest.take_used(REQUEST), vec![(0, GETATTR_ROOM); usize::from(SIZE)]);
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

#[test]
fn vq13_hostile_event_indexes() {
    let (_fixture, _program, mut guest, connection) = connected();
    let used_event = Guest::available_ring(REQUEST) + 4 + 2 * u64::from(SIZE);
    for hostile in [0u16, 1, 0x7fff, 0x8000, u16::MAX] {
        getattr(&guest, REQUEST);
        guest.memory.write_obj(hostile, GuestAddress(used_event)).unwrap();
        guest.offer(REQUEST, 0);
        connection.kick(REQUEST);
        wait_for("the reply", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        // Asked for rightly again, interrupts come again.
        guest.take_used(REQUEST);
        connection.interrupted(REQUEST, Duration::from_millis(5));
        check(&connection, &mut guest);
    }
}

#[test]
fn vq14_kick_storm() {
    let (_fixture, program, mut guest, connection) = connected();
    for _ in 0..20_000 {
        connection.kick(REQUEST);
        connection.kick(HIPRIO);
    }
    check(&connection, &mut guest);
    let (_, lines) = program.terminate();
    assert!(lines.len() <= 4, "{lines:#?}");
}

#[test]
fn vq17_used_ring_never_read() {
    let (_fixture, program, mut guest, connection) = connected();
    getattr(&guest, REQUEST);
    for _ in 0..200 {
        for _ in 0..SIZE {
            guest.offer(REQUEST, 0);
        }
        connection.kick(REQUEST);
        wait_for("all replies", || guest.used_index(REQUEST) == guest.offered(REQUEST));
    }
    assert!(program.stats().contains("opcode=\"getattr\"} 12800\n"));
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
