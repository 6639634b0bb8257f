//! The real program on real virtqueues, with peers that behave.

use crate::{
    driver::{c_name, read_in, request, take},
    fixture::{Fixture, HELLO, MANY, big, path},
    frontend::{Connection, Guest, HIPRIO, Part, Program, REPLY_AT, REQUEST, REQUEST_AT, wait_for, warning},
    hostile::seconds,
};
use lair_virtiofs::{
    files::{OPEN_MAX, RECENT_MAX},
    fuse::{Opcode, wire::EntryOut},
};
use nix::{errno::Errno, sys::stat::Mode};
use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    path::Path,
    time::Duration,
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo,
    vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags},
};

pub(crate) fn start() -> (Fixture, Program) {
    let fixture = Fixture::new();
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    (fixture, program)
}

pub(crate) fn lookup(connection: &Connection, guest: &mut Guest, path: &str) -> u64 {
    path.split('/').fold(1, |node, name| {
        let body =
            connection.send(guest, &request(Opcode::Lookup as u32, node, &c_name(name.as_bytes()))).unwrap();
        take::<EntryOut>(&body).nodeid
    })
}

pub(crate) fn read(
    connection: &Connection,
    guest: &mut Guest,
    node: u64,
    offset: u64,
    size: u32,
) -> Result<Vec<u8>, Errno> {
    connection.send(guest, &request(Opcode::Read as u32, node, &read_in(offset, size)))
}

pub(crate) fn tree(rest: &str) -> String {
    format!("{}/{rest}", path(1, "tree").base_name())
}

/// That a guest gets right answers.
pub(crate) fn check(connection: &Connection, guest: &mut Guest) {
    let hello = lookup(connection, guest, &tree("bin/hello"));
    assert_eq!(read(connection, guest, hello, 0, 4096).unwrap(), HELLO);
}

#[test]
fn a_guest_looks_up_lists_and_reads() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let mut connection = Connection::new(&program.socket, &guest);
    let (_, config) = connection.vhost.get_config(0, 40, VhostUserConfigFlags::empty(), &[0; 40]).unwrap();
    assert_eq!((&config[..6], &config[36..]), (&b"store\0"[..], &[1, 0, 0, 0][..]));
    assert_eq!(connection.vhost.get_queue_num().unwrap(), 2);
    connection.init(&mut guest);
    check(&connection, &mut guest);
    let node = lookup(&connection, &mut guest, &tree("big"));
    let (whole, mut content) = (big(), Vec::new());
    while content.len() < whole.len() {
        content.extend(read(&connection, &mut guest, node, content.len() as u64, 1 << 20).unwrap());
    }
    assert!(content == whole);
    assert_eq!(read(&connection, &mut guest, node, 12_345, 70_001).unwrap(), whole[12_345..][..70_001]);
    let many = lookup(&connection, &mut guest, &tree("many"));
    let listing = request(Opcode::Readdirplus as u32, many, &read_in(0, 1 << 20));
    let body = connection.send(&mut guest, &listing).unwrap();
    assert_eq!(body.len(), (MANY + 2) * (128 + 24 + 8));
    assert_eq!(connection.send(&mut guest, &request(Opcode::Unlink as u32, many, b"x\0")), Err(Errno::EROFS));
    let stats = program.stats();
    assert!(stats.contains("lair_virtiofs_requests_total{opcode=\"readdirplus\"} 1\n"), "{stats}");
    assert!(stats.contains("lair_virtiofs_errors_total{opcode=\"unlink\"} 1\n"), "{stats}");
    assert_eq!(program.stat("lair_virtiofs_view_paths"), 3);
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn forget_is_returned_with_nothing_written() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let bytes = request(Opcode::Forget as u32, 1, &1u64.to_le_bytes());
    guest.write(REQUEST_AT, &bytes);
    guest.chain(HIPRIO, &[Part { at: REQUEST_AT, len: bytes.len() as u32, write: false }]);
    assert_eq!(connection.submit(&mut guest, HIPRIO), 0);
    check(&connection, &mut guest);
}

