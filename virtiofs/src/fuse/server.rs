//! The server: a request's bytes in, a reply out. It answers from the index, keeps nothing of the guest, and does no I/O; the contents
//! of files are named in the reply and read by whoever sends it.
//!
//! All input is a guest's. A node id is checked against the view on every request, because a guest can make one up.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    opcode::{self, OPCODES, Request, Treatment},
    wire::{Attr, AttrOut, Dirent, EntryOut, InHeader, InitIn, InitOut, OutHeader, ReadIn, StatfsOut, flags},
};
use crate::index::{Attributes, Index, Kind, Node, ROOT_INO};
use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a request's header.
pub const IN_HEADER: usize = size_of::<InHeader>();

/// Bytes of a reply's header.
pub const OUT_HEADER: usize = size_of::<OutHeader>();

/// The longest request that is looked at, in bytes: a header, a name of at most 255 bytes, or the arguments of a read. Of a longer
/// one (a write's) the header is enough.
pub const REQUEST_MAX: usize = 4096;

/// The longest read in bytes: [`MAX_PAGES`] pages.
pub const READ_MAX: u32 = MAX_PAGES as u32 * 4096;

/// The longest request in pages that a guest may make; its own limit is usually 256.
const MAX_PAGES: u16 = 1024;

/// The longest file name in bytes.
const NAME_MAX: usize = 255;

/// The node of the view's root.
const ROOT: u64 = 1;

/// The first protocol that is spoken: before it some replies were shorter, and no kernel that has virtiofs (5.4) is older.
const MINOR_MIN: u32 = 31;

/// The protocol that is spoken.
const MINOR: u32 = 38;

/// How long what cannot change is true, in seconds. Larger values have overflowed in some kernels.
const FOR_EVER: u64 = 1_000_000_000;

/// How long the root's attributes are true, in seconds: the view may grow.
const ROOT_VALID: u64 = 1;

const BLOCK: u32 = 4096;

/// What the guest is answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing: the request has no reply.
    None,
    /// An error.
    Error(Errno),
    /// Data.
    Bytes(Vec<u8>),
    /// Contents of a file, exactly `length` bytes of it.
    Contents {
        /// The file.
        node: Node,
        /// From where.
        offset: u64,
        /// How many bytes; the file has them.
        length: u32,
    },
}

/// A request that was understood as far as its header, and its reply.
#[derive(Debug)]
pub struct Answer {
    /// The request's name for its reply.
    pub unique: u64,
    /// The place of the opcode in the table, if it is known.
    pub opcode: Option<usize>,
    /// The reply.
    pub reply: Reply,
}

impl Answer {
    /// The reply's header, for `length` bytes behind it.
    pub fn header(&self, length: u32) -> OutHeader {
        let error = match self.reply {
            Reply::Error(error) => (error as i32).saturating_neg(),
            Reply::None | Reply::Bytes(_) | Reply::Contents { .. } => 0,
        };
        let header = u32::try_from(OUT_HEADER).unwrap_or(u32::MAX);
        OutHeader { len: header.saturating_add(length), error, unique: self.unique }
    }
}

/// The server of one view.
#[derive(Debug)]
pub struct Server {
    index: Index,
}

/// A node that the view has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Inside(Node),
}

