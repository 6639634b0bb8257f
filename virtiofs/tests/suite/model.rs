//! The server against the file system itself, over trees made at random; and row FU21.

use crate::{
    driver::{Driver, ROOM, c_name, read_in, request, take},
    fixture::{Fixture, path},
};
use lair_virtiofs::{
    fuse::{
        Opcode,
        wire::{Dirent, EntryOut, OutHeader},
    },
    view::View,
};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::Path,
};
use zerocopy::{FromBytes, IntoBytes};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Model {
    File { content: Vec<u8>, executable: bool },
    Symlink(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Model>),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![b'a'..=b'd', 0x80u8..=0xff], 1..6)
}

fn model() -> impl Strategy<Value = Model> {
    let leaf = prop_oneof![
        (prop::collection::vec(any::<u8>(), 0..200), any::<bool>())
            .prop_map(|(content, executable)| Model::File { content, executable }),
        name().prop_map(Model::Symlink),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop::collection::btree_map(name(), inner, 0..6).prop_map(Model::Directory)
    })
}

fn create(at: &Path, model: &Model) {
    match model {
        Model::File { content, executable } => {
            fs::write(at, content).unwrap();
            let mode = if *executable { 0o755 } else { 0o600 };
            fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();
        }
        Model::Symlink(target) => symlink(OsStr::from_bytes(target), at).unwrap(),
        Model::Directory(children) => {
            fs::create_dir(at).unwrap();
            for (name, child) in children {
                create(&at.join(OsStr::from_bytes(name)), child);
            }
        }
    }
}

/// What the server says, found by listing, and by looking each name up as well.
fn served(driver: &Driver, node: u64) -> Model {
    let attr = driver.getattr(node).unwrap().attr;
    match attr.mode {
        0o100_444 | 0o100_555 => {
            let content = driver.read(node, 0, 4096).unwrap();
            assert_eq!(content.len() as u64, attr.size);
            Model::File { content, executable: attr.mode == 0o100_555 }
        }
        0o120_777 => Model::Symlink(driver.call(Opcode::Readlink, node, &[]).unwrap()),
        0o040_555 => {
            let body = driver.call(Opcode::Readdirplus, node, &read_in(0, 1 << 20)).unwrap();
            let mut rest = body.as_slice();
            let mut children = BTreeMap::new();
            while !rest.is_empty() {
                let (entry, dirent) = rest.split_at(size_of::<EntryOut>());
                let entry: EntryOut = take(entry);
                let (dirent, name) = Dirent::read_from_prefix(dirent).unwrap();
                rest = &name[(dirent.namelen as usize).next_multiple_of(8)..];
                let name = &name[..dirent.namelen as usize];
                if entry.nodeid != 0 {
                    assert_eq!(driver.lookup(node, name).unwrap(), entry);
                    assert_eq!(driver.lookup(entry.nodeid, b".").unwrap(), entry);
                    assert_eq!(children.insert(name.to_vec(), served(driver, entry.nodeid)), None);
                }
            }
            Model::Directory(children)
        }
        mode => panic!("{mode:o}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn server_agrees_with_the_file_system(model in model()) {
        let store = tempfile::tempdir().unwrap();
        let path = path(7, "model");
        create(&store.path().join(path.base_name()), &model);
        let driver = Driver::new(store.path(), &View::new([path.clone()]).unwrap());
        let node = driver.lookup(1, path.base_name().as_bytes()).unwrap().nodeid;
        prop_assert_eq!(served(&driver, node), model);
    }
}

/// Gives some files of a tree second names, at its top.
fn link(top: &Path, names: &[prop::sample::Index]) {
    let mut files = Vec::new();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let list = if entry.file_type().unwrap().is_dir() { &mut todo } else { &mut files };
            list.push(entry.path());
        }
    }
    files.sort();
    for (number, index) in names.iter().enumerate().filter(|_| !files.is_empty()) {
        fs::hard_link(index.get(&files), top.join(format!("link-{number}"))).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// What is read from an index is what is read from the file system, to the byte.
    #[test]
    fn an_index_gives_the_same_answers(
        models in prop::collection::vec(model(), 1..4),
        links in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        names in prop::collection::vec(name(), 0..8),
    ) {
        let (store, index) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let paths: Vec<_> = (0..models.len()).map(|number| path(number as u8, "model")).collect();
        for (path, model) in paths.iter().zip(&models) {
            let at = store.path().join(path.base_name());
            create(&at, model);
            if at.is_dir() && !at.is_symlink() {
                link(&at, &links);
            }
        }
        let view = View::new(paths).unwrap();
        // A new index gives slots in the order of the view, as there are without one.
        let private = Driver::new(store.path(), &view);
        let indexed = Driver::indexed(store.path(), &view, index.path());
        let mut nodes = vec![0, 1, 2, u64::MAX];
        for entry in private.server.tree().entries() {
            nodes.extend((0..entry.manifest.len() + 2).map(|number| u64::from(entry.slot) << 32 | u64::from(number)));
        }
        let names = names.iter().map(Vec::as_slice).chain([&b"."[..], b"..", b"link-0", b"link-1"]);
        let names: Vec<&[u8]> = names.chain(view.paths().iter().map(|path| path.base_name().as_bytes())).collect();
        for node in nodes {
            let lookups = names.iter().map(|name| (Opcode::Lookup, c_name(name)));
            let offsets = [0u64, 1, 2, 3, 5, 100].map(|offset| read_in(offset, 600));
            let lists = offsets.iter().flat_map(|body| [Opcode::Readdir, Opcode::Readdirplus, Opcode::Read].map(|o| (o, body.clone())));
            let others = [Opcode::Getattr, Opcode::Readlink, Opcode::Statfs].map(|opcode| (opcode, vec![0; 16]));
            for (opcode, body) in lookups.chain(lists).chain(others) {
                let bytes = request(opcode as u32, node, &body);
                prop_assert_eq!(private.raw(&bytes, ROOM), indexed.raw(&bytes, ROOM), "{:?} {:#x}", opcode, node);
            }
        }
    }
}

#[test]
fn fu21_mutated_requests_keep_the_invariants() {
    let fixture = Fixture::new();
    let driver = Driver::new(&fixture.store(), &fixture.view());
    let opcode = prop_oneof![4 => 0u32..56, 1 => any::<u32>()];
    let node = prop_oneof![
        3 => Just(1u64),
        3 => (1u64..5, 0u64..12).prop_map(|(slot, number)| slot << 32 | number),
        1 => any::<u64>(),
    ];
    let small = prop_oneof![0u64..400, any::<u64>()];
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80),
        (small, prop_oneof![0u32..5000, any::<u32>()]).prop_map(|(offset, size)| read_in(offset, size)),
        "[a-z./]{0,12}".prop_map(|s| [s.as_bytes(), b"\0"].concat()),
    ];
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    let room = prop_oneof![Just(ROOM), 0usize..600];
    let case = (opcode, node, body, flips, room);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(30_000));
    runner
        .run(&case, |(opcode, node, body, flips, room)| {
            let mut bytes = request(opcode, node, &body);
            for (index, value) in flips {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            let unique = bytes[8..16].to_vec();
            if let Some(reply) = driver.raw(&bytes, room) {
                let (header, rest) = OutHeader::read_from_prefix(&reply).unwrap();
                prop_assert!(reply.len() <= room);
                prop_assert_eq!(header.len as usize, reply.len());
                prop_assert_eq!(header.unique.as_bytes(), unique);
                prop_assert!(header.error <= 0 && header.error > -4096);
                prop_assert!(header.error == 0 || rest.is_empty());
            }
            Ok(())
        })
        .unwrap();
}
