//! The FUSE server alone: every operation, and rows FU1 to FU17 and FU19.

use crate::{
    driver::{Driver, OFFERED, ROOM, c_name, init_request, parse, read_in, request, take},
    fixture::{Fixture, HELLO, MANY, ODD_NAME, big, path},
};
use lair_virtiofs::{
    fuse::{
        Opcode, Outcome, Request, Session, Treatment,
        wire::{Dirent, EntryOut, InHeader, InitIn, InitOut, OpenOut, StatfsOut, flag},
    },
    index::NodeId,
    store::StorePath,
    view::View,
};
use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

pub(crate) const ROOT: u64 = 1;
const FOREVER: u64 = 1_000_000_000;

fn start() -> (Fixture, Driver) {
    let fixture = Fixture::new();
    let driver = Driver::new(&fixture.store(), &fixture.view());
    (fixture, driver)
}

fn tree(rest: &str) -> String {
    format!("{}{rest}", path(1, "tree").base_name())
}

pub(crate) struct Listed {
    pub(crate) name: Vec<u8>,
    pub(crate) dirent: Dirent,
    pub(crate) entry: Option<EntryOut>,
}

pub(crate) fn parse_listing(mut body: &[u8], plus: bool) -> Vec<Listed> {
    let mut listed = Vec::new();
    while !body.is_empty() {
        let entry = plus.then(|| {
            let (entry, rest) = EntryOut::read_from_prefix(body).unwrap();
            body = rest;
            entry
        });
        let (dirent, rest) = Dirent::read_from_prefix(body).unwrap();
        let padded = (dirent.namelen as usize).next_multiple_of(8);
        listed.push(Listed { name: rest[..dirent.namelen as usize].to_vec(), dirent, entry });
        body = &rest[padded..];
    }
    listed
}

/// Lists a directory in pieces of `size` bytes.
pub(crate) fn list(driver: &Driver, node: u64, size: u32, plus: bool) -> Vec<Listed> {
    let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let offset = all.last().map_or(0, |l| l.dirent.off);
        let body = driver.call(opcode, node, &read_in(offset, size)).unwrap();
        assert!(body.len() <= size as usize);
        if body.is_empty() {
            return all;
        }
        all.extend(parse_listing(&body, plus));
    }
}

pub(crate) fn names(listed: &[Listed]) -> Vec<String> {
    listed.iter().map(|l| String::from_utf8_lossy(&l.name).into_owned()).collect()
}

#[test]
fn root_shows_exactly_the_view() {
    let (fixture, driver) = start();
    let view = fixture.view();
    let expected: Vec<_> =
        [".", ".."].into_iter().chain(view.paths().iter().map(StorePath::base_name)).collect();
    assert_eq!(names(&list(&driver, ROOT, 4096, false)), expected);
    for l in list(&driver, ROOT, 4096, true).iter().skip(2) {
        assert_eq!(driver.lookup(ROOT, &l.name).unwrap(), l.entry.unwrap());
    }
    assert_eq!(driver.getattr(ROOT).unwrap().attr_valid, 1);
}

#[test]
fn attributes_are_normalised() {
    let (_fixture, driver) = start();
    for (name, mode, size, nlink) in [
        ("", 0o040_555, 0, 6),
        ("/empty", 0o040_555, 0, 2),
        ("/share", 0o040_555, 0, 3),
        ("/bin/hello", 0o100_555, HELLO.len() as u64, 1),
        ("/share/doc/readme", 0o100_444, 7, 1),
        ("/link", 0o120_777, 9, 1),
    ] {
        let node = driver.walk(&tree(name));
        let out = driver.getattr(node).unwrap();
        let a = out.attr;
        assert_eq!((a.mode, a.size, a.nlink), (mode, size, nlink), "{name}");
        assert_eq!((a.uid, a.gid, a.rdev, a.flags), (0, 0, 0, 0), "{name}");
        assert_eq!([a.atime, a.mtime, a.ctime], [1; 3], "{name}");
        assert_eq!(a.blocks, size.div_ceil(512), "{name}");
        assert_eq!((out.attr_valid, out.attr_valid_nsec), (FOREVER, 0), "{name}");
        assert!(a.ino < 1 << 44, "{name}");
    }
}