#[test]
fn many_requests_at_once_are_answered_in_order() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let node = lookup(&connection, &mut guest, &tree("big"));
    let whole = big();
    for round in 0..50 {
        // 16 requests of two descriptors each.
        for i in 0..16u16 {
            let offset = u64::from(i) * 5000 + round;
            let bytes = request(Opcode::Read as u32, node, &read_in(offset, 4096));
            let (at, reply) = (REQUEST_AT + 0x1000 * u64::from(i), REPLY_AT + 0x2000 * u64::from(i));
            guest.write(at, &bytes);
            use virtio_queue::desc::split::Descriptor;
            guest.descriptor(REQUEST, 2 * i, Descriptor::new(at, bytes.len() as u32, 1, 2 * i + 1));
            guest.descriptor(REQUEST, 2 * i + 1, Descriptor::new(reply, 16 + 4096, 2, 0));
            guest.offer(REQUEST, 2 * i);
        }
        connection.kick(REQUEST);
        let mut used = Vec::new();
        while used.len() < 16 {
            used.extend(guest.take_used(REQUEST));
            if used.len() < 16 {
                connection.wait(REQUEST);
                used.extend(guest.take_used(REQUEST));
            }
        }
        let expected: Vec<_> = (0..16).map(|i| (2 * i, 16 + 4096)).collect();
        assert_eq!(used, expected);
        for i in 0..16u64 {
            let content = guest.bytes(REPLY_AT + 0x2000 * i + 16, 4096);
            assert!(content == whole[(i * 5000 + round) as usize..][..4096], "{i}");
        }
    }
}

#[test]
fn serves_again_after_disconnect_and_reboot() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    check(&connection, &mut guest);
    drop(connection);
    let descriptors = program.descriptors_at_rest();
    for _ in 0..20 {
        guest.reset();
        let connection = Connection::new(&program.socket, &guest);
        connection.init(&mut guest);
        check(&connection, &mut guest);
    }
    wait_for("descriptors to be closed", || program.descriptors() == descriptors);
    assert_eq!(program.stat("lair_virtiofs_connections_total"), 21);
    // Files stayed open: one was opened, once.
    assert_eq!(program.stat("lair_virtiofs_opens_total"), 1);
}

#[test]
fn a_queue_resumes_at_the_used_index_after_a_kill() {
    let (fixture, mut program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    check(&connection, &mut guest);
    let node = lookup(&connection, &mut guest, &tree("bin/hello"));
    let published = guest.used_index(REQUEST);
    program.kill();
    drop(connection);
    // Requests that the killed program never answered.
    let bytes = request(Opcode::Read as u32, node, &read_in(0, 4096));
    guest.write(REQUEST_AT, &bytes);
    guest.chain(
        REQUEST,
        &[
            Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
            Part { at: REPLY_AT, len: 16 + 4096, write: true },
        ],
    );
    for _ in 0..3 {
        guest.offer(REQUEST, 0);
    }
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    // The frontend says that all of them were taken, as Cloud Hypervisor does. There is no kick, and no INIT.
    let connection = Connection::with_base(&program.socket, &guest, [0, published.wrapping_add(3)]);
    connection.wait(REQUEST);
    wait_for("the replies", || guest.used_index(REQUEST) == published.wrapping_add(3));
    assert_eq!(guest.take_used(REQUEST), [(0, 16 + HELLO.len() as u32); 3]);
    assert_eq!(guest.bytes(REPLY_AT + 16, HELLO.len()), HELLO);
    check(&connection, &mut guest);
}

#[test]
fn fu14_nothing_before_init_on_a_new_device() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    let getattr = request(Opcode::Getattr as u32, 1, &[0; 16]);
    for number in 0..5 {
        // A kick each, and time to fall asleep between them: what was refused is no earlier use of the queue.
        assert_eq!(connection.send(&mut guest, &getattr), Err(Errno::EIO), "{number}");
        std::thread::sleep(Duration::from_millis(5));
    }
    connection.init(&mut guest);
    assert!(connection.send(&mut guest, &getattr).is_ok());
}