impl Server {
    /// A server that answers from `index`.
    pub fn new(index: Index) -> Self {
        Self { index }
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Answers a request of which `bytes` are at hand, `length` bytes in all, with room for `room` bytes behind the reply's header.
    ///
    /// `None`: it is too short to have a header, so there is nothing to reply to.
    pub fn answer(&self, bytes: &[u8], length: u64, room: usize) -> Option<Answer> {
        let (header, body) = InHeader::read_from_prefix(bytes).ok()?;
        let opcode = opcode::find(header.opcode);
        let treatment = opcode.and_then(|place| OPCODES.get(place)).map(|row| row.treatment);
        let reply = match treatment {
            Some(Treatment::Silent) => Reply::None,
            _ if u64::from(header.len) != length => Reply::Error(Errno::EINVAL),
            Some(Treatment::Write) => Reply::Error(Errno::EROFS),
            Some(Treatment::Ioctl) => Reply::Error(Errno::ENOTTY),
            Some(Treatment::Unsupported) | None => Reply::Error(Errno::ENOSYS),
            // None of those that are answered is longer than what is at hand.
            Some(Treatment::Answered(_)) if u64::try_from(bytes.len()) != Ok(length) => {
                Reply::Error(Errno::EINVAL)
            }
            Some(Treatment::Answered(request)) => match self.reply(request, header.nodeid, body, room) {
                Ok(Reply::Bytes(bytes)) if bytes.len() > room => Reply::Error(Errno::EINVAL),
                Ok(reply) => reply,
                Err(error) => Reply::Error(error),
            },
        };
        Some(Answer { unique: header.unique, opcode, reply })
    }

    fn reply(&self, request: Request, nodeid: u64, body: &[u8], room: usize) -> Result<Reply, Errno> {
        match request {
            Request::Init => init(body),
            Request::Destroy => Ok(Reply::Bytes(vec![])),
            Request::Lookup => self.lookup(self.place(nodeid)?, body),
            Request::GetAttr => {
                let (attr, valid) = self.attr(self.place(nodeid)?)?;
                Ok(bytes(&AttrOut { valid, valid_nanoseconds: 0, dummy: 0, attr }))
            }
            Request::ReadLink => match self.place(nodeid)? {
                Place::Root => Err(Errno::EINVAL),
                Place::Inside(node) => {
                    self.index.target(node).map(|t| Reply::Bytes(t.to_vec())).ok_or(Errno::EINVAL)
                }
            },
            Request::Read => self.read(self.place(nodeid)?, body, room),
            Request::ReadDir => self.list(self.place(nodeid)?, body, room, false),
            Request::ReadDirPlus => self.list(self.place(nodeid)?, body, room, true),
            Request::StatFs => self.place(nodeid).map(|_| self.statfs()),
        }
    }

    /// The node behind an id, if the view has it.
    fn place(&self, nodeid: u64) -> Result<Place, Errno> {
        if nodeid == ROOT {
            return Ok(Place::Root);
        }
        let node = node_of(nodeid).ok_or(Errno::ESTALE)?;
        self.index.attributes(node).map(|_| Place::Inside(node)).ok_or(Errno::ESTALE)
    }

    fn attr(&self, place: Place) -> Result<(Attr, u64), Errno> {
        match place {
            Place::Root => {
                let entries = u64::try_from(self.index.paths()).unwrap_or(u64::MAX);
                let root = Attributes { kind: Kind::Directory, size: entries, ino: ROOT_INO };
                // The time tells the guest that the view has grown.
                Ok((attr(&root, entries), ROOT_VALID))
            }
            Place::Inside(node) => {
                Ok((attr(&self.index.attributes(node).ok_or(Errno::ESTALE)?, 1), FOR_EVER))
            }
        }
    }

    fn lookup(&self, place: Place, body: &[u8]) -> Result<Reply, Errno> {
        let name = name(body)?;
        let found = match (place, name) {
            (_, b".") => Some(place),
            (Place::Root, b"..") => Some(Place::Root),
            (Place::Root, name) => self.index.store_path(name).map(Place::Inside),
            (Place::Inside(node), b"..") => Some(self.index.parent(node).map_or(Place::Root, Place::Inside)),
            (Place::Inside(node), name) => {
                if self.index.attributes(node).is_some_and(|attributes| attributes.kind != Kind::Directory) {
                    return Err(Errno::ENOTDIR);
                }
                self.index.child(node, name).map(Place::Inside)
            }
        };
        match (found, place) {
            (Some(found), _) => Ok(bytes(&self.entry(found)?)),
            // The root may come to have it: that must not be remembered.
            (None, Place::Root) => Err(Errno::ENOENT),
            (None, Place::Inside(_)) => {
                Ok(bytes(&EntryOut { entry_valid: FOR_EVER, ..EntryOut::new_zeroed_entry() }))
            }
        }
    }

    fn entry(&self, place: Place) -> Result<EntryOut, Errno> {
        let (attr, attr_valid) = self.attr(place)?;
        let nodeid = match place {
            Place::Root => ROOT,
            Place::Inside(node) => id_of(node),
        };
        let entry = EntryOut::new_zeroed_entry();
        Ok(EntryOut { nodeid, entry_valid: FOR_EVER, attr_valid, attr, ..entry })
    }

    fn read(&self, place: Place, body: &[u8], room: usize) -> Result<Reply, Errno> {
        let (read, _) = ReadIn::read_from_prefix(body).map_err(|_| Errno::EINVAL)?;
        let Place::Inside(node) = place else { return Err(Errno::EISDIR) };
        let attributes = self.index.attributes(node).ok_or(Errno::ESTALE)?;
        match attributes.kind {
            Kind::File { .. } => {}
            Kind::Directory => return Err(Errno::EISDIR),
            Kind::Symlink => return Err(Errno::EINVAL),
        }
        if read.size > READ_MAX || usize::try_from(read.size).map_or(true, |size| size > room) {
            return Err(Errno::EINVAL);
        }
        let left = attributes.size.saturating_sub(read.offset);
        let length = u32::try_from(left).unwrap_or(u32::MAX).min(read.size);
        if length == 0 {
            return Ok(Reply::Bytes(vec![]));
        }
        Ok(Reply::Contents { node, offset: read.offset, length })
    }

    fn list(&self, place: Place, body: &[u8], room: usize, plus: bool) -> Result<Reply, Errno> {
        let (read, _) = ReadIn::read_from_prefix(body).map_err(|_| Errno::EINVAL)?;
        let size = usize::try_from(read.size.min(READ_MAX)).unwrap_or(usize::MAX);
        if size > room {
            return Err(Errno::EINVAL);
        }
        let parent = match place {
            Place::Root => Place::Root,
            Place::Inside(node) => {
                if self.index.attributes(node).is_some_and(|attributes| attributes.kind != Kind::Directory) {
                    return Err(Errno::ENOTDIR);
                }
                self.index.parent(node).map_or(Place::Root, Place::Inside)
            }
        };
        let mut listing =
            Listing { bytes: Vec::with_capacity(size.min(1 << 16)), size, plus, next: read.offset };
        let dots = [(place, &b"."[..]), (parent, &b".."[..])];
        for (at, (place, name)) in (0..).zip(dots) {
            if at >= read.offset && !listing.add(self, place, name, true)? {
                return Ok(listing.end());
            }
        }
        let from = read.offset.saturating_sub(2);
        let mut add = |(node, name): (Node, &[u8])| listing.add(self, Place::Inside(node), name, false);
        match place {
            Place::Root => all_fit(self.index.store_paths(from), &mut add)?,
            Place::Inside(node) => all_fit(self.index.children(node, from), &mut add)?,
        }
        Ok(listing.end())
    }

    fn statfs(&self) -> Reply {
        let blocks = self.index.bytes().div_ceil(BLOCK.into());
        bytes(&StatfsOut {
            blocks,
            free: [0; 2],
            files: [self.index.inodes(), 0],
            bsize: BLOCK,
            namelen: u32::try_from(NAME_MAX).unwrap_or(0),
            frsize: BLOCK,
            padding: 0,
            spare: [0; 6],
        })
    }
}

fn all_fit<'a>(
    children: impl Iterator<Item = (Node, &'a [u8])>,
    add: &mut impl FnMut((Node, &'a [u8])) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    for child in children {
        if !add(child)? {
            break;
        }
    }
    Ok(())
}

/// A listing that is being filled.
struct Listing {
    bytes: Vec<u8>,
    size: usize,
    plus: bool,
    next: u64,
}

impl Listing {
    /// Adds an entry; false if it does not fit. In a listing with attributes `.` and `..` have none: a lookup is counted for
    /// each that has.
    fn add(&mut self, server: &Server, place: Place, name: &[u8], dot: bool) -> Result<bool, Errno> {
        let entry = server.entry(place)?;
        let head = if self.plus { size_of::<EntryOut>() } else { 0 };
        let padded = size_of::<Dirent>().saturating_add(name.len()).next_multiple_of(8);
        let whole = self.bytes.len().saturating_add(head).saturating_add(padded);
        if whole > self.size {
            return Ok(false);
        }
        self.next = self.next.saturating_add(1);
        if self.plus {
            let entry = if dot { EntryOut::new_zeroed_entry() } else { entry };
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        let namelen = u32::try_from(name.len()).map_err(|_| Errno::EIO)?;
        // The type is the upper four of the mode's sixteen bits.
        let dirent = Dirent { ino: entry.attr.ino, off: self.next, namelen, kind: entry.attr.mode >> 12 };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(whole, 0);
        Ok(true)
    }

    fn end(self) -> Reply {
        Reply::Bytes(self.bytes)
    }
}

impl EntryOut {
    fn new_zeroed_entry() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

fn init(body: &[u8]) -> Result<Reply, Errno> {
    let (init, rest) = InitIn::read_from_prefix(body).map_err(|_| Errno::EINVAL)?;
    let mut answer: InitOut = zerocopy::FromZeros::new_zeroed();
    answer.major = 7;
    answer.minor = MINOR;
    if init.major > 7 {
        // The guest begins again with what it is told.
        return Ok(bytes(&answer));
    }
    let flags2 = if u64::from(init.flags) & flags::INIT_EXT != 0 {
        u32::read_from_prefix(rest).map_or(0, |(flags2, _)| flags2)
    } else {
        0
    };
    let offered = u64::from(init.flags) | u64::from(flags2) << 32;
    let needed = flags::NO_OPEN_SUPPORT | flags::NO_OPENDIR_SUPPORT;
    if init.major < 7 || init.minor < MINOR_MIN || offered & needed != needed {
        return Err(Errno::EPROTO);
    }
    let taken = offered & flags::TAKEN;
    answer.flags = u32::try_from(taken & u64::from(u32::MAX)).unwrap_or(0);
    answer.flags2 = u32::try_from(taken >> 32).unwrap_or(0);
    answer.max_readahead = init.max_readahead;
    answer.max_background = u16::MAX;
    answer.congestion_threshold = u16::MAX / 4 * 3;
    answer.max_write = BLOCK;
    answer.time_gran = 1_000_000_000;
    answer.max_pages = MAX_PAGES;
    Ok(bytes(&answer))
}

fn bytes(value: &(impl IntoBytes + zerocopy::Immutable)) -> Reply {
    Reply::Bytes(value.as_bytes().to_vec())
}

/// The name in a LOOKUP: it ends with the only NUL.
fn name(body: &[u8]) -> Result<&[u8], Errno> {
    let name = body.strip_suffix(b"\0").ok_or(Errno::EINVAL)?;
    if name.is_empty() || name.contains(&0) || name.contains(&b'/') {
        return Err(Errno::EINVAL);
    }
    if name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    Ok(name)
}

fn id_of(node: Node) -> u64 {
    u64::from(node.slot) << 32 | u64::from(node.inode)
}

/// Slot 0 is the root's, of which there is only one id.
fn node_of(id: u64) -> Option<Node> {
    let slot = u32::try_from(id >> 32).ok().filter(|slot| *slot != 0)?;
    Some(Node { slot, inode: u32::try_from(id & u64::from(u32::MAX)).ok()? })
}

/// The same for everybody: root's, never writable, of the first second of 1970, as Nix has it.
fn attr(attributes: &Attributes, time: u64) -> Attr {
    let (mode, nlink, size) = match attributes.kind {
        Kind::File { executable: true } => (0o100_555, 1, attributes.size),
        Kind::File { executable: false } => (0o100_444, 1, attributes.size),
        Kind::Directory => (0o040_555, 2, u64::from(BLOCK)),
        Kind::Symlink => (0o120_777, 1, attributes.size),
    };
    Attr {
        ino: attributes.ino,
        size,
        blocks: size.div_ceil(512),
        times: [time; 3],
        nanoseconds: [0; 3],
        mode,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK,
        flags: 0,
    }
}