#[test]
fn inode_numbers_are_unique() {
    let (_fixture, driver) = start();
    let mut seen = std::collections::HashSet::from([driver.getattr(ROOT).unwrap().attr.ino]);
    let mut todo = vec![ROOT];
    while let Some(node) = todo.pop() {
        for l in list(&driver, node, 65_536, true).iter().skip(2) {
            let entry = l.entry.unwrap();
            assert!(seen.insert(entry.attr.ino), "{:?}", l.name);
            assert_eq!(entry.attr.ino, l.dirent.ino);
            assert_eq!(entry.attr.mode >> 12, l.dirent.kind);
            if l.dirent.kind == 4 {
                todo.push(entry.nodeid);
            }
        }
    }
    assert_eq!(seen.len() as u64, driver.server.tree().inodes() + 1);
}

#[test]
fn node_ids_depend_on_the_view_alone() {
    let (fixture, driver) = start();
    let again = Driver::new(&fixture.store(), &fixture.view());
    let node = driver.walk(&tree("/bin/hello"));
    assert_eq!(again.walk(&tree("/bin/hello")), node);
    // A view that grew at its end.
    let mut text = fixture.view().text();
    text.push_str(&format!("{}\n", path(4, "hidden")));
    let grown = lair_virtiofs::view::View::parse(text.as_bytes()).unwrap();
    let grown = Driver::new(&fixture.store(), &grown);
    assert_eq!(grown.walk(&tree("/bin/hello")), node);
    assert_eq!(grown.getattr(node).unwrap(), driver.getattr(node).unwrap());
    assert!(grown.lookup(ROOT, path(4, "hidden").base_name().as_bytes()).is_ok());
}

#[test]
fn lifetimes_of_found_and_missing_names() {
    let (_fixture, driver) = start();
    let found = driver.lookup(ROOT, tree("").as_bytes()).unwrap();
    assert_eq!((found.entry_valid, found.attr_valid), (FOREVER, FOREVER));
    assert_eq!(driver.lookup(ROOT, b"missing"), Err(Errno::ENOENT));
    let inside = driver.lookup(found.nodeid, b"missing").unwrap();
    assert_eq!(inside, EntryOut { entry_valid: FOREVER, ..EntryOut::default() });
}

#[test]
fn reads_whole_files() {
    let (_fixture, driver) = start();
    let node = driver.walk(&tree("/big"));
    let mut content = Vec::new();
    loop {
        let piece = driver.read(node, content.len() as u64, 131_072).unwrap();
        if piece.is_empty() {
            break;
        }
        content.extend(piece);
    }
    assert!(content == big());
    let single = driver.walk(path(2, "file").base_name());
    assert_eq!(driver.read(single, 0, 4096).unwrap(), b"a file");
    let link = driver.walk(path(3, "link").base_name());
    assert_eq!(driver.call(Opcode::Readlink, link, &[]).unwrap(), b"/nix/store/elsewhere");
}

#[test]
fn statfs_tells_nothing_of_the_host() {
    let (_fixture, driver) = start();
    let out: StatfsOut = take(&driver.call(Opcode::Statfs, ROOT, &[]).unwrap());
    assert_eq!((out.namelen, out.bsize, out.bfree, out.ffree), (255, 4096, 0, 0));
    assert_eq!(out.files, driver.server.tree().inodes());
}

#[test]
fn init_takes_what_helps_and_nothing_else() {
    let (_fixture, driver) = start();
    let out: InitOut = take(&driver.send(&init_request(7, 45, OFFERED)).unwrap());
    let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
    let wanted = flag::ASYNC_READ
        | flag::PARALLEL_DIROPS
        | flag::DO_READDIRPLUS
        | flag::READDIRPLUS_AUTO
        | flag::MAX_PAGES
        | flag::CACHE_SYMLINKS
        | flag::EXPLICIT_INVAL_DATA
        | flag::EXPORT_SUPPORT
        | flag::INIT_EXT
        | flag::ALLOW_IDMAP;
    assert_eq!(flags, wanted, "{:#x}", flags ^ wanted);
    assert_eq!((out.major, out.minor, out.max_pages), (7, 41, 1024));
    assert_eq!((out.max_readahead, out.max_background), (131_072, 65_535));
    // Only what is offered. Without INIT_EXT the second word does not count.
    let out: InitOut = take(&driver.send(&init_request(7, 31, 1)).unwrap());
    assert_eq!((out.flags, out.flags2, out.minor), (1, 0, 31));
    // Before 7.36 the body was shorter.
    let init = InitIn { major: 7, minor: 31, flags: 1, ..InitIn::default() };
    let out: InitOut = take(&driver.call(Opcode::Init, 0, &init.as_bytes()[..16]).unwrap());
    assert_eq!(out.flags, 1);
}

