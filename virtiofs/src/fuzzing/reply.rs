//! What holds for every reply, whatever the request was (row FU21).

use crate::fuse::{
    Opcode, Treatment,
    wire::{Dirent, EntryOut, InHeader, OUT_HEADER, OutHeader},
};
use zerocopy::FromBytes;

/// Checks a reply to a request of which this is the beginning, and which has `total` bytes. There was room for `room`.
pub(super) fn check(request: &[u8], total: u64, room: usize, reply: Option<&[u8]>) {
    if let Some(body) = check_but_names(request, total, room, reply) {
        names(body);
    }
}

/// The same, but for the names in a listing, which may be wrong where the index is. What can be checked is returned.
pub(super) fn check_but_names<'a>(
    request: &[u8],
    total: u64,
    room: usize,
    reply: Option<&'a [u8]>,
) -> Option<Vec<(Option<u64>, &'a [u8])>> {
    let asked = InHeader::read_from_prefix(request).ok().map(|(header, _)| header);
    let opcode = asked.and_then(|header| Opcode::from_wire(header.opcode));
    let silent = opcode.is_some_and(|opcode| opcode.treatment() == Treatment::Silent);
    let Some(reply) = reply else {
        assert!(silent || room < OUT_HEADER, "no reply to {asked:?}");
        return None;
    };
    assert!(!silent, "a reply to {opcode:?}");
    assert!(reply.len() <= room, "{} bytes in room for {room}", reply.len());
    let (header, body) = OutHeader::read_from_prefix(reply).expect("a whole header");
    assert_eq!(header.len as usize, reply.len());
    assert_eq!(header.unique, asked.map_or(0, |asked| asked.unique));
    if header.error != 0 {
        assert!((-4095..0).contains(&header.error), "error {}", header.error);
        assert!(body.is_empty(), "an error with a body");
        return None;
    }
    let asked = asked.expect("no request can be answered without a header");
    assert_eq!(u64::from(asked.len), total, "a request that lies was answered");
    let opcode = opcode.expect("an operation that there is not was answered");
    assert_eq!(opcode.treatment(), Treatment::Served);
    let length = match opcode {
        Opcode::Lookup => 128,
        Opcode::Getattr => 104,
        Opcode::Init => 64,
        Opcode::Statfs => 80,
        Opcode::Open | Opcode::Opendir => 16,
        Opcode::Release | Opcode::Releasedir | Opcode::Destroy => 0,
        Opcode::Readdir | Opcode::Readdirplus => return Some(listing(body, opcode == Opcode::Readdirplus)),
        _ => return None,
    };
    assert_eq!(body.len(), length, "{opcode:?}");
    None
}

/// Takes a listing apart: node ids, if it has any, and names.
fn listing(mut body: &[u8], plus: bool) -> Vec<(Option<u64>, &[u8])> {
    let (mut listed, mut last) = (Vec::new(), 0);
    while !body.is_empty() {
        let mut node = None;
        if plus {
            let (entry, rest) = EntryOut::read_from_prefix(body).expect("a whole entry");
            (node, body) = (Some(entry.nodeid), rest);
        }
        let (dirent, rest) = Dirent::read_from_prefix(body).expect("a whole entry");
        let length = dirent.namelen as usize;
        listed.push((node, &rest[..length]));
        body = &rest[length.next_multiple_of(8)..];
        assert!(dirent.off > last, "the listing goes back");
        last = dirent.off;
    }
    listed
}

/// Checks the names in a listing.
fn names(listed: Vec<(Option<u64>, &[u8])>) {
    for (node, name) in listed {
        assert!((1..=255).contains(&name.len()), "a name of {} bytes", name.len());
        assert!(!name.contains(&b'/') && !name.contains(&0), "{name:?}");
        let own = matches!(name, b"." | b"..");
        assert!(node.is_none_or(|node| (node == 0) == own), "{name:?} is {node:?}");
    }
}
