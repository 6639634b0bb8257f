//! The real program with peers that do not behave: rows VU and VQ.

mod memory;
mod messages;
mod queues;
mod rings;

use crate::{
    cold::chill,
    driver::{parse, read_in, request},
    fixture::{big, path},
    frontend::{
        Connection, Guest, HIPRIO, MEMORY, PATIENCE, Part, Program, REPLY_AT, REQUEST, REQUEST_AT, SIZE,
        hung_up, message, null, raw_connection, wait_for,
    },
    serve::{check, lookup, read, start, tree},
};
use lair_virtiofs::fuse::Opcode;
use std::{
    fmt::Display,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::{
    eventfd::{EFD_NONBLOCK, EventFd},
    sock_ctrl_msg::ScmSocket,
};

const VERSION: u32 = 1;

/// Numbers of requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_PROTOCOL_FEATURES: u32 = 16;

const GETATTR_ROOM: u32 = 16 + 104;

/// Where the request queue's used ring is.
const USED_RING: u64 = 0x1_8000;

/// That a new connection is served as if nothing had been.
pub(crate) fn serves(program: &Program) {
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

/// Sends each message on a connection of its own, after `before`. The program hangs up at once, by itself, and serves the next
/// one.
fn refused_after(before: impl Fn(&Program) -> UnixStream, messages: &[(impl Display, Vec<u8>)]) {
    let (_fixture, mut program) = start();
    for (what, bytes) in messages {
        let mut stream = before(&program);
        stream.write_all(bytes).unwrap();
        assert!(hung_up(stream), "{what}");
        assert!(program.is_running(), "{what}");
    }
    serves(&program);
    let (status, lines) = program.terminate();
    assert_eq!(status, Some(0));
    assert!(lines.len() as u64 <= 4 + seconds(&lines), "{lines:#?}");
}

/// How many seconds the lines of a log span, rounded up, judging by the clock's times in them.
pub(crate) fn seconds(lines: &[String]) -> u64 {
    let second = |line: &String| {
        let time = line.split(['T', 'Z']).nth(1)?.split('.').next()?.to_owned();
        let parts: Vec<u64> = time.split(':').map_while(|part| part.parse().ok()).collect();
        parts.into_iter().reduce(|all, part| all * 60 + part)
    };
    let seconds: Vec<u64> = lines.iter().filter_map(second).collect();
    seconds.first().zip(seconds.last()).map_or(0, |(first, last)| (last + 86_400 - first) % 86_400 + 1)
}

/// As the first message.
fn refused(messages: &[(impl Display, Vec<u8>)]) {
    refused_after(|program| raw_connection(&program.socket), messages);
}

/// As a message of a connection whose features and memory are set up.
fn refused_later(messages: &[(impl Display, Vec<u8>)]) {
    let guest = Guest::new();
    refused_after(
        |program| {
            let stream = Connection::bare(&program.socket, &guest).stream;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        },
        messages,
    );
}

/// Takes protocol features, offered or not.
fn take_protocol_features(connection: &Connection, features: u64) {
    (&connection.stream).write_all(&message(SET_PROTOCOL_FEATURES, VERSION, &le64(&[features]))).unwrap();
}

/// Sends a last message, with descriptors. Whether the program took it: it neither said no nor hung up before it answered another
/// one.
fn taken(connection: &Connection, request: u32, body: &[u8], fds: &[RawFd]) -> bool {
    const NEED_REPLY: u32 = 8;
    let stream = &connection.stream;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.send_with_fds(&[&message(request, VERSION | NEED_REPLY, body)[..]], fds).unwrap();
    // A connection that is hung up on may be so before or after this.
    let _ = (&*stream).write_all(&message(GET_FEATURES, VERSION, &[]));
    let _ = stream.shutdown(Shutdown::Write);
    let mut replies = Vec::new();
    match (&*stream).read_to_end(&mut replies) {
        Ok(_) => replies.get(12..20) == Some(&[0; 8]) && replies.get(20) == Some(&(GET_FEATURES as u8)),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            false
        }
    }
}

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn le64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The body of SET_MEM_TABLE.
fn table(count: u32, regions: &[VhostUserMemoryRegionInfo]) -> Vec<u8> {
    let words =
        regions.iter().flat_map(|r| [r.guest_phys_addr, r.memory_size, r.userspace_addr, r.mmap_offset]);
    [le(&[count, 0]), le64(&words.collect::<Vec<_>>())].concat()
}

/// A request as large as any, so that the queue is busy.
fn busy(connection: &Connection, guest: &mut Guest, node: u64) {
    let bytes = request(Opcode::Read as u32, node, &read_in(0, 1 << 20));
    guest.write(REQUEST_AT, &bytes);
    let parts = [
        Part { at: REQUEST_AT, len: bytes.len() as u32, write: false },
        Part { at: REPLY_AT, len: 16 + (1 << 20), write: true },
    ];
    guest.chain(REQUEST, &parts);
    for _ in 0..32 {
        guest.offer(REQUEST, 0);
    }
    connection.kick(REQUEST);
}
