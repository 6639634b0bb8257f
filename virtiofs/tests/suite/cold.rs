//! Reads that wait for a disk, and reads from mapped files.

use crate::{
    driver::{parse, read_in, request},
    fixture::{HELLO, big, path},
    frontend::{Connection, Guest, PATIENCE, Program, REPLY_AT, REQUEST, REQUEST_AT, wait_for},
    serve::{check, lookup, read, start, tree},
};
use lair_virtiofs::fuse::Opcode;
use nix::{
    errno::Errno,
    fcntl::{PosixFadviseAdvice, posix_fadvise},
};
use std::{fs::File, path::Path};
use vhost::VhostBackend;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

/// Room for each reply, and how far apart requests are.
const APART: u64 = 64 << 10;

/// Drops a file from the page cache.
pub(crate) fn chill(file: &Path) {
    let file = File::open(file).unwrap();
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Offers requests as chains of two descriptors each, all at once, without a kick.
fn offer_all(guest: &mut Guest, requests: &[Vec<u8>]) {
    for (i, bytes) in requests.iter().enumerate() {
        let (i, at) = (i as u16, APART * i as u64);
        guest.write(REQUEST_AT + at, bytes);
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        let ask = Descriptor::new(REQUEST_AT + at, bytes.len() as u32, next, 2 * i + 1);
        guest.descriptor(REQUEST, 2 * i, ask);
        guest.descriptor(REQUEST, 2 * i + 1, Descriptor::new(REPLY_AT + at, APART as u32, write, 0));
        guest.offer(REQUEST, 2 * i);
    }
}

#[test]
fn cold_reads_come_back_whole_and_in_order_with_the_hot_ones_behind_them() {
    let (fixture, program) = start();
    let file = fixture.host(&path(1, "tree")).join("big");
    let whole = big();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let (cold, hot) =
        (lookup(&connection, &mut guest, &tree("big")), lookup(&connection, &mut guest, &tree("bin/hello")));
    for round in 0..20 {
        chill(&file);
        let mut requests = Vec::new();
        let mut expected = Vec::new();
        for i in 0..16 {
            // Apart, so that reading one ahead does not bring the others.
            let (node, content) =
                if i % 2 == 0 { (cold, &whole[i * 90_000..][..5000]) } else { (hot, HELLO) };
            let offset = if i % 2 == 0 { i as u64 * 90_000 } else { 0 };
            requests.push(request(Opcode::Read as u32, node, &read_in(offset, 5000)));
            expected.push(content.to_vec());
        }
        offer_all(&mut guest, &requests);
        connection.kick(REQUEST);
        let mut used = Vec::new();
        wait_for("all replies", || {
            used.extend(guest.take_used(REQUEST));
            if used.len() < requests.len() {
                connection.interrupted(REQUEST, PATIENCE);
            }
            used.len() == requests.len()
        });
        for (i, (head, length)) in used.into_iter().enumerate() {
            assert_eq!(head as usize, 2 * i, "round {round}");
            let reply = guest.bytes(REPLY_AT + APART * i as u64, length as usize);
            assert_eq!(parse(&requests[i], &reply).unwrap(), expected[i], "round {round}, request {i}");
        }
    }
    if program.stat("lair_virtiofs_cold_reads_total") == 0 {
        println!("SKIPPED: reads that wait, as this file system does not forget what was read");
    }
}

#[test]
fn vu15_a_queue_stopped_while_reads_wait_answers_them_when_it_goes_on() {
    let (fixture, program) = start();
    let file = fixture.host(&path(1, "tree")).join("big");
    let whole = big();
    let mut guest = Guest::new();
    let mut connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let node = lookup(&connection, &mut guest, &tree("big"));
    for round in 0..50 {
        chill(&file);
        let offset = |i: usize| i as u64 * 90_000;
        let requests: Vec<_> =
            (0..16).map(|i| request(Opcode::Read as u32, node, &read_in(offset(i), 5000))).collect();
        offer_all(&mut guest, &requests);
        connection.kick(REQUEST);
        std::thread::sleep(std::time::Duration::from_micros(round * 20));
        let base = connection.vhost.get_vring_base(REQUEST).unwrap();
        let published = guest.used_index(REQUEST);
        assert_eq!(base, u32::from(published));
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(guest.used_index(REQUEST), published, "published after the queue was stopped");
        connection.set_up(&guest, REQUEST, base as u16);
        wait_for("the rest", || guest.used_index(REQUEST) == guest.offered(REQUEST));
        for (i, (head, length)) in guest.take_used(REQUEST).into_iter().enumerate() {
            assert_eq!(head as usize, 2 * i);
            let reply = guest.bytes(REPLY_AT + APART * i as u64, length as usize);
            let content = &whole[offset(i) as usize..][..5000];
            assert_eq!(parse(&requests[i], &reply).unwrap(), content, "round {round}, request {i}");
        }
    }
}

#[test]
fn vu11_a_disconnect_while_reads_wait_leaves_nothing_behind() {
    let (fixture, program) = start();
    let file = fixture.host(&path(1, "tree")).join("big");
    for _ in 0..20 {
        let mut guest = Guest::new();
        let connection = Connection::new(&program.socket, &guest);
        connection.init(&mut guest);
        let node = lookup(&connection, &mut guest, &tree("big"));
        chill(&file);
        let requests: Vec<_> =
            (0..16).map(|i| request(Opcode::Read as u32, node, &read_in(i * 90_000, 5000))).collect();
        offer_all(&mut guest, &requests);
        connection.kick(REQUEST);
    }
    wait_for("the memory to be unmapped", || program.has_no_guest());
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    check(&connection, &mut guest);
}

/// Whether the program has mapped the file, if that can be seen.
pub(crate) fn is_mapped(program: &Program, file: &Path) -> Option<bool> {
    Some(program.mappings()?.lines().any(|line| line.ends_with(file.to_str().unwrap())))
}

#[test]
fn fu20_a_mapped_file_is_truncated() {
    let (fixture, program) = start();
    let file = fixture.host(&path(1, "tree")).join("big");
    let whole = big();
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let node = lookup(&connection, &mut guest, &tree("big"));
    assert_ne!(is_mapped(&program, &file), Some(true));
    for i in 0..20 {
        assert!(read(&connection, &mut guest, node, 0, 1 << 20).unwrap() == whole[..1 << 20], "{i}");
    }
    if is_mapped(&program, &file) == Some(false) {
        println!("SKIPPED: files of this file system are not mapped");
        return;
    }
    let end = whole.len() as u64;
    assert_eq!(read(&connection, &mut guest, node, end - 5000, 9000).unwrap(), whole[whole.len() - 5000..]);
    // In mid-page: what follows in that page is zeros in memory, and must not be taken for contents.
    File::options().write(true).open(&file).unwrap().set_len(100_000).unwrap();
    assert_eq!(read(&connection, &mut guest, node, 98_304, 4096), Err(Errno::EIO));
    assert_eq!(read(&connection, &mut guest, node, 200_000, 4096), Err(Errno::EIO));
    assert_eq!(read(&connection, &mut guest, node, 0, 1 << 20), Err(Errno::EIO));
    // What is left of it can be read, and all else goes on.
    assert_eq!(read(&connection, &mut guest, node, 50_000, 50_000).unwrap(), whole[50_000..100_000]);
    check(&connection, &mut guest);
}
