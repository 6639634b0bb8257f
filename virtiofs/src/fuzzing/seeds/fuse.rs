//! Seeds for [`super::super::fuse`].

use super::{Seed, getattr, init, read, request};
use crate::{
    fuse::Opcode,
    fuzzing::world::{World, path},
    index::Tree,
};

const ROOT: u64 = 1;

/// There is room enough.
const ROOMY: u8 = 2;

/// Each with its flags and the room for its reply.
fn several(requests: &[(u8, u16, Vec<u8>)]) -> Vec<u8> {
    let mut input = Vec::new();
    for (flags, room, request) in requests {
        input.push(*flags);
        input.extend(room.to_le_bytes());
        input.extend(u16::try_from(request.len()).unwrap().to_le_bytes());
        input.extend(request);
    }
    input
}

fn roomy(requests: &[Vec<u8>]) -> Vec<u8> {
    let requests: Vec<_> = requests.iter().map(|request| (ROOMY, 0, request.clone())).collect();
    several(&requests)
}

/// After INIT.
fn begun(requests: &[Vec<u8>]) -> Vec<u8> {
    roomy(&[&[init(7, 41, u32::MAX)], requests].concat())
}

fn lookup(parent: u64, name: &[u8]) -> Vec<u8> {
    request(8, Opcode::Lookup as u32, parent, &[name, b"\0"].concat())
}

/// The node ids of some inodes of the world.
struct Nodes {
    tree: u64,
    bin: u64,
    many: u64,
    hello: u64,
    page: u64,
    link: u64,
}

impl Nodes {
    fn of(tree: &Tree) -> Self {
        let find = |parent: u64, name: &str| {
            let id = crate::index::NodeId::from_wire(parent).unwrap();
            let Some(crate::index::Node::Inode { entry, number, .. }) = tree.node(id) else {
                panic!("{parent}")
            };
            let (number, _) = entry.manifest.lookup(number, name.as_bytes()).unwrap().unwrap();
            entry.node(number).unwrap().id().to_wire()
        };
        let top = tree.lookup(path(1, "tree").base_name().as_bytes()).unwrap().id().to_wire();
        let bin = find(top, "bin");
        Self {
            tree: top,
            bin,
            many: find(top, "many"),
            hello: find(bin, "hello"),
            page: find(top, "page"),
            link: find(top, "link"),
        }
    }
}

pub(super) fn seeds() -> Vec<Seed> {
    use Opcode::*;
    let Nodes { tree, bin, many, hello, page, link } = Nodes::of(&World::get().service.server.tree());
    let name = path(1, "tree").base_name().as_bytes().to_vec();
    let all =
        |body: &[u8]| Opcode::ALL.iter().map(|o| request(10, *o as u32, tree, body)).collect::<Vec<_>>();
    vec![
        ("init", roomy(&[init(7, 41, u32::MAX), init(7, 31, 1), init(7, 45, 0)])),
        ("init-versions", roomy(&[init(8, 0, 0), init(6, 41, 0), init(7, 30, 0), init(7, 0, 0)])),
        (
            "init-short",
            roomy(&[request(2, Init as u32, 0, &[7, 0, 0, 0, 41, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0])]),
        ),
        (
            "before-init",
            roomy(&[getattr(ROOT), lookup(ROOT, &name), request(3, Unlink as u32, ROOT, b"x\0")]),
        ),
        (
            "after-destroy",
            begun(&[request(3, Destroy as u32, 0, &[]), getattr(ROOT), init(7, 41, 0), getattr(ROOT)]),
        ),
        (
            "resumed",
            several(&[(ROOMY | 8, 0, getattr(ROOT)), (ROOMY, 0, getattr(hello)), (4, 200, getattr(ROOT))]),
        ),
        (
            "lookup",
            begun(&[lookup(ROOT, &name), lookup(tree, b"bin"), lookup(bin, b"hello"), lookup(bin, b"hi")]),
        ),
        (
            "lookup-missing",
            begun(&[lookup(ROOT, b"x"), lookup(tree, b"x"), lookup(hello, b"x"), lookup(9, b"x")]),
        ),
        (
            "lookup-dots",
            begun(&[lookup(ROOT, b".."), lookup(tree, b".."), lookup(bin, b".."), lookup(hello, b".")]),
        ),
        (
            "lookup-names",
            begun(&[
                lookup(tree, b"a/b"),
                lookup(tree, b""),
                lookup(tree, &[b'n'; 256]),
                lookup(tree, b"odd-\xff"),
            ]),
        ),
        ("lookup-absent-path", begun(&[lookup(ROOT, path(9, "absent").base_name().as_bytes())])),
        ("getattr", begun(&[ROOT, tree, bin, hello, page, link].map(getattr))),
        ("forged-ids", begun(&[0, 2, 1 << 32 | 9999, 4 << 32, u64::MAX, 1 << 63].map(getattr))),
        ("readlink", begun(&[link, hello, ROOT].map(|node| request(5, Readlink as u32, node, &[])))),
        (
            "read",
            begun(&[read(Read, hello, 0, 4096), read(Read, page, 100, 5000), read(Read, page, 5999, 2)]),
        ),
        (
            "read-bounds",
            begun(&[
                read(Read, page, 6000, 1),
                read(Read, page, u64::MAX, 9),
                read(Read, page, 0, u32::MAX),
                read(Read, bin, 0, 9),
            ]),
        ),
        (
            "readdir",
            begun(&[
                read(Readdir, ROOT, 0, 4096),
                read(Readdir, many, 0, 200),
                read(Readdir, many, 20, 4096),
            ]),
        ),
        (
            "readdirplus",
            begun(&[
                read(Readdirplus, tree, 0, 4096),
                read(Readdirplus, many, 5, 400),
                read(Readdirplus, many, 42, 99),
            ]),
        ),
        (
            "readdir-bounds",
            begun(&[
                read(Readdir, many, 0, 1),
                read(Readdir, many, u64::MAX, 4096),
                read(Readdir, hello, 0, 4096),
            ]),
        ),
        (
            "open",
            roomy(&[
                init(7, 41, !(1 << 17 | 1 << 24)),
                request(5, Open as u32, hello, &[0; 8]),
                request(5, Opendir as u32, tree, &[0; 8]),
                request(5, Opendir as u32, ROOT, &[0; 8]),
                request(5, Open as u32, link, &[2; 8]),
            ]),
        ),
        (
            "forget",
            begun(&[
                request(0, Forget as u32, ROOT, &[0xff; 8]),
                request(0, BatchForget as u32, 0, &[0xff; 24]),
                getattr(ROOT),
            ]),
        ),
        ("all-operations", begun(&all(&[0; 40]))),
        ("all-operations-without-a-body", begun(&all(&[]))),
        (
            "operations-that-there-are-not",
            begun(&[0, 7, 19, 54, 4096, u32::MAX].map(|o| request(3, o, ROOT, &[0; 64]))),
        ),
        ("rooms", several(&[0, 15, 16, 17, 119, 120, 1000].map(|room| (8, room, getattr(ROOT))))),
        (
            "rooms-of-a-listing",
            several(&[16, 200, 4111, 4112].map(|room| (8, room, read(Readdirplus, many, 0, 4096)))),
        ),
        ("short-headers", roomy(&[0, 1, 4, 8, 16, 39].map(|length| getattr(ROOT)[..length].to_vec()))),
        (
            "lying-headers",
            begun(
                &[[0; 4], [39, 0, 0, 0], [57, 0, 0, 0], [0xff; 4]]
                    .map(|lie| [&lie[..], &getattr(ROOT)[4..]].concat()),
            ),
        ),
    ]
}