#[test]
fn fu18_open_files_are_bounded() {
    let fixture = Fixture::new();
    let count = OPEN_MAX.get() + 100;
    let more = fixture.host(&path(1, "tree")).join("more");
    fs::create_dir(&more).unwrap();
    for i in 0..count {
        fs::write(more.join(i.to_string()), format!("{i}")).unwrap();
    }
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let before = program.descriptors();
    for i in 0..count {
        let node = lookup(&connection, &mut guest, &tree(&format!("more/{i}")));
        assert_eq!(read(&connection, &mut guest, node, 0, 100).unwrap(), format!("{i}").as_bytes());
    }
    if let (Some(before), Some(after)) = (before, program.descriptors()) {
        assert!(
            (OPEN_MAX.get()..=OPEN_MAX.get() + RECENT_MAX).contains(&(after - before)),
            "{before} {after}"
        );
    }
    assert_eq!(program.stat("lair_virtiofs_opens_total"), count as u64);
    // Those that had to go are opened again, and our own needs are met: a connection, and memory in many pieces.
    drop(connection);
    let mut guest = Guest::new();
    let mut connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    for number in 1..400 {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: (1 << 40) + (number << 20),
            memory_size: 4096,
            userspace_addr: (1 << 40) + (number << 20),
            ..guest.region()
        };
        connection.vhost.add_mem_region(&region).unwrap();
    }
    let node = lookup(&connection, &mut guest, &tree("more/0"));
    assert_eq!(read(&connection, &mut guest, node, 0, 100).unwrap(), b"0");
    assert_eq!(program.stat("lair_virtiofs_read_failures_total"), 0);
    let (_, lines) = program.terminate();
    assert!(lines.iter().all(|line| warning(line).is_none()), "{lines:#?}");
}

/// What became something else on the host is not read, and opening it does not block.
#[test]
fn fu7_what_is_no_regular_file_by_now() {
    let (fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let many = fixture.host(&path(1, "tree")).join("many");
    let device = |at: &Path| {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        // /dev/zero, of which there is no end.
        mknod(at, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 5)).is_ok()
    };
    type Make<'a> = &'a dyn Fn(&Path) -> bool;
    let kinds: [(&str, Make<'_>); 5] = [
        ("FIFO", &|at| nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).is_ok()),
        ("socket", &|at| UnixListener::bind(at).is_ok()),
        ("directory", &|at| fs::create_dir(at).is_ok()),
        ("symbolic link", &|at| symlink("file-299", at).is_ok()),
        ("device", &device),
    ];
    let mut failures = 0;
    for (number, (what, make)) in kinds.into_iter().enumerate() {
        let name = format!("file-{number:03}");
        let node = lookup(&connection, &mut guest, &tree(&format!("many/{name}")));
        fs::remove_file(many.join(&name)).unwrap();
        if !make(&many.join(&name)) {
            println!("SKIPPED: a {what}, which only root can make");
            continue;
        }
        failures += 1;
        assert!(read(&connection, &mut guest, node, 0, 4096).is_err(), "{what}");
        check(&connection, &mut guest);
    }
    assert_eq!(program.stat("lair_virtiofs_read_failures_total"), failures);
}

