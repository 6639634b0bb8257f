//! Views that grow and shrink while the guest runs: the server alone, and the control socket of the program.

use crate::{
    driver::{Driver, read_in, request, take},
    fixture::{Fixture, path},
    frontend::{Connection, Guest, Program, REQUEST, wait_for},
    fuse::{ROOT, list, names},
    serve::{check, lookup, start},
};
use lair_virtiofs::{
    files::Files,
    fuse::{DENIED_MAX, Opcode, wire::AttrOut},
    index::Origin,
    store::StorePath,
    view::{FILE_MAX, View},
};
use nix::errno::Errno;
use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::Barrier,
};

fn hidden() -> StorePath {
    path(4, "hidden")
}

/// A server that may come to serve all of a fixture.
struct Growing {
    driver: Driver,
    files: Files,
    fixture: Fixture,
}

impl Growing {
    fn new() -> Self {
        let fixture = Fixture::new();
        let files = Files::open_stores(&[fixture.store()]).unwrap();
        Self { driver: Driver::new(&fixture.store(), &fixture.view()), files, fixture }
    }

    /// How many were new; `None` if it was refused.
    fn grant(&self, paths: &[StorePath]) -> Option<usize> {
        let origin = Origin { stores: self.files.stores(), index: None };
        self.driver.server.replace(|tree| tree.with(origin, paths)).ok().map(|added| added.paths)
    }

    fn revoke(&self, paths: &[StorePath]) -> usize {
        self.driver.server.replace(|tree| Ok::<_, ()>(tree.without(paths))).unwrap()
    }

    fn find(&self, path: &StorePath) -> Result<u64, Errno> {
        self.driver.lookup(ROOT, path.base_name().as_bytes()).map(|entry| entry.nodeid)
    }
}

#[test]
fn granted_paths_appear_and_nothing_else_changes() {
    let growing = Growing::new();
    let driver = &growing.driver;
    let hello = driver.walk(&format!("{}/bin/hello", path(1, "tree").base_name()));
    let before = (driver.getattr(hello).unwrap(), driver.getattr(ROOT).unwrap().attr);
    assert_eq!(before.1.mtime, 4, "three paths came");
    assert_eq!(growing.find(&hidden()), Err(Errno::ENOENT));
    assert_eq!(growing.grant(&[hidden(), path(1, "tree")]), Some(1));
    let node = growing.find(&hidden()).unwrap();
    assert_eq!(driver.read(driver.lookup(node, b"secret").unwrap().nodeid, 0, 100).unwrap(), b"secret");
    assert_eq!(driver.getattr(hello).unwrap(), before.0);
    let root = driver.getattr(ROOT).unwrap();
    assert_eq!((root.attr.mtime, root.attr.ctime, root.attr_valid), (5, 5, 1));
    assert_eq!(root.attr.nlink, before.1.nlink + 1);
    assert_eq!(names(&list(driver, ROOT, 4096, true)).last().unwrap(), hidden().base_name());
    // Again: nothing.
    assert_eq!(growing.grant(&[hidden()]), Some(0));
    assert_eq!(growing.find(&hidden()), Ok(node));
    assert_eq!(driver.getattr(ROOT).unwrap(), root);
}

#[test]
fn all_are_granted_or_none() {
    let growing = Growing::new();
    let root = growing.driver.getattr(ROOT).unwrap();
    assert_eq!(growing.grant(&[hidden(), path(8, "absent")]), None);
    assert_eq!(growing.find(&hidden()), Err(Errno::ENOENT));
    assert_eq!(growing.driver.getattr(ROOT).unwrap(), root);
}

