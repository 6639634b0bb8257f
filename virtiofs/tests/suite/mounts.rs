//! Stores on file systems of all kinds, and file systems that fail: rows ST2 to ST5.

use crate::{
    cold::is_mapped,
    disk::{Disk, Health, mount_at, unmount_lazily, with_own_mounts},
    driver::{c_name, read_in, request, take},
    fixture::{Fixture, HELLO, MANY, big, path},
    frontend::{Connection, Guest, Part, Program, REPLY_AT, REQUEST, REQUEST_AT, wait_for, warning},
    fuse::parse_listing,
    hostile::{seconds, serves},
    serve::{check, lookup, read, tree},
};
use lair_virtiofs::fuse::{Opcode, wire::AttrOut};
use nix::{errno::Errno, mount::MsFlags};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use vhost::VhostBackend;

fn connect(program: &Program) -> (Guest, Connection) {
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    (guest, connection)
}

fn started(fixture: &Fixture) -> (Program, Guest, Connection) {
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    let (guest, connection) = connect(&program);
    (program, guest, connection)
}

/// Moves the store away, so that something can be mounted in its place.
fn move_store(fixture: &Fixture) -> PathBuf {
    let real = fixture.root().join("real");
    fs::rename(fixture.store(), &real).unwrap();
    // It makes the directory anew.
    assert!(fixture.store().exists());
    real
}

/// That a guest sees all of it as it is.
fn check_all(connection: &Connection, guest: &mut Guest) {
    check(connection, guest);
    let (whole, mut content) = (big(), Vec::new());
    let node = lookup(connection, guest, &tree("big"));
    while content.len() < whole.len() {
        content.extend(read(connection, guest, node, content.len() as u64, 100_000).unwrap());
    }
    assert!(content == whole);
    let many = lookup(connection, guest, &tree("many"));
    let listing = request(Opcode::Readdir as u32, many, &read_in(0, 1 << 20));
    assert_eq!(parse_listing(&connection.send(guest, &listing).unwrap(), false).len(), MANY + 2);
    let link = lookup(connection, guest, path(3, "link").base_name());
    let target = connection.send(guest, &request(Opcode::Readlink as u32, link, &[])).unwrap();
    assert_eq!(target, b"/nix/store/elsewhere");
    let top = lookup(connection, guest, path(1, "tree").base_name());
    for name in ["again", "bin/once-more"] {
        let node = lookup(connection, guest, &tree(name));
        assert_eq!(node, lookup(connection, guest, &tree("share/doc/readme")), "hard links");
    }
    let attr: AttrOut =
        take(&connection.send(guest, &request(Opcode::Getattr as u32, top, &[0; 16])).unwrap());
    assert_eq!(attr.attr.mode, 0o040_555);
}

fn link(store: &Path) {
    let top = store.join(path(1, "tree").base_name());
    for name in ["again", "bin/once-more"] {
        fs::hard_link(top.join("share/doc/readme"), top.join(name)).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    let from = from.join(".");
    assert!(Command::new("cp").arg("-a").args([&from, to]).status().unwrap().success());
}

/// A file system in an image, for which there may be no tools here.
fn image(fixture: &Fixture, kind: &str, real: &Path) -> Result<(), String> {
    let image = fixture.root().join("image");
    fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
    let made = Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image).output();
    if !made.is_ok_and(|made| made.status.success()) {
        return Err(format!("there is no working mkfs.{kind}"));
    }
    let mounted =
        Command::new("mount").args(["-t", kind, "-o", "loop"]).args([&image, &fixture.store()]).output();
    let mounted = mounted.map_err(|e| e.to_string())?;
    if !mounted.status.success() {
        return Err(String::from_utf8_lossy(&mounted.stderr).into_owned());
    }
    copy(real, &fixture.store());
    Ok(())
}