#[test]
fn fu1_header_short_or_lying() {
    let (_fixture, driver) = start();
    let sound = request(Opcode::Getattr as u32, ROOT, &[0; 16]);
    for length in 0..size_of::<InHeader>() {
        let reply = driver.raw(&sound[..length], ROOM).unwrap();
        assert_eq!(reply[4..8], (-(Errno::EIO as i32)).to_le_bytes(), "{length}");
        assert_eq!(reply.len(), 16);
    }
    for lie in [0u32, 39, 40, 55, 57, 1 << 20, u32::MAX] {
        let mut bytes = sound.clone();
        bytes[..4].copy_from_slice(&lie.to_le_bytes());
        assert_eq!(driver.send(&bytes), Err(Errno::EINVAL), "{lie}");
    }
    assert_eq!(driver.stats.malformed.get(), 40 + 7);
    // Longer than what is copied of it: its header is honest, and what it asks for is refused nevertheless.
    for opcode in Opcode::ALL {
        let bytes = request(*opcode as u32, ROOT, &vec![b'n'; 2 << 20]);
        let whole = Request { bytes: &bytes[..8192], total: bytes.len() as u64 };
        let mut reply = Vec::new();
        let outcome = driver.server.handle(
            &driver.server.tree(),
            &driver.session,
            &driver.stats,
            whole,
            ROOM,
            &mut reply,
        );
        match opcode.treatment() {
            Treatment::Silent => assert_eq!(outcome, Outcome::Silent, "{opcode:?}"),
            treatment => {
                let expected = match (treatment, opcode) {
                    (Treatment::ReadOnly, _) => Errno::EROFS,
                    (Treatment::NotATerminal, _) => Errno::ENOTTY,
                    (Treatment::Unsupported, _) => Errno::ENOSYS,
                    (_, Opcode::Lookup) => Errno::ENAMETOOLONG,
                    _ => Errno::EINVAL,
                };
                assert_eq!(outcome, Outcome::Reply, "{opcode:?}");
                assert_eq!(parse(&bytes, &reply), Err(expected), "{opcode:?}");
            }
        }
        // One that lies about it is told so.
        let whole = Request { total: bytes.len() as u64 - 1, ..whole };
        driver.server.handle(&driver.server.tree(), &driver.session, &driver.stats, whole, ROOM, &mut reply);
        assert!(reply.is_empty() || parse(&bytes, &reply) == Err(Errno::EINVAL), "{opcode:?}");
    }
}

#[test]
fn fu2_unknown_opcode() {
    let (_fixture, driver) = start();
    for number in [0, 7, 19, 54, 4095, 4096, u32::MAX] {
        assert_eq!(driver.send(&request(number, ROOT, &[0; 64])), Err(Errno::ENOSYS), "{number}");
    }
}

#[test]
fn fu3_every_write_opcode_is_erofs() {
    use Opcode::*;
    let (_fixture, driver) = start();
    let writes = [
        Setattr,
        Mknod,
        Mkdir,
        Symlink,
        Link,
        Unlink,
        Rmdir,
        Rename,
        Rename2,
        Create,
        Tmpfile,
        Write,
        Setxattr,
        Removexattr,
        Fallocate,
        CopyFileRange,
        CopyFileRange64,
    ];
    let nodes = [ROOT, driver.walk(&tree("")), driver.walk(&tree("/bin/hello")), 0, u64::MAX];
    for opcode in writes {
        assert_eq!(opcode.treatment(), Treatment::ReadOnly, "{opcode:?}");
        for node in nodes {
            for body in [&b""[..], b"name\0", &[0xff; 200], &[0; 4096]] {
                assert_eq!(driver.call(opcode, node, body), Err(Errno::EROFS), "{opcode:?} {node}");
            }
        }
    }
    let others = Opcode::ALL.iter().filter(|o| o.treatment() == Treatment::ReadOnly).count();
    assert_eq!(others, writes.len());
}

