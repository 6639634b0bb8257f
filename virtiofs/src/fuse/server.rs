//! One request, one outcome.

use super::{
    Denied, Opcode, Session, Treatment,
    attr::{FOREVER, attr_out, entry_out},
    init,
    listing::list,
    wire::{
        EntryOut, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, IN_HEADER, InHeader, OUT_HEADER, OpenOut, OutHeader,
        ReadIn, StatfsOut,
    },
};
use crate::{
    index::{Kind, Node, NodeId, Tree},
    stats::Requests,
};
use arc_swap::{ArcSwap, Cache, Guard};
use nix::errno::Errno;
use std::sync::{Arc, Mutex, PoisonError};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The longest name of a file, in bytes.
const NAME_MAX: usize = 255;

/// The most that one READ may ask for, in bytes: 1024 pages of the largest size that Linux uses.
const READ_MAX: u32 = 64 << 20;

/// The most that one READDIR answers, in bytes, however much room there is.
const LISTING_MAX: usize = 1 << 20;

/// A request in private memory, where the guest cannot change it any more.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The request, or its beginning if it is longer than any that is served.
    pub bytes: &'a [u8],
    /// The length of the whole request.
    pub total: u64,
}

/// What a request leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No reply.
    Silent,
    /// The reply is in the buffer.
    Reply,
    /// The reply is a header of 16 bytes, which is in the buffer as it is if all goes well, and then contents of a file.
    Read(FileRead),
}

/// Which bytes of which file to reply with: exactly these, or an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRead {
    /// The file. It is a regular file of the view.
    pub node: NodeId,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes, 1 or more. They are within the file.
    pub length: u32,
    /// Identifies the request, for an error reply.
    pub unique: u64,
}

impl Request<'_> {
    /// The operation asked for; `None` for one that FUSE does not define.
    pub fn opcode(&self) -> Option<Opcode> {
        let number = self.bytes.get(4..).and_then(<[u8]>::first_chunk)?;
        Opcode::from_wire(u32::from_le_bytes(*number))
    }
}

impl FileRead {
    /// Makes `reply` the header that goes before the contents.
    pub fn header(&self, reply: &mut Vec<u8>) {
        reply.clear();
        reply.resize(OUT_HEADER, 0);
        let header = u32::try_from(OUT_HEADER).unwrap_or_default();
        // READ_MAX keeps it within 32 bits.
        let len = self.length.saturating_add(header);
        put_header(OutHeader { len, error: 0, unique: self.unique }, reply);
    }
}

/// The tree that is served, for one who asks for it all the time: who has this has the last one that was asked for.
pub type TreeCache = Cache<Arc<ArcSwap<Tree>>, Arc<Tree>>;

/// Answers requests, each about one tree: the one that is served when the request is taken.
#[derive(Debug)]
pub struct Server {
    tree: Arc<ArcSwap<Tree>>,
    /// Locked while a new tree is made.
    replacing: Mutex<()>,
    denied: Denied,
}

/// What a handler does with the reply buffer, which has room for the header.
enum Answer {
    Body,
    Read { node: NodeId, offset: u64, length: u32 },
}

/// A request whose header is sound.
struct Call<'a> {
    node: u64,
    body: &'a [u8],
    /// Bytes for the reply's body.
    room: usize,
}

impl Server {
    /// A server of `tree`.
    pub fn new(tree: Tree) -> Self {
        let tree = Arc::new(ArcSwap::from_pointee(tree));
        Self { tree, replacing: Mutex::default(), denied: Denied::default() }
    }

    /// What is served now.
    pub fn tree(&self) -> Guard<Arc<Tree>> {
        self.tree.load()
    }

    /// The same, for many requests.
    pub fn cache(&self) -> TreeCache {
        Cache::new(self.tree.clone())
    }