#[test]
fn st8_revoked_ids_are_stale_and_never_another_paths() {
    let growing = Growing::new();
    let driver = &growing.driver;
    let (file, other) = (growing.find(&path(2, "file")).unwrap(), growing.find(&path(3, "link")).unwrap());
    assert_eq!(driver.read(file, 0, 100).unwrap(), b"a file");
    assert_eq!(growing.revoke(&[path(2, "file"), path(2, "file"), path(9, "absent")]), 1);
    assert_eq!(growing.find(&path(2, "file")), Err(Errno::ENOENT));
    for opcode in [Opcode::Getattr, Opcode::Read, Opcode::Lookup, Opcode::Readdir] {
        assert_eq!(driver.call(opcode, file, &read_in(0, 100)), Err(Errno::ESTALE), "{opcode:?}");
    }
    assert_eq!(growing.find(&path(3, "link")), Ok(other));
    let root = driver.getattr(ROOT).unwrap().attr;
    assert_eq!((root.mtime, root.nlink), (5, 3));
    // What is granted next is not taken for it.
    assert_eq!(growing.grant(&[hidden(), path(2, "file")]), Some(2));
    assert_eq!(driver.getattr(file), Err(Errno::ESTALE));
    assert_ne!(growing.find(&path(2, "file")).unwrap(), file);
    assert_eq!(driver.server.tree().inodes() + 1, crate::fuse::all_nodes(driver).len() as u64);
    let all: Vec<_> = [path(1, "tree"), path(2, "file"), path(3, "link"), hidden()].into();
    assert_eq!(growing.revoke(&all), 4);
    assert_eq!(names(&list(driver, ROOT, 4096, false)), [".", ".."]);
    assert_eq!((driver.server.tree().inodes(), driver.getattr(ROOT).unwrap().attr.nlink), (0, 2));
}

#[test]
fn a_listing_goes_on_while_paths_come_and_go() {
    let growing = Growing::new();
    for number in 10..60 {
        fs::write(growing.fixture.host(&path(number, "more")), "").unwrap();
    }
    let more: Vec<_> = (10..60).map(|number| path(number, "more")).collect();
    growing.grant(&more).unwrap();
    let mut seen = Vec::new();
    let mut offset = 0;
    for round in 0.. {
        let body = growing.driver.call(Opcode::Readdir, ROOT, &read_in(offset, 300)).unwrap();
        if body.is_empty() {
            break;
        }
        let listed = crate::fuse::parse_listing(&body, false);
        offset = listed.last().unwrap().dirent.off;
        seen.extend(names(&listed));
        // One that was listed goes, and one that was not; one comes.
        growing.revoke(&[more[round].clone(), more[49 - round].clone()]);
        growing.grant(&[hidden()]).unwrap();
    }
    let left = names(&list(&growing.driver, ROOT, 1 << 16, false));
    assert!(left.len() > 20 && left.len() < 50, "{left:?}");
    for name in &left {
        assert_eq!(seen.iter().filter(|s| *s == name).count(), 1, "{name}");
    }
}

/// Whoever is told that the guest need not refresh can rely on it: no lookup of the name has failed.
#[test]
fn a_lookup_beside_a_grant_is_answered_or_remembered() {
    let growing = Growing::new();
    let path = |number: usize| StorePath::from_base_name(&format!("{number:032}-race")).unwrap();
    const ROUNDS: usize = 500;
    for number in 0..ROUNDS {
        fs::write(growing.fixture.host(&path(number)), "").unwrap();
    }
    let barrier = Barrier::new(2);
    let mut unasked = 0;
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut denied = Vec::new();
            for number in 0..ROUNDS {
                barrier.wait();
                // Some too early, some too late, some just then.
                (0..number % 50 * 200).for_each(|_| std::hint::spin_loop());
                denied.push(growing.find(&path(number)).is_err());
            }
            denied
        });
        let mut refresh = Vec::new();
        for number in 0..ROUNDS {
            let paths = [path(number)];
            barrier.wait();
            growing.grant(&paths).unwrap();
            refresh.push(growing.driver.server.denied().needs_refresh(&paths));
        }
        for (number, (denied, refresh)) in guest.join().unwrap().into_iter().zip(refresh).enumerate() {
            assert!(!denied || refresh, "{number}");
            unasked += usize::from(!denied);
        }
    });
    assert!(unasked > 0, "the guest was always first");
}