#[test]
fn fu20_file_truncated_replaced_or_gone() {
    let (fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let host = fixture.host(&path(1, "tree"));
    let big_node = lookup(&connection, &mut guest, &tree("big"));
    assert!(read(&connection, &mut guest, big_node, 0, 4096).is_ok());
    fs::File::options().write(true).open(host.join("big")).unwrap().set_len(100).unwrap();
    assert_eq!(read(&connection, &mut guest, big_node, 0, 4096), Err(Errno::EIO));
    assert_eq!(read(&connection, &mut guest, big_node, 8192, 4096), Err(Errno::EIO));
    // Not open yet: gone, a symbolic link out, a FIFO.
    let readme = lookup(&connection, &mut guest, &tree("share/doc/readme"));
    fs::remove_file(host.join("share/doc/readme")).unwrap();
    assert_eq!(read(&connection, &mut guest, readme, 0, 4096), Err(Errno::ESTALE));
    std::os::unix::fs::symlink("/etc/passwd", host.join("share/doc/readme")).unwrap();
    assert_eq!(read(&connection, &mut guest, readme, 0, 4096), Err(Errno::ESTALE));
    fs::remove_file(host.join("share/doc/readme")).unwrap();
    nix::unistd::mkfifo(&host.join("share/doc/readme"), Mode::from_bits_truncate(0o444)).unwrap();
    assert_eq!(read(&connection, &mut guest, readme, 0, 4096), Err(Errno::EIO));
    fs::rename(host.join("share"), host.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", host.join("share")).unwrap();
    assert_eq!(read(&connection, &mut guest, readme, 0, 4096), Err(Errno::ESTALE));
    // All else goes on.
    check(&connection, &mut guest);
    assert_eq!(program.stat("lair_virtiofs_read_failures_total"), 6);
    let (status, lines) = program.terminate();
    assert_eq!(status, Some(0));
    let about = lines.iter().filter(|l| l.contains("Cannot read a file")).count();
    assert!(about <= 3, "{lines:#?}");
}

#[test]
fn st1_a_store_path_is_collected() {
    let (fixture, mut program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let file = lookup(&connection, &mut guest, path(2, "file").base_name());
    let [open, closed] =
        ["bin/hello", "share/doc/readme"].map(|name| lookup(&connection, &mut guest, &tree(name)));
    assert_eq!(read(&connection, &mut guest, open, 0, 4096).unwrap(), HELLO);
    fs::remove_file(fixture.host(&path(2, "file"))).unwrap();
    for _ in 0..100 {
        assert_eq!(read(&connection, &mut guest, file, 0, 4096), Err(Errno::ESTALE));
        check(&connection, &mut guest);
    }
    // A whole tree. What is open stays readable, and names are known.
    fs::remove_dir_all(fixture.host(&path(1, "tree"))).unwrap();
    assert_eq!(read(&connection, &mut guest, closed, 0, 4096), Err(Errno::ESTALE));
    check(&connection, &mut guest);
    // The same path anew, which is not taken for the old one while that is open.
    fs::create_dir_all(fixture.host(&path(1, "tree")).join("bin")).unwrap();
    fs::write(fixture.host(&path(1, "tree")).join("bin/hello"), "another").unwrap();
    assert_eq!(read(&connection, &mut guest, open, 0, 4096).unwrap(), HELLO);
    assert_eq!(program.stat("lair_virtiofs_read_failures_total"), 101);
    assert!(program.is_running());
    let (status, lines) = program.terminate();
    assert_eq!(status, Some(0));
    let about = lines.iter().filter(|line| line.contains("Cannot read a file")).count() as u64;
    assert!(about <= 1 + seconds(&lines), "{lines:#?}");
}

#[test]
fn vu15_get_vring_base_under_load() {
    let (_fixture, program) = start();
    let mut guest = Guest::new();
    let mut connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let node = lookup(&connection, &mut guest, &tree("big"));
    for _ in 0..20 {
        let bytes = request(Opcode::Read as u32, node, &read_in(0, 1 << 20));
        guest.write(REQUEST_AT, &bytes);
        guest.chain(
            REQUEST,
            &[
                Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
                Part { at: REPLY_AT, len: 16 + (1 << 20), write: true },
            ],
        );
        for _ in 0..32 {
            guest.offer(REQUEST, 0);
        }
        connection.kick(REQUEST);
        std::thread::sleep(Duration::from_micros(300));
        let base = connection.vhost.get_vring_base(REQUEST).unwrap();
        assert_eq!(base, u32::from(guest.used_index(REQUEST)));
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(base, u32::from(guest.used_index(REQUEST)), "published after the queue was stopped");
        // Started again, it goes on where it was.
        connection.set_up(&guest, REQUEST, base as u16);
        wait_for("the rest", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        guest.take_used(REQUEST);
    }
}