#[test]
fn fu4_names() {
    let (_fixture, driver) = start();
    let top = driver.walk(&tree(""));
    let hello = driver.walk(&tree("/bin/hello"));
    for node in [ROOT, top] {
        let raw = |body: &[u8]| driver.call(Opcode::Lookup, node, body);
        for bad in [&b""[..], b"\0", b"no-nul", b"a\0b\0", b"/\0", b"a/b\0", b"../x\0", b"/etc/passwd\0"] {
            assert_eq!(raw(bad), Err(Errno::EINVAL), "{bad:?}");
        }
        for length in [256, 4096, 1 << 20] {
            assert_eq!(raw(&c_name(&vec![b'n'; length])), Err(Errno::ENAMETOOLONG), "{length}");
        }
        assert_eq!(raw(&vec![b'n'; 1 << 20]), Err(Errno::ENAMETOOLONG));
    }
    assert_ne!(driver.lookup(top, &[b'n'; 255]).unwrap().nodeid, 0);
    assert_ne!(driver.lookup(top, ODD_NAME).unwrap().nodeid, 0);
    // `.` and `..` stay inside the view.
    assert_eq!(driver.lookup(ROOT, b".").unwrap().nodeid, ROOT);
    assert_eq!(driver.lookup(ROOT, b"..").unwrap().nodeid, ROOT);
    assert_eq!(driver.lookup(top, b"..").unwrap().nodeid, ROOT);
    assert_eq!(driver.lookup(driver.walk(&tree("/bin")), b"..").unwrap().nodeid, top);
    assert_eq!(driver.lookup(hello, b".").unwrap().nodeid, hello);
    assert_eq!(driver.lookup(hello, b".."), Err(Errno::ENOTDIR));
    assert_eq!(driver.lookup(hello, b"x"), Err(Errno::ENOTDIR));
}

#[test]
fn fu5_outside_the_view() {
    let (fixture, driver) = start();
    let hidden = path(4, "hidden");
    assert!(fixture.host(&hidden).exists());
    let absent = path(9, "absent");
    let ask = |path: &StorePath| {
        let bytes = request(Opcode::Lookup as u32, ROOT, &c_name(path.base_name().as_bytes()));
        driver.raw(&bytes, ROOM).unwrap()[..8].to_vec()
    };
    assert_eq!(ask(&hidden), ask(&absent));
    assert_eq!(driver.lookup(ROOT, hidden.base_name().as_bytes()), Err(Errno::ENOENT));
    // Neither is looked for on the host, where one would take longer than the other: all is the same without the store.
    std::fs::rename(fixture.store(), fixture.root().join("gone")).unwrap();
    assert_eq!(ask(&hidden), ask(&absent));
    assert!(driver.lookup(ROOT, tree("").as_bytes()).is_ok());
    assert!(!names(&list(&driver, ROOT, 4096, false)).iter().any(|n| n.contains("hidden")));
}

#[test]
fn fu6_symlink_text_only() {
    let (_fixture, driver) = start();
    let link = driver.walk(&tree("/outside"));
    assert_eq!(driver.call(Opcode::Readlink, link, &[]).unwrap(), b"/etc/passwd");
    assert_eq!(driver.read(link, 0, 100), Err(Errno::EINVAL));
    assert_eq!(driver.lookup(link, b"x"), Err(Errno::ENOTDIR));
}

#[test]
fn fu7_devices_fifos_and_sockets_are_absent() {
    let (fixture, driver) = start();
    let top = driver.walk(&tree(""));
    for name in ["fifo", "socket"] {
        assert!(std::fs::symlink_metadata(fixture.host(&path(1, "tree")).join(name)).is_ok());
        assert_eq!(driver.lookup(top, name.as_bytes()).unwrap().nodeid, 0, "{name}");
        assert!(!names(&list(&driver, top, 65_536, true)).contains(&name.to_owned()));
    }
}