/// Where the store, or a part of it, is on another file system: all of it is served. What a file system cannot do is found out.
#[test]
fn st3_stores_on_file_systems_of_all_kinds() {
    let none = MsFlags::empty();
    for kind in ["bind", "tmpfs", "overlay", "fuse", "path", "ext4", "xfs", "btrfs"] {
        with_own_mounts(kind, || {
            let fixture = Fixture::new();
            link(&fixture.store());
            let real = move_store(&fixture);
            let store = fixture.store();
            let mut disk = None;
            let mounted = match kind {
                "bind" => mount_at("", real.to_str().unwrap(), &store, MsFlags::MS_BIND, ""),
                "tmpfs" => mount_at("tmpfs", "store", &store, none, "").inspect(|()| copy(&real, &store)),
                "overlay" => {
                    let upper = fixture.root().join("upper");
                    fs::create_dir(&upper).unwrap();
                    let options = format!("lowerdir={}:{}", real.display(), upper.display());
                    mount_at("overlay", "store", &store, none, &options)
                }
                "fuse" => {
                    Disk::mount(&real, &fixture.view(), &store).map(|mounted| drop(disk.replace(mounted)))
                }
                // One store path is somewhere else.
                "path" => {
                    copy(&real, &store);
                    let at = fixture.host(&path(1, "tree"));
                    mount_at(
                        "",
                        real.join(path(1, "tree").base_name()).to_str().unwrap(),
                        &at,
                        MsFlags::MS_BIND,
                        "",
                    )
                }
                image_of => match image(&fixture, image_of, &real) {
                    Ok(()) => Ok(()),
                    Err(error) => return println!("SKIPPED: a store on {kind}: {error}"),
                },
            };
            if let Err(errno) = mounted {
                return println!("SKIPPED: a store on {kind}, which cannot be mounted here ({errno})");
            }
            let (program, mut guest, connection) = started(&fixture);
            for _ in 0..20 {
                check_all(&connection, &mut guest);
            }
            let mapped = is_mapped(&program, &fixture.host(&path(1, "tree")).join("big"));
            assert!(kind != "fuse" || mapped != Some(true), "it would be in memory twice");
            assert_eq!(program.stat("lair_virtiofs_read_failures_total"), 0, "{kind}");
            let (status, lines) = program.terminate();
            assert_eq!(status, Some(0));
            assert!(lines.iter().all(|line| warning(line).is_none()), "{kind}: {lines:#?}");
        });
    }
    println!("SKIPPED: stores on NFS and ZFS, which need a server or a module");
}

/// A file system of the tests' own serves a store that fails.
fn failing(what: &str, work: impl FnOnce(&Fixture, &Disk) + Send) {
    with_own_mounts(what, || {
        let fixture = Fixture::new();
        let real = move_store(&fixture);
        match Disk::mount(&real, &fixture.view(), &fixture.store()) {
            Ok(disk) => {
                work(&fixture, &disk);
                assert!(disk.device().metadata().is_ok());
            }
            Err(errno) => println!("SKIPPED: {what}, as FUSE cannot be used here ({errno})"),
        }
    });
}

#[test]
fn st4_the_disk_fails() {
    failing("a disk that fails", |fixture, disk| {
        let (mut program, mut guest, connection) = started(fixture);
        check(&connection, &mut guest);
        let node = lookup(&connection, &mut guest, &tree("big"));
        let readme = lookup(&connection, &mut guest, &tree("share/doc/readme"));
        assert!(read(&connection, &mut guest, node, 0, 4096).is_ok());
        disk.set(Health::Fails(Errno::EIO));
        let before = program.descriptors();
        let (mut failed, mut told) = (0, None);
        for round in 0..50 {
            if round == 40 {
                // At most one line a second, and the first was that of the connection.
                std::thread::sleep(Duration::from_millis(1100));
            }
            // Some that were open already, some that were not.
            let offset = 800_000 + round * 4096;
            assert_eq!(read(&connection, &mut guest, node, offset, 4096), Err(Errno::EIO), "{round}");
            assert_eq!(read(&connection, &mut guest, readme, 0, 100), Err(Errno::EIO), "{round}");
            failed += 2;
            // What is in memory is served.
            check(&connection, &mut guest);
            told = Some(program.stat("lair_virtiofs_read_failures_total"));
        }
        assert_eq!(told, Some(failed));
        assert!(program.is_running() && program.descriptors() <= before.map(|before| before + 1));
        // Metadata needs no disk.
        let many = lookup(&connection, &mut guest, &tree("many"));
        assert!(
            connection.send(&mut guest, &request(Opcode::Readdir as u32, many, &read_in(0, 4096))).is_ok()
        );
        // It comes back.
        disk.set(Health::Well);
        assert_eq!(read(&connection, &mut guest, readme, 0, 100).unwrap(), b"read me");
        assert!(read(&connection, &mut guest, node, 800_000, 4096).unwrap() == big()[800_000..][..4096]);
        let (status, lines) = program.terminate();
        assert_eq!(status, Some(0));
        let about = lines.iter().filter(|line| line.contains("Cannot read a file")).count() as u64;
        assert!(about >= 1 && about <= 1 + seconds(&lines), "{lines:#?}");
    });
}