    /// Serves another tree from now on, made from the one before. If that fails, all stays as it was.
    pub fn replace<T, E>(&self, make: impl FnOnce(&Tree) -> Result<(Tree, T), E>) -> Result<T, E> {
        let _lock = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let (tree, result) = make(&self.tree.load())?;
        self.tree.store(Arc::new(tree));
        Ok(result)
    }

    /// What the guest was denied.
    pub fn denied(&self) -> &Denied {
        &self.denied
    }

    /// Answers one request about `tree`, and counts it in `stats`. `room` is the length of the guest's buffer for the reply, which is left in `reply`.
    /// A guest that leaves no room for a header gets no reply.
    #[inline(always)]
    pub fn handle(
        &self,
        tree: &Tree,
        session: &Session,
        stats: &Requests,
        request: Request<'_>,
        room: usize,
        reply: &mut Vec<u8>,
    ) -> Outcome {
        reply.clear();
        let Ok((header, body)) = InHeader::read_from_prefix(request.bytes) else {
            stats.malformed.add(1);
            return self.error(Errno::EIO, 0, room, reply);
        };
        let opcode = Opcode::from_wire(header.opcode);
        let counters = stats.of(opcode);
        counters.requests.add(1);
        if opcode.map(Opcode::treatment) == Some(Treatment::Silent) {
            return Outcome::Silent;
        }
        reply.extend_from_slice(&[0; OUT_HEADER]);
        let answer = if u64::from(header.len) == request.total {
            let call = Call { node: header.nodeid, body, room: room.saturating_sub(OUT_HEADER) };
            let complete = u64::try_from(request.bytes.len()) == Ok(request.total);
            self.dispatch(session, tree, opcode, call, complete, reply)
        } else {
            stats.malformed.add(1);
            Err(Errno::EINVAL)
        };
        let length = match &answer {
            Ok(Answer::Body) => Ok(reply.len()),
            Ok(Answer::Read { length, .. }) => {
                usize::try_from(*length).map_err(|_| Errno::EINVAL).map(|n| n.saturating_add(OUT_HEADER))
            }
            Err(errno) => Err(*errno),
        };
        let length = length.and_then(|n| if n <= room { Ok(n) } else { Err(Errno::EINVAL) });
        let length = match length.and_then(|n| u32::try_from(n).map_err(|_| Errno::EINVAL)) {
            Ok(length) => length,
            Err(errno) => {
                counters.errors.add(1);
                return self.error(errno, header.unique, room, reply);
            }
        };
        counters.bytes.add(u64::from(length));
        put_header(OutHeader { len: length, error: 0, unique: header.unique }, reply);
        match answer {
            Ok(Answer::Read { node, offset, length }) => {
                Outcome::Read(FileRead { node, offset, length, unique: header.unique })
            }
            _ => Outcome::Reply,
        }
    }

    /// Makes the reply an error after all, as when a file cannot be read. Nothing if there is no room for one.
    pub fn error(&self, errno: Errno, unique: u64, room: usize, reply: &mut Vec<u8>) -> Outcome {
        reply.clear();
        if room < OUT_HEADER {
            return Outcome::Silent;
        }
        reply.resize(OUT_HEADER, 0);
        let error = (errno as i32).saturating_neg();
        // The header's length fits.
        let len = u32::try_from(OUT_HEADER).unwrap_or_default();
        put_header(OutHeader { len, error, unique }, reply);
        Outcome::Reply
    }

