//! Requests, several in a row.
//!
//! Each is: flags, the room for its reply (16 bits), its length (16 bits), its bytes. Flags: 1 its header's length is made true,
//! 2 there is more room than anybody needs, 4 on a new device before it, 8 on one that was in use before.

use super::{input::Input, reply, world::World};
use crate::{
    files::{Part, Waiting},
    fuse::{Opcode, Outcome, Request, Session},
    index::{Kind, Node},
    stats::Requests,
};
use vm_memory::VolatileSlice;

/// The most requests of one input.
const REQUESTS: usize = 64;

/// Answers the requests of an input.
pub fn fuse(input: &[u8]) {
    let mut input = Input(input);
    let mut session = Session::new();
    let stats = Requests::default();
    for _ in 0..REQUESTS {
        if input.is_empty() {
            return;
        }
        let flags = input.u8();
        let room = usize::from(input.u16());
        let length = usize::from(input.u16());
        let mut request = input.bytes(length).to_vec();
        if flags & 1 != 0
            && let Ok(total) = u32::try_from(request.len())
            && let Some(len) = request.get_mut(..4)
        {
            len.copy_from_slice(&total.to_le_bytes());
        }
        let room = if flags & 2 != 0 { 8 << 20 } else { room };
        if flags & 12 != 0 {
            session = Session::new();
        }
        if flags & 8 != 0 {
            session.resume();
        }
        let answer = answer(&session, &stats, &request, room);
        reply::check(&request, request.len() as u64, room, answer.as_deref());
        // Once more: what was asked before makes no difference.
        let opcode = Request { bytes: &request, total: request.len() as u64 }.opcode();
        if !matches!(opcode, Some(Opcode::Init | Opcode::Destroy)) {
            assert_eq!(super::fuse::answer(&session, &stats, &request, room), answer);
        }
    }
}

/// The reply to a request; `None` for none.
fn answer(session: &Session, stats: &Requests, request: &[u8], room: usize) -> Option<Vec<u8>> {
    let service = &World::get().service;
    let mut reply = Vec::new();
    let whole = Request { bytes: request, total: request.len() as u64 };
    match service.server.handle(&service.server.tree(), session, stats, whole, room, &mut reply) {
        Outcome::Silent => None,
        Outcome::Reply => Some(reply),
        Outcome::Read(read) => {
            let tree = service.server.tree();
            let Some(Node::Inode { inode, .. }) = tree.node(read.node) else { panic!("{read:?}") };
            assert!(matches!(inode.kind(), Kind::File { .. }) && read.length > 0);
            assert!(read.offset.checked_add(u64::from(read.length)).is_some_and(|end| end <= inode.size()));
            let mut content = vec![0; read.length as usize];
            let file = service.files.get(&tree, read.node, true).unwrap().unwrap();
            file.read(
                read.offset,
                Part::all(&[VolatileSlice::from(content.as_mut_slice())]),
                Waiting::Allowed,
            )
            .unwrap();
            reply.extend(content);
            Some(reply)
        }
    }
}