fn command(name: &str, paths: &[StorePath]) -> Vec<u8> {
    let lines: String = paths.iter().map(|path| format!("{path}\n")).collect();
    format!("{name}\n{lines}\n").into_bytes()
}

#[test]
fn grant_revoke_and_denied_on_the_control_socket() {
    let (fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    let control = |name: &str, paths: &[StorePath]| program.control(&command(name, paths));
    connection.init(&mut guest);
    fs::write(fixture.host(&path(6, "unasked")), "unasked").unwrap();
    let find = |guest: &mut Guest, path: &StorePath| {
        let name = crate::driver::c_name(path.base_name().as_bytes());
        connection.send(guest, &request(Opcode::Lookup as u32, 1, &name))
    };
    assert_eq!(program.control(b"denied\n"), "denied 0, complete yes\n");
    assert_eq!(find(&mut guest, &hidden()), Err(Errno::ENOENT));
    assert_eq!(find(&mut guest, &path(9, "absent")), Err(Errno::ENOENT));
    let denied = format!("denied 2, complete yes\n{}\n{}\n", hidden(), path(9, "absent"));
    assert_eq!(program.control(b"denied\n"), denied);

    assert_eq!(control("grant", &[path(6, "unasked"), path(1, "tree")]), "granted 1, refresh no\n");
    assert!(find(&mut guest, &path(6, "unasked")).is_ok());
    assert_eq!(control("grant", &[hidden()]), "granted 1, refresh yes\n");
    let secret = lookup(&connection, &mut guest, &format!("{}/secret", hidden().base_name()));
    assert_eq!(crate::serve::read(&connection, &mut guest, secret, 0, 100).unwrap(), b"secret");
    // Who asks again because the answer got lost must be told the same.
    assert_eq!(control("grant", &[hidden()]), "granted 0, refresh yes\n");

    assert_eq!(control("revoke", &[hidden()]), "revoked 1, pages that the guest has cached stay\n");
    assert_eq!(control("revoke", &[hidden()]), "revoked 0, pages that the guest has cached stay\n");
    assert_eq!(crate::serve::read(&connection, &mut guest, secret, 0, 100), Err(Errno::ESTALE));
    assert_eq!(find(&mut guest, &hidden()), Err(Errno::ENOENT));

    // What is refused changes nothing.
    let before = program.stat("lair_virtiofs_view_paths");
    let told = control("grant", &[hidden(), path(9, "absent")]);
    assert_eq!(
        told,
        format!(
            "error: cannot read the metadata: {} is in none of the store directories\n",
            path(9, "absent")
        )
    );
    for (text, answer) in [
        (
            "grant\n\n",
            "error: cannot use the list of store paths: It lists no store paths; a VM that may see nothing cannot run\n",
        ),
        (
            "revoke\n/etc\n\n",
            "error: cannot use the list of store paths: Line 1 is no store path: \"/etc\" is not a path directly below /nix/store\n",
        ),
    ] {
        assert_eq!(program.control(text.as_bytes()), answer);
    }
    let twice = control("grant", &[hidden(), hidden()]);
    assert!(twice.starts_with("error: ") && twice.ends_with("a second time\n"), "{twice}");
    // Cut short: whoever wrote it may have wanted to write more.
    let mut client = UnixStream::connect(program.socket.with_file_name("control")).unwrap();
    client.write_all(format!("grant\n{}\n", hidden()).as_bytes()).unwrap();
    drop(client);
    // Longer than any view file: hung up on, at the limit or when the time is over.
    let mut client = UnixStream::connect(program.socket.with_file_name("control")).unwrap();
    let line = format!("{}\n", hidden()).into_bytes();
    let mut sent = client.write_all(b"grant\n");
    for _ in 0..FILE_MAX as usize / line.len() + 2 {
        sent = sent.and_then(|()| client.write_all(&line));
    }
    let mut answer = Vec::new();
    assert!(sent.is_err() || client.read_to_end(&mut answer).is_err() || answer.is_empty());
    assert_eq!(program.stat("lair_virtiofs_view_paths"), before);
    assert_eq!(find(&mut guest, &hidden()), Err(Errno::ENOENT));
    check(&connection, &mut guest);
}

/// So many that threads look for them: the sandbox must allow that these are made, and that room is made for them.
#[test]
fn many_are_granted_at_once() {
    let (fixture, program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let paths: Vec<_> = (5..=254).map(|number| path(number, "one-of-many")).collect();
    for path in &paths {
        fs::write(fixture.host(path), path.base_name()).unwrap();
    }
    assert_eq!(program.control(&command("grant", &paths)), "granted 250, refresh no\n");
    for path in &paths {
        let node = lookup(&connection, &mut guest, path.base_name());
        let content = crate::serve::read(&connection, &mut guest, node, 0, 100).unwrap();
        assert_eq!(content, path.base_name().as_bytes());
    }
    assert_eq!(program.control(&command("grant", &paths)), "granted 0, refresh no\n");
    check(&connection, &mut guest);
}

#[test]
fn what_was_denied_is_known_as_far_as_it_can_be() {
    let (fixture, mut program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let deny = |connection: &Connection, guest: &mut Guest, number: usize| {
        let name = format!("{number:032}-denied\0");
        let request = request(Opcode::Lookup as u32, 1, name.as_bytes());
        assert_eq!(connection.send(guest, &request), Err(Errno::ENOENT));
    };
    let grant = |program: &Program| program.control(&command("grant", &[path(1, "tree")]));
    (0..DENIED_MAX).for_each(|number| deny(&connection, &mut guest, number));
    assert_eq!(grant(&program), "granted 0, refresh no\n");
    deny(&connection, &mut guest, DENIED_MAX);
    assert_eq!(grant(&program), "granted 0, refresh yes\n");
    assert!(program.control(b"denied\n").starts_with("denied 1024, complete no\n"));
    // A guest that boots anew remembers nothing.
    connection.init(&mut guest);
    assert_eq!(grant(&program), "granted 0, refresh no\n");
    // What a killed backend denied, nobody knows.
    program.kill();
    drop(connection);
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    assert_eq!(grant(&program), "granted 0, refresh yes\n");
    let base = [0, guest.used_index(REQUEST)];
    let connection = Connection::with_base(&program.socket, &guest, base);
    check(&connection, &mut guest);
    assert_eq!(grant(&program), "granted 0, refresh yes\n");
}

#[test]
fn growth_survives_a_restart_with_the_view_file() {
    let (fixture, mut program) = start();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    assert_eq!(program.control(&command("grant", &[hidden()])), "granted 1, refresh no\n");
    let node = lookup(&connection, &mut guest, &format!("{}/secret", hidden().base_name()));
    let text = fixture.view().text() + &format!("{}\n", hidden());
    View::parse(text.as_bytes()).unwrap();
    fs::write(fixture.view_file(), text).unwrap();
    let root = request(Opcode::Getattr as u32, 1, &[0; 16]);
    let before: AttrOut = take(&connection.send(&mut guest, &root).unwrap());
    program.kill();
    drop(connection);
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    let connection = Connection::with_base(&program.socket, &guest, [0, guest.used_index(REQUEST)]);
    assert_eq!(crate::serve::read(&connection, &mut guest, node, 0, 100).unwrap(), b"secret");
    let after: AttrOut = take(&connection.send(&mut guest, &root).unwrap());
    assert_eq!(after, before);
    wait_for("the program", || program.stat("lair_virtiofs_view_paths") == 4);
}