    fn dispatch(
        &self,
        session: &Session,
        tree: &Tree,
        opcode: Option<Opcode>,
        call: Call<'_>,
        complete: bool,
        reply: &mut Vec<u8>,
    ) -> Result<Answer, Errno> {
        let opcode = opcode.ok_or(Errno::ENOSYS)?;
        match opcode.treatment() {
            Treatment::ReadOnly => return Err(Errno::EROFS),
            Treatment::NotATerminal => return Err(Errno::ENOTTY),
            Treatment::Unsupported | Treatment::Silent => return Err(Errno::ENOSYS),
            Treatment::Served => {}
        }
        // Nothing that is served is as long as what is not copied whole, except for a name that is too long.
        if !complete && opcode != Opcode::Lookup {
            return Err(Errno::EINVAL);
        }
        if opcode == Opcode::Init {
            let (offered, out) = init::answer(call.body)?;
            if let Some(offered) = offered {
                session.start(offered);
                self.denied.start();
            }
            return body(out, reply);
        }
        if !session.is_live() {
            return Err(Errno::EIO);
        }
        let id = || NodeId::from_wire(call.node).ok_or(Errno::ESTALE);
        let node = || tree.node(id()?).ok_or(Errno::ESTALE);
        match opcode {
            Opcode::Lookup => match lookup(tree, id()?, call.body)? {
                Found::Node(node) => body(entry_out(&node), reply),
                Found::NotYet(name) => self.denied_lookup(name, reply),
                // The guest may remember that.
                Found::Never => body(EntryOut { entry_valid: FOREVER, ..EntryOut::default() }, reply),
            },
            Opcode::Getattr => body(attr_out(&node()?), reply),
            Opcode::Readlink => readlink(&node()?, reply),
            Opcode::Read => read(&node()?, &call),
            Opcode::Readdir => readdir(tree, &node()?, &call, false, reply),
            Opcode::Readdirplus => readdir(tree, &node()?, &call, true, reply),
            Opcode::Statfs => body(statfs(tree), reply),
            Opcode::Open if session.needs_open() => match node()? {
                Node::Inode { inode, .. } if matches!(inode.kind(), Kind::File { .. }) => {
                    body(OpenOut { open_flags: FOPEN_KEEP_CACHE, ..OpenOut::default() }, reply)
                }
                node if node.is_directory() => Err(Errno::EISDIR),
                _ => Err(Errno::EACCES),
            },
            Opcode::Opendir if session.needs_opendir() => match node()? {
                Node::Root(_) => body(OpenOut::default(), reply),
                node if node.is_directory() => {
                    body(OpenOut { open_flags: FOPEN_CACHE_DIR, ..OpenOut::default() }, reply)
                }
                _ => Err(Errno::ENOTDIR),
            },
            Opcode::Release | Opcode::Releasedir => Ok(Answer::Body),
            Opcode::Destroy => {
                session.destroy();
                Ok(Answer::Body)
            }
            // OPEN and OPENDIR: the guest remembers that it needs neither.
            _ => Err(Errno::ENOSYS),
        }
    }

    /// Answers a LOOKUP of what the view does not have.
    #[cold]
    fn denied_lookup(&self, name: &[u8], reply: &mut Vec<u8>) -> Result<Answer, Errno> {
        check_name(name)?;
        if self.denied.note(name)
            && let Some(node) = self.tree.load().lookup(name)
        {
            return body(entry_out(&node), reply);
        }
        // The view may grow, so the guest must ask again.
        Err(Errno::ENOENT)
    }
}

/// What a LOOKUP finds.
enum Found<'a> {
    Node(Node<'a>),
    /// Nothing of this name in the root, so far.
    NotYet(&'a [u8]),
    /// Nothing, for good.
    Never,
}

#[inline(always)]
fn lookup<'a>(tree: &'a Tree, parent: NodeId, name: &'a [u8]) -> Result<Found<'a>, Errno> {
    if let NodeId::Inode { slot, number } = parent
        && let Some((0, name)) = name.split_last()
        && !matches!(name, b"." | b"..")
        && let Some(node) = tree.child(slot, number, name).map_err(|_| Errno::EIO)?
    {
        return Ok(Found::Node(node));
    }
    let parent = tree.node(parent).ok_or(Errno::ESTALE)?;
    not_found(tree, &parent, name)
}

/// What to say of a name that is not that of an inode in a store path's directory.
fn not_found<'a>(tree: &'a Tree, parent: &Node<'a>, name: &'a [u8]) -> Result<Found<'a>, Errno> {
    let Some((0, name)) = name.split_last() else {
        return Err(if name.len() > NAME_MAX { Errno::ENAMETOOLONG } else { Errno::EINVAL });
    };
    if name.is_empty() {
        return Err(Errno::EINVAL);
    }
    if name.len() > NAME_MAX {
        // What is no name at all is told first.
        return check_name(name).and(Err(Errno::ENAMETOOLONG));
    }
    if name == b"." {
        // Also of files: it is how the kernel finds an inode again by its id.
        return Ok(Found::Node(*parent));
    }
    if !parent.is_directory() {
        return check_name(name).and(Err(Errno::ENOTDIR));
    }
    if name == b".." {
        return tree.parent(parent).map(Found::Node).ok_or(Errno::ESTALE);
    }
    match parent {
        Node::Root(_) => Ok(tree.lookup(name).map_or(Found::NotYet(name), Found::Node)),
        Node::Inode { .. } => check_name(name).map(|()| Found::Never),
    }
}