/// Reads that never come back hold up neither the hypervisor nor the next guest.
#[test]
fn st4_the_disk_hangs() {
    failing("a disk that hangs", |fixture, disk| {
        let (program, mut guest, connection) = started(fixture);
        // Such a file system cannot say what is in memory; what was read a few times is taken to be.
        (0..4).for_each(|_| check(&connection, &mut guest));
        let node = lookup(&connection, &mut guest, &tree("big"));
        disk.set(Health::Hangs);
        let published = guest.used_index(REQUEST);
        let bytes = request(Opcode::Read as u32, node, &read_in(0, 4096));
        guest.write(REQUEST_AT, &bytes);
        let parts = [
            Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
            Part { at: REPLY_AT, len: 16 + 4096, write: true },
        ];
        guest.chain(REQUEST, &parts);
        for _ in 0..8 {
            guest.offer(REQUEST, 0);
        }
        connection.kick(REQUEST);
        wait_for("reads to hang", || disk.hanging() > 0);
        let before = program.cpu();
        std::thread::sleep(Duration::from_millis(300));
        assert!(program.cpu() - before <= Duration::from_millis(20), "it spins");
        assert_eq!(guest.used_index(REQUEST), published);
        assert_eq!(connection.vhost.get_vring_base(REQUEST).unwrap(), u32::from(published));
        drop(connection);
        wait_for("the memory to be unmapped", || program.guest_mappings() == 0);
        // The next one is served what is in memory, and what hangs comes when it can.
        serves(&program);
        disk.set(Health::Well);
        wait_for("reads to come back", || disk.hanging() == 0);
        assert_eq!(guest.used_index(REQUEST), published, "answered after the end");
        let (mut guest, connection) = connect(&program);
        let node = lookup(&connection, &mut guest, &tree("big"));
        assert!(read(&connection, &mut guest, node, 0, 4096).unwrap() == big()[..4096]);
    });
}

/// Nothing is served that could not be read whole.
#[test]
fn st4_the_disk_fails_at_the_start() {
    failing("a disk that fails at the start", |fixture, disk| {
        // What is not in the disk's view is not there.
        let view = fixture.view().text() + &format!("{}\n", path(4, "hidden"));
        fs::write(fixture.view_file(), view).unwrap();
        disk.set(Health::Fails(Errno::EIO));
        let output = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"))
            .arg("--socket")
            .arg(fixture.root().join("s"))
            .arg("--source")
            .arg(fixture.store())
            .arg("--view")
            .arg(fixture.view_file())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(!fixture.root().join("s").exists());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("hidden is in none of the store directories"), "{text}");
    });
}

#[test]
fn st5_remounted_and_unmounted_under_the_backend() {
    with_own_mounts("remounting", || {
        let fixture = Fixture::new();
        link(&fixture.store());
        let real = move_store(&fixture);
        let store = fixture.store();
        mount_at("tmpfs", "store", &store, MsFlags::empty(), "").unwrap();
        copy(&real, &store);
        let (mut program, mut guest, connection) = started(&fixture);
        check_all(&connection, &mut guest);
        for flags in [MsFlags::MS_RDONLY, MsFlags::empty(), MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC] {
            mount_at("tmpfs", "store", &store, MsFlags::MS_REMOUNT | flags, "").unwrap();
            check_all(&connection, &mut guest);
        }
        // Nothing of it has a path any more.
        unmount_lazily(&store);
        assert!(!fixture.host(&path(1, "tree")).exists());
        check_all(&connection, &mut guest);
        drop(connection);
        let (mut guest, connection) = connect(&program);
        check_all(&connection, &mut guest);
        // And something else that looks the same is not taken for it.
        fs::create_dir_all(fixture.host(&path(1, "tree")).join("bin")).unwrap();
        fs::write(fixture.host(&path(1, "tree")).join("bin/hello"), "another").unwrap();
        let hello = lookup(&connection, &mut guest, &tree("bin/hello"));
        assert_eq!(read(&connection, &mut guest, hello, 0, 4096).unwrap(), HELLO);
        assert!(program.is_running());
        let (_, lines) = program.terminate();
        assert!(lines.iter().all(|line| warning(line).is_none()), "{lines:#?}");
    });
}

