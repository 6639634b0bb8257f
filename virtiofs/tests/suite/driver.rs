//! Drives the FUSE server directly: requests in, replies out, invariants checked on each.

use lair_virtiofs::{
    files::{Files, Part, Waiting},
    fuse::{
        Opcode, Outcome, Request, Server, Session,
        wire::{AttrOut, EntryOut, InHeader, InitIn, OutHeader, ReadIn},
    },
    index::{Added, Index, Manifest, Origin, Tree, update},
    stats::Requests,
    store::StorePath,
    view::View,
};
use nix::errno::Errno;
use std::{
    num::NonZero,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Room for a reply that is never too little.
pub(crate) const ROOM: usize = 8 << 20;

/// What Linux 6.12 offers: all bits.
pub(crate) const OFFERED: u32 = u32::MAX;

/// A server and what it needs. Requests begin after INIT.
pub(crate) struct Driver {
    pub(crate) server: Server,
    pub(crate) files: Files,
    pub(crate) session: Session,
    pub(crate) stats: Requests,
}

/// A request as bytes. Each has a unique of its own.
pub(crate) fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    static UNIQUE: AtomicU64 = AtomicU64::new(2);
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let unique = UNIQUE.fetch_add(2, Ordering::Relaxed);
    let header = InHeader { len, opcode, unique, nodeid: node, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

pub(crate) fn init_request(major: u32, minor: u32, flags: u32) -> Vec<u8> {
    let init = InitIn { major, minor, max_readahead: 131_072, flags, flags2: u32::MAX, ..InitIn::default() };
    request(Opcode::Init as u32, 0, init.as_bytes())
}

pub(crate) fn read_in(offset: u64, size: u32) -> Vec<u8> {
    ReadIn { offset, size, ..ReadIn::default() }.as_bytes().to_vec()
}

/// A name as LOOKUP carries it.
pub(crate) fn c_name(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

/// The body of a reply, or its error. Panics if the reply breaks a rule.
pub(crate) fn parse(request: &[u8], reply: &[u8]) -> Result<Vec<u8>, Errno> {
    let (header, body) = OutHeader::read_from_prefix(reply).expect("a whole header");
    let (asked, _) = InHeader::read_from_prefix(request).expect("a whole request");
    assert_eq!(header.unique, asked.unique);
    assert_eq!(usize::try_from(header.len).unwrap(), reply.len());
    if header.error == 0 {
        return Ok(body.to_vec());
    }
    assert!((-4095..0).contains(&header.error), "{}", header.error);
    assert!(body.is_empty(), "an error with a body");
    Err(Errno::from_raw(-header.error))
}

pub(crate) fn take<T: FromBytes + IntoBytes + Immutable>(body: &[u8]) -> T {
    T::read_from_bytes(body).unwrap_or_else(|_| panic!("{} bytes, not {}", body.len(), size_of::<T>()))
}

impl Driver {
    /// Reads the metadata itself.
    pub(crate) fn new(store: &Path, view: &View) -> Self {
        Self::start(store, view, None).0
    }

    /// Indexes the view, and finds all of it in the index.
    pub(crate) fn indexed(store: &Path, view: &View, index: &Path) -> Self {
        let files = Files::open_stores(&[store]).unwrap();
        let summary =
            update(index, files.stores(), view.paths(), NonZero::new(2).unwrap(), |_, _| ()).unwrap();
        assert!(summary.failed.is_empty(), "{:?}", summary.failed);
        let (driver, added) = Self::start(store, view, Some(index));
        assert_eq!((added.paths, added.unindexed.count()), (view.paths().len(), 0));
        driver
    }

    /// What it found is returned as well.
    pub(crate) fn start(store: &Path, view: &View, index: Option<&Path>) -> (Self, Added) {
        let files = Files::open_stores(&[store]).unwrap();
        let index = index.map(|index| Index::open(index).unwrap());
        let origin = Origin { stores: files.stores(), index: index.as_ref() };
        let (tree, added) = Tree::load(origin, view).unwrap();
        (Self::serving(tree, files), added)
    }

    /// Serves one store path of which this is the metadata, true or not.
    pub(crate) fn of(store: &Path, path: &StorePath, manifest: Manifest) -> Self {
        Self::serving(Tree::of(path, manifest).unwrap(), Files::open_stores(&[store]).unwrap())
    }

    fn serving(tree: Tree, files: Files) -> Self {
        let driver =
            Self { server: Server::new(tree), files, session: Session::new(), stats: Requests::default() };
        driver.send(&init_request(7, 41, OFFERED)).unwrap();
        driver
    }

    /// The reply's bytes; `None` for no reply.
    pub(crate) fn raw(&self, request: &[u8], room: usize) -> Option<Vec<u8>> {
        let mut reply = Vec::new();
        let whole = Request { bytes: request, total: request.len() as u64 };
        match self.server.handle(&self.server.tree(), &self.session, &self.stats, whole, room, &mut reply) {
            Outcome::Silent => return None,
            Outcome::Reply => {}
            Outcome::Read(read) => {
                let file = self.files.get(&self.server.tree(), read.node, true);
                let mut content = vec![0; read.length as usize];
                let piece = VolatileSlice::from(content.as_mut_slice());
                file.unwrap().unwrap().read(read.offset, Part::all(&[piece]), Waiting::Allowed).unwrap();
                reply.extend(content);
            }
        }
        assert!(reply.len() <= room, "{} bytes in room for {room}", reply.len());
        Some(reply)
    }

    pub(crate) fn send(&self, request: &[u8]) -> Result<Vec<u8>, Errno> {
        parse(request, &self.raw(request, ROOM).expect("a reply"))
    }

    pub(crate) fn call(&self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.send(&request(opcode as u32, node, body))
    }

    pub(crate) fn lookup(&self, parent: u64, name: &[u8]) -> Result<EntryOut, Errno> {
        self.call(Opcode::Lookup, parent, &c_name(name)).map(|body| take(&body))
    }

    /// The node at a path from the root.
    pub(crate) fn walk(&self, path: &str) -> u64 {
        path.split('/').fold(1, |node, name| {
            let id = self.lookup(node, name.as_bytes()).unwrap().nodeid;
            assert_ne!(id, 0, "{name} in {path}");
            id
        })
    }

    pub(crate) fn getattr(&self, node: u64) -> Result<AttrOut, Errno> {
        self.call(Opcode::Getattr, node, &[0; 16]).map(|body| take(&body))
    }

    pub(crate) fn read(&self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.call(Opcode::Read, node, &read_in(offset, size))
    }
}