/// Whether this can be the name of a file. What was found under it can; so this is looked at only where nothing was found.
#[cold]
fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.iter().any(|&c| c == 0 || c == b'/') { Err(Errno::EINVAL) } else { Ok(()) }
}

fn readlink(node: &Node<'_>, reply: &mut Vec<u8>) -> Result<Answer, Errno> {
    let Node::Inode { entry, inode, .. } = node else { return Err(Errno::EINVAL) };
    if inode.kind() != Kind::Symlink {
        return Err(Errno::EINVAL);
    }
    reply.extend(entry.manifest.target(inode).ok_or(Errno::EIO)?);
    Ok(Answer::Body)
}

#[inline(always)]
fn read(node: &Node<'_>, call: &Call<'_>) -> Result<Answer, Errno> {
    let read = parse::<ReadIn>(call)?;
    let file_size = match node {
        Node::Inode { inode, .. } if matches!(inode.kind(), Kind::File { .. }) => inode.size(),
        node if node.is_directory() => return Err(Errno::EISDIR),
        _ => return Err(Errno::EINVAL),
    };
    if read.size > READ_MAX {
        return Err(Errno::EINVAL);
    }
    let left = file_size.saturating_sub(read.offset);
    match u32::try_from(left).unwrap_or(u32::MAX).min(read.size) {
        0 => Ok(Answer::Body),
        length => Ok(Answer::Read { node: node.id(), offset: read.offset, length }),
    }
}

fn readdir(
    tree: &Tree,
    node: &Node<'_>,
    call: &Call<'_>,
    plus: bool,
    reply: &mut Vec<u8>,
) -> Result<Answer, Errno> {
    let read = parse::<ReadIn>(call)?;
    let size = usize::try_from(read.size).map_err(|_| Errno::EINVAL)?;
    if size > call.room {
        return Err(Errno::EINVAL);
    }
    list(tree, node, read.offset, size.min(LISTING_MAX), plus, reply)?;
    Ok(Answer::Body)
}

/// A full file system. What it counts is not the host's business to tell.
fn statfs(tree: &Tree) -> StatfsOut {
    const BSIZE: u32 = 4096;
    StatfsOut { files: tree.inodes(), bsize: BSIZE, frsize: BSIZE, namelen: 255, ..StatfsOut::default() }
}

fn parse<T: FromBytes>(call: &Call<'_>) -> Result<T, Errno> {
    T::read_from_prefix(call.body).map(|(value, _)| value).map_err(|_| Errno::EINVAL)
}

fn body<T: IntoBytes + Immutable>(value: T, reply: &mut Vec<u8>) -> Result<Answer, Errno> {
    reply.extend_from_slice(value.as_bytes());
    Ok(Answer::Body)
}

fn put_header(header: OutHeader, reply: &mut [u8]) {
    if let Some(place) = reply.first_chunk_mut::<OUT_HEADER>() {
        *place = zerocopy::transmute!(header);
    }
}

const _: () = assert!(IN_HEADER == 40 && OUT_HEADER == 16);