#[test]
fn fu8_forged_node_ids() {
    let (fixture, private) = start();
    let index = tempfile::tempdir().unwrap();
    // The index knows the hidden path as well, which has the last slot.
    let all = View::new(fixture.view().paths().iter().cloned().chain([path(4, "hidden")])).unwrap();
    Driver::indexed(&fixture.store(), &all, index.path());
    let indexed = Driver::indexed(&fixture.store(), &fixture.view(), index.path());
    let inode = |slot: u32, number: u32| NodeId::Inode { slot, number }.to_wire();
    for driver in [private, indexed] {
        let many = driver.server.tree().entries()[0].manifest.len();
        let forged = [
            0,
            2,
            u64::from(u32::MAX),
            u64::MAX,
            inode(4, 0),
            inode(4, 1),
            inode(5, 0),
            inode(1, many),
            inode(2, 1),
            inode(u32::MAX, 0),
        ];
        for node in forged {
            use Opcode::*;
            for opcode in [Lookup, Getattr, Readlink, Read, Readdir, Readdirplus] {
                let body = if opcode == Lookup { c_name(b"x") } else { read_in(0, 4096) };
                assert_eq!(driver.call(opcode, node, &body), Err(Errno::ESTALE), "{opcode:?} {node:#x}");
            }
        }
    }
}

#[test]
fn fu9_forget_is_silent() {
    let (_fixture, driver) = start();
    let node = driver.walk(&tree("/big"));
    let batch = [&u32::MAX.to_le_bytes()[..], &[0; 12]].concat();
    for (opcode, node, body) in [
        (Opcode::Forget, node, u64::MAX.to_le_bytes().to_vec()),
        (Opcode::Forget, ROOT, u64::MAX.to_le_bytes().to_vec()),
        (Opcode::Forget, 12_345, Vec::new()),
        (Opcode::BatchForget, 0, batch),
        (Opcode::BatchForget, 0, vec![0xff; 3]),
    ] {
        assert_eq!(driver.raw(&request(opcode as u32, node, &body), ROOM), None);
        assert_eq!(driver.raw(&request(opcode as u32, node, &body), 0), None);
    }
    assert!(driver.getattr(node).is_ok());
    assert!(driver.getattr(ROOT).is_ok());
}

