//! Manifests, packs and registries, as they are read from an index on disk, and a guest that looks at all that they say.
//!
//! An input is: flags, then bytes. Flags: 1 checksums are made right, 2 the bytes are a registry (after its length, 16 bits) and a
//! pack; else they are a manifest.

use super::{input::Input, reply, world};
use crate::{
    fuse::{
        Opcode, Outcome, Request, Server, Session,
        wire::{Dirent, EntryOut, InHeader, OUT_HEADER, ReadIn},
    },
    index::{Manifest, NodeId, Tree, fuzzing::read},
    stats::Requests,
    store::StorePath,
};
use std::{fs, sync::OnceLock};
use tempfile::TempDir;
use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, IntoBytes};

/// The most inodes of one manifest that are looked at.
const INODES: usize = 300;

/// Reads what an input says.
pub fn index(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    if flags & 2 == 0 {
        let mut bytes = input.0.to_vec();
        if flags & 1 != 0 {
            mend_manifest(&mut bytes);
        }
        if let Ok(manifest) = Manifest::from_bytes(&bytes) {
            look(&world::path(1, "tree"), manifest);
        }
        return;
    }
    let length = usize::from(input.u16());
    let (mut registry, mut pack) = (input.bytes(length).to_vec(), input.0.to_vec());
    if flags & 1 != 0 {
        mend(&mut registry, &mut pack);
    }
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| TempDir::new().unwrap()).path();
    let write = |name: &str, bytes: &[u8]| {
        // Anew, as files of an index are not written to again.
        let _ = fs::remove_file(directory.join(name));
        fs::write(directory.join(name), bytes).unwrap();
    };
    write("registry", &registry);
    write("pack-00000001", &pack);
    for (path, manifest) in read(directory, &registry, &paths()) {
        look(&path, manifest);
    }
}

/// The store paths that are looked for.
pub(super) fn paths() -> [StorePath; 3] {
    [world::path(1, "tree"), world::path(2, "file"), world::path(3, "link")]
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

/// Puts the checksum of what is from `from` on to `at`.
fn seal(bytes: &mut [u8], at: usize, from: usize) {
    let checksum = XxHash3_64::oneshot(bytes.get(from..).unwrap_or_default());
    if let Some(to) = bytes.get_mut(at..at + 8) {
        to.copy_from_slice(&checksum.to_le_bytes());
    }
}

fn mend_manifest(bytes: &mut [u8]) {
    seal(bytes, 0, 8);
}

/// Makes the checksums of a registry, a pack and the manifests in it right.
pub(super) fn mend(registry: &mut [u8], pack: &mut [u8]) {
    if let Some(header) = pack.get_mut(..64) {
        seal(header, 16, 24);
    }
    for at in (16..registry.len()).step_by(8) {
        let Some(record) = registry.get_mut(at..) else { return };
        if record.len() < 88 || !record.starts_with(b"\xffRecord\xff") {
            continue;
        }
        let field = |at, length| {
            number(record, at, length).and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX)
        };
        let (offset, length, name) = (field(24, 8), field(32, 8), field(80, 4));
        let manifest = offset.checked_add(length).and_then(|end| pack.get_mut(offset..end));
        if let Some(manifest) = manifest
            && manifest.len() >= 8
        {
            mend_manifest(manifest);
            let checksum = manifest[..8].to_vec();
            record[40..48].copy_from_slice(&checksum);
        }
        if let Some(record) =
            name.checked_add(88).and_then(|n| record.get_mut(..n.checked_next_multiple_of(8)?))
        {
            seal(record, 8, 16);
        }
    }
}

/// A guest that looks at all of a store path.
struct Guest {
    server: Server,
    session: Session,
    stats: Requests,
}

fn look(path: &StorePath, manifest: Manifest) {
    let many = manifest.len();
    for number in (0..many).take(INODES) {
        let names = manifest.path(number).unwrap_or_default();
        let proper =
            |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/') && !name.contains(&0);
        assert!(names.iter().all(|name| proper(name)), "{number} is at {names:?}");
    }
    let Ok(tree) = Tree::of(path, manifest) else { return };
    let guest = Guest { server: Server::new(tree), session: Session::new(), stats: Requests::default() };
    guest.session.resume();
    guest.look_at(NodeId::Root.to_wire());
    for number in (0..many).take(INODES).chain([many, u32::MAX]) {
        guest.look_at(NodeId::Inode { slot: 1, number }.to_wire());
    }
}

impl Guest {
    fn ask(&self, opcode: Opcode, nodeid: u64, body: &[u8]) -> Option<Vec<u8>> {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode: opcode as u32, unique: 7, nodeid, ..InHeader::default() };
        let bytes = [header.as_bytes(), body].concat();
        let (total, room) = (bytes.len() as u64, 64 << 10);
        let mut answer = Vec::new();
        match self.server.handle(
            &self.server.tree(),
            &self.session,
            &self.stats,
            Request { bytes: &bytes, total },
            room,
            &mut answer,
        ) {
            Outcome::Silent => return None,
            Outcome::Reply => {}
            // There are no files behind it, so what would be read is left out.
            Outcome::Read(read) => answer.resize(OUT_HEADER + read.length as usize, 0),
        }
        reply::check_but_names(&bytes, total, room, Some(&answer));
        (answer[4..8] == [0; 4]).then(|| answer[OUT_HEADER..].to_vec())
    }

    fn look_at(&self, node: u64) {
        let read = |offset, size| ReadIn { offset, size, ..ReadIn::default() }.as_bytes().to_vec();
        self.ask(Opcode::Getattr, node, &[0; 16]);
        self.ask(Opcode::Readlink, node, &[]);
        self.ask(Opcode::Read, node, &read(0, 4096));
        self.ask(Opcode::Read, node, &read(u64::MAX - 1, 4096));
        self.ask(Opcode::Lookup, node, b"..\0");
        self.ask(Opcode::Readdir, node, &read(0, 4096));
        let Some(listing) = self.ask(Opcode::Readdirplus, node, &read(0, 32 << 10)) else { return };
        let mut rest = listing.as_slice();
        while let Ok((entry, after)) = EntryOut::read_from_prefix(rest) {
            let (dirent, after) = Dirent::read_from_prefix(after).unwrap();
            let name = &after[..dirent.namelen as usize];
            rest = &after[name.len().next_multiple_of(8)..];
            assert!(entry.nodeid == 0 || dirent.kind == entry.attr.mode >> 12);
            self.ask(Opcode::Lookup, node, &[name, b"\0"].concat());
        }
    }
}