/// Unmounted by force, with whoever answered it gone: what is in memory is served, all else is an error.
#[test]
fn st5_the_file_system_is_gone() {
    failing("a file system that goes", |fixture, disk| {
        let (mut program, mut guest, connection) = started(fixture);
        check(&connection, &mut guest);
        let node = lookup(&connection, &mut guest, &tree("big"));
        assert!(read(&connection, &mut guest, node, 0, 4096).is_ok());
        nix::mount::umount2(
            &fixture.store(),
            nix::mount::MntFlags::MNT_FORCE | nix::mount::MntFlags::MNT_DETACH,
        )
        .unwrap();
        let readme = lookup(&connection, &mut guest, &tree("share/doc/readme"));
        for node in [node, readme] {
            let error = read(&connection, &mut guest, node, 1_000_000, 4096).err();
            if node == readme {
                // Beyond its end.
                continue;
            }
            let errors = [Errno::EIO, Errno::ESTALE, Errno::ENOTCONN, Errno::ECONNABORTED];
            assert!(error.is_some_and(|errno| errors.contains(&errno)), "{error:?}");
        }
        assert!(read(&connection, &mut guest, readme, 0, 100).is_err());
        let name = c_name(b"hello");
        let bin = lookup(&connection, &mut guest, &tree("bin"));
        assert!(connection.send(&mut guest, &request(Opcode::Lookup as u32, bin, &name)).is_ok());
        assert!(program.is_running());
        disk.set(Health::Fails(Errno::EIO));
        let (_, lines) = program.terminate();
        let about = lines.iter().filter(|line| line.contains("Cannot read a file")).count() as u64;
        assert!(about <= 1 + seconds(&lines), "{lines:#?}");
    });
}

/// What appears in the store is not seen before it is granted, and what was there stays.
#[test]
fn st2_a_new_generation_is_built_while_the_vm_runs() {
    let fixture = Fixture::new();
    let (program, mut guest, connection) = started(&fixture);
    let hello = lookup(&connection, &mut guest, &tree("bin/hello"));
    let new = path(7, "generation");
    fs::create_dir(fixture.host(&new)).unwrap();
    fs::write(fixture.host(&new).join("init"), "new").unwrap();
    // The view file on disk says nothing to a backend that runs.
    fs::write(fixture.view_file(), fixture.view().text() + &format!("{new}\n")).unwrap();
    let find = |guest: &mut Guest| {
        let name = c_name(new.base_name().as_bytes());
        connection.send(guest, &request(Opcode::Lookup as u32, 1, &name))
    };
    let root = |guest: &mut Guest| {
        let listing = request(Opcode::Readdir as u32, 1, &read_in(0, 1 << 16));
        parse_listing(&connection.send(guest, &listing).unwrap(), false).len()
    };
    assert_eq!((find(&mut guest), root(&mut guest)), (Err(Errno::ENOENT), 2 + 3));
    assert_eq!(program.control(format!("grant\n{new}\n\n").as_bytes()), "granted 1, refresh yes\n");
    assert!(find(&mut guest).is_ok());
    assert_eq!(root(&mut guest), 2 + 4);
    let init = lookup(&connection, &mut guest, &format!("{}/init", new.base_name()));
    assert_eq!(read(&connection, &mut guest, init, 0, 100).unwrap(), b"new");
    assert_eq!(lookup(&connection, &mut guest, &tree("bin/hello")), hello);
    assert_eq!(read(&connection, &mut guest, hello, 0, 4096).unwrap(), HELLO);
}