#[test]
fn fu10_handles_do_not_matter() {
    let (_fixture, driver) = start();
    let hello = driver.walk(&tree("/bin/hello"));
    let mut body = read_in(0, 4096);
    body[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(driver.call(Opcode::Read, hello, &body).unwrap(), HELLO);
    assert_eq!(driver.read(driver.walk(&tree("/bin")), 0, 10), Err(Errno::EISDIR));
    assert_eq!(driver.read(ROOT, 0, 10), Err(Errno::EISDIR));
    assert_eq!(driver.call(Opcode::Readdir, hello, &read_in(0, 4096)).unwrap_err(), Errno::ENOTDIR);
    assert_eq!(driver.call(Opcode::Readlink, hello, &[]), Err(Errno::EINVAL));
}

#[test]
fn fu11_read_bounds() {
    let (_fixture, driver) = start();
    let hello = driver.walk(&tree("/bin/hello"));
    let size = HELLO.len() as u64;
    for offset in [size, size + 1, i64::MAX as u64, 1 << 63, u64::MAX] {
        assert_eq!(driver.read(hello, offset, 4096).unwrap(), b"", "{offset}");
    }
    assert_eq!(driver.read(hello, size - 1, u32::from(u16::MAX)).unwrap(), [HELLO[HELLO.len() - 1]]);
    assert_eq!(driver.read(hello, 0, 0).unwrap(), b"");
    assert_eq!(driver.read(hello, 0, u32::MAX), Err(Errno::EINVAL));
    assert_eq!(driver.call(Opcode::Read, hello, &[0; 39]), Err(Errno::EINVAL));
    // The guest's buffer is shorter than what it asks for.
    let bytes = request(Opcode::Read as u32, hello, &read_in(0, 4096));
    let reply = driver.raw(&bytes, 16 + HELLO.len() - 1).unwrap();
    assert_eq!(parse(&bytes, &reply), Err(Errno::EINVAL));
    let reply = driver.raw(&bytes, 16 + HELLO.len()).unwrap();
    assert_eq!(parse(&bytes, &reply).unwrap(), HELLO);
    assert_eq!(driver.raw(&bytes, 15), None);
}

#[test]
fn fu12_readdir_bounds() {
    let (_fixture, driver) = start();
    let many = driver.walk(&tree("/many"));
    for plus in [false, true] {
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let all = names(&list(&driver, many, 1 << 20, plus));
        assert_eq!(all.len(), MANY + 2);
        assert!(all[2..].is_sorted());
        for size in [192, 200, 333, 4096] {
            assert_eq!(names(&list(&driver, many, size, plus)), all, "{size}");
        }
        for offset in [MANY as u64 + 2, 1 << 32, u64::from(u32::MAX) + 2, u64::MAX] {
            assert_eq!(driver.call(opcode, many, &read_in(offset, 4096)).unwrap(), b"", "{offset}");
        }
        for size in [0, 1, 31] {
            assert_eq!(driver.call(opcode, many, &read_in(0, size)), Err(Errno::EINVAL), "{size}");
        }
        let bytes = request(opcode as u32, many, &read_in(0, 4096));
        let reply = driver.raw(&bytes, 4096).unwrap();
        assert_eq!(parse(&bytes, &reply), Err(Errno::EINVAL), "size above the buffer");
    }
    // The guest counts a reference for each entry with a node id, so `.` and `..` have none.
    for l in list(&driver, many, 4096, true) {
        let own = l.name == b"." || l.name == b"..";
        assert_eq!(l.entry.unwrap().nodeid == 0, own);
    }
}

#[test]
fn fu13_open_is_needless_whatever_the_flags() {
    let (_fixture, driver) = start();
    let hello = driver.walk(&tree("/bin/hello"));
    for flags in [0u32, 1, 2, 0o1000, 0o100, 0o40_000, 0o10_000_000, 0o20_200_000, u32::MAX] {
        let body = [flags.to_le_bytes(), [0; 4]].concat();
        assert_eq!(driver.call(Opcode::Open, hello, &body), Err(Errno::ENOSYS), "{flags:#o}");
        assert_eq!(driver.call(Opcode::Opendir, ROOT, &body), Err(Errno::ENOSYS), "{flags:#o}");
    }
    assert_eq!(driver.files.opens().get(), 0);
    // A guest that cannot do without.
    driver.send(&init_request(7, 41, OFFERED & !((1 << 17) | (1 << 24)))).unwrap();
    let top = driver.walk(&tree(""));
    let open = |opcode, node| driver.call(opcode, node, &[0; 8]).map(|b| take::<OpenOut>(&b).open_flags);
    assert_eq!(open(Opcode::Open, hello), Ok(2));
    assert_eq!(open(Opcode::Open, top), Err(Errno::EISDIR));
    assert_eq!(open(Opcode::Open, driver.walk(&tree("/link"))), Err(Errno::EACCES));
    assert_eq!(open(Opcode::Open, 77), Err(Errno::ESTALE));
    assert_eq!(open(Opcode::Opendir, top), Ok(8));
    // The root's listing can grow, so it is not to be cached for good.
    assert_eq!(open(Opcode::Opendir, ROOT), Ok(0));
    assert_eq!(open(Opcode::Opendir, hello), Err(Errno::ENOTDIR));
    assert_eq!(driver.call(Opcode::Release, hello, &[0; 24]).unwrap(), b"");
    assert_eq!(driver.call(Opcode::Releasedir, top, &[0; 24]).unwrap(), b"");
}

#[test]
fn fu14_sessions() {
    let (_fixture, mut driver) = start();
    // INIT twice, and versions.
    assert!(driver.send(&init_request(7, 41, OFFERED)).is_ok());
    assert_eq!(driver.send(&init_request(6, 41, OFFERED)), Err(Errno::EPROTO));
    assert_eq!(driver.send(&init_request(7, 0, OFFERED)), Err(Errno::EPROTO));
    assert_eq!(driver.send(&init_request(7, 30, OFFERED)), Err(Errno::EPROTO));
    let out: InitOut = take(&driver.send(&init_request(8, 0, OFFERED)).unwrap());
    assert_eq!((out.major, out.flags), (7, 0));
    for length in 0..16 {
        assert_eq!(driver.call(Opcode::Init, 0, &vec![0; length]), Err(Errno::EINVAL), "{length}");
    }
    let init = InitIn { major: 7, minor: 41, max_readahead: 0, flags: OFFERED, ..InitIn::default() };
    let out: InitOut = take(&driver.call(Opcode::Init, 0, init.as_bytes()).unwrap());
    assert_eq!(out.max_readahead, 0);
    assert!(driver.getattr(ROOT).is_ok());
    // After DESTROY, until INIT.
    assert_eq!(driver.call(Opcode::Destroy, 0, &[]).unwrap(), b"");
    assert_eq!(driver.getattr(ROOT), Err(Errno::EIO));
    driver.session.resume();
    assert_eq!(driver.getattr(ROOT), Err(Errno::EIO));
    assert!(driver.send(&init_request(7, 41, OFFERED)).is_ok());
    assert!(driver.getattr(ROOT).is_ok());
    // Before INIT, unless the device was in use before.
    driver.session = Session::new();
    assert_eq!(driver.getattr(ROOT), Err(Errno::EIO));
    assert_eq!(driver.call(Opcode::Unlink, ROOT, b"x\0"), Err(Errno::EROFS));
    driver.session.resume();
    assert!(driver.getattr(ROOT).is_ok());
    assert_eq!(driver.call(Opcode::Open, driver.walk(&tree("/big")), &[0; 8]), Err(Errno::ENOSYS));
}

#[test]
fn fu15_interrupt_and_repeated_unique() {
    let (_fixture, driver) = start();
    assert_eq!(driver.call(Opcode::Interrupt, 0, &u64::MAX.to_le_bytes()), Err(Errno::ENOSYS));
    let bytes = request(Opcode::Getattr as u32, ROOT, &[0; 16]);
    assert_eq!(driver.raw(&bytes, ROOM), driver.raw(&bytes, ROOM));
}

#[test]
fn fu16_xattrs() {
    let (_fixture, driver) = start();
    let hello = driver.walk(&tree("/bin/hello"));
    for size in [0u32, 1, 65_536, u32::MAX] {
        let body = [&size.to_le_bytes()[..], &[0; 4], b"security.capability\0"].concat();
        assert_eq!(driver.call(Opcode::Getxattr, hello, &body), Err(Errno::ENOSYS));
        assert_eq!(driver.call(Opcode::Listxattr, hello, &body[..8]), Err(Errno::ENOSYS));
    }
}

#[test]
fn fu17_each_opcode_has_one_reply_or_none() {
    use Opcode::*;
    let (_fixture, driver) = start();
    assert_eq!(driver.call(Ioctl, ROOT, &[0; 32]), Err(Errno::ENOTTY));
    let unsupported = [
        Poll,
        Bmap,
        Getlk,
        Setlk,
        Setlkw,
        Setupmapping,
        Removemapping,
        Syncfs,
        Statx,
        Lseek,
        Flush,
        Fsync,
        Fsyncdir,
        Access,
        Getxattr,
        Listxattr,
        Interrupt,
    ];
    for opcode in unsupported {
        for body in [&[0; 0][..], &[0xff; 64]] {
            assert_eq!(driver.call(opcode, ROOT, body), Err(Errno::ENOSYS), "{opcode:?}");
        }
    }
    for &opcode in Opcode::ALL {
        let silent = matches!(opcode, Forget | BatchForget | NotifyReply);
        let reply = driver.raw(&request(opcode as u32, ROOT, &[0; 64]), ROOM);
        assert_eq!(reply.is_none(), silent, "{opcode:?}");
        assert_eq!(Opcode::from_wire(opcode as u32), Some(opcode));
    }
}

#[test]
fn fu19_lookups_leave_nothing_behind() {
    let (_fixture, driver) = start();
    let top = driver.walk(&tree(""));
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let before = resident();
    let first = driver.lookup(top, b"big").unwrap();
    for _ in 0..200_000 {
        assert_eq!(driver.lookup(top, b"big").unwrap(), first);
    }
    // Other tests of this process run at the same time; 200,000 lookups of 128 bytes would be 25 MB.
    assert!(resident() < before + (20 << 20), "{} -> {}", before, resident());
}

#[test]
fn st6_hard_links_are_one_inode_within_a_store_path() {
    let fixture = Fixture::new();
    let top = fixture.host(&path(1, "tree"));
    let one = top.join("share/doc/readme");
    // Linked within the path, also a symbolic link; with one outside the view; and in the store's own directory of links.
    std::fs::hard_link(&one, top.join("again")).unwrap();
    std::fs::hard_link(&one, top.join("bin/once-more")).unwrap();
    std::fs::hard_link(top.join("link"), top.join("bin/link")).unwrap();
    std::fs::hard_link(&one, fixture.host(&path(4, "hidden")).join("again")).unwrap();
    std::fs::hard_link(&one, fixture.host(&path(5, "other"))).unwrap();
    std::fs::create_dir(fixture.store().join(".links")).unwrap();
    std::fs::hard_link(&one, fixture.store().join(".links/x")).unwrap();
    let view = View::new(fixture.view().paths().iter().cloned().chain([path(5, "other")])).unwrap();
    let index = tempfile::tempdir().unwrap();
    for driver in
        [Driver::new(&fixture.store(), &view), Driver::indexed(&fixture.store(), &view, index.path())]
    {
        hard_links(&driver);
    }
}

fn hard_links(driver: &Driver) {
    let nodes = ["/again", "/bin/once-more", "/share/doc/readme"].map(|name| driver.walk(&tree(name)));
    assert_eq!(nodes, [nodes[0]; 3]);
    let attr = driver.getattr(nodes[0]).unwrap().attr;
    assert_eq!((attr.nlink, attr.size, attr.mode), (3, 7, 0o100_444));
    assert_eq!(driver.read(nodes[0], 0, 100).unwrap(), b"read me");
    let links = ["/link", "/bin/link"].map(|name| driver.walk(&tree(name)));
    assert_eq!(links, [links[0]; 2]);
    assert_eq!(driver.getattr(links[0]).unwrap().attr.nlink, 2);
    assert_eq!(driver.call(Opcode::Readlink, links[0], &[]).unwrap(), b"bin/hello");
    // Listings say the same as lookups.
    for directory in ["", "/bin", "/share/doc"] {
        let directory = driver.walk(&tree(directory));
        for l in list(driver, directory, 65_536, true).iter().skip(2) {
            let entry = l.entry.unwrap();
            assert_eq!(driver.lookup(directory, &l.name).unwrap(), entry);
            assert_eq!((l.dirent.ino, l.dirent.kind), (entry.attr.ino, entry.attr.mode >> 12));
        }
    }
    // Numbers of aliases were never given out.
    let seen = all_nodes(driver);
    let entries = driver.server.tree().entries().to_vec();
    for entry in entries {
        for number in 0..entry.manifest.len() {
            let id = NodeId::Inode { slot: entry.slot, number }.to_wire();
            assert_eq!(driver.getattr(id).is_ok(), seen.contains(&id), "{id:#x}");
        }
    }
    assert_eq!(driver.server.tree().inodes(), seen.len() as u64 - 1);
    // Another store path's is another one.
    let other = driver.walk(path(5, "other").base_name());
    assert_ne!(other, nodes[0]);
    assert_eq!(driver.getattr(other).unwrap().attr.nlink, 1);
    assert_eq!(driver.lookup(ROOT, b".links"), Err(Errno::ENOENT));
}

/// The ids of all nodes that can be reached.
pub(crate) fn all_nodes(driver: &Driver) -> std::collections::HashSet<u64> {
    let mut seen = std::collections::HashSet::from([ROOT]);
    let mut todo = vec![ROOT];
    while let Some(node) = todo.pop() {
        for l in list(driver, node, 1 << 20, true).iter().skip(2) {
            let id = l.entry.unwrap().nodeid;
            if seen.insert(id) && l.dirent.kind == 4 {
                todo.push(id);
            }
        }
    }
    seen
}
