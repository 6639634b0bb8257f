//! A mount, as far as Linux remembers one: which operations the backend can do without, and where names lead.

use super::{
    queue::Queue,
    request::{LISTING, Request},
};
use anyhow::{Context, Result, bail, ensure};
use lair_virtiofs::fuse::wire::{Dirent, EntryOut, OpenOut, OutHeader};
use nix::errno::Errno;
use zerocopy::FromBytes;

/// The root directory.
pub const ROOT: u64 = 1;

/// A mount through one queue, one request at a time.
#[derive(Debug)]
pub struct Session {
    /// The queue.
    pub queue: Queue,
    /// Requests that were sent.
    pub messages: u64,
    no_open: bool,
    no_opendir: bool,
    no_flush: bool,
}

/// An open file or directory: what READ is to name, and whether there is something to close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle {
    /// The file.
    pub node: u64,
    /// Its handle; 0 without one.
    pub handle: u64,
    open: bool,
}

/// An entry of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: Vec<u8>,
    /// Its node, and its attributes.
    pub entry: EntryOut,
}

impl Session {
    /// Mounts: sends INIT.
    pub fn mount(queue: Queue) -> Result<Self> {
        let mut session = Self { queue, messages: 0, no_open: false, no_opendir: false, no_flush: false };
        session.must(&Request::init()).context("INIT failed")?;
        Ok(session)
    }

    /// Sends a request and waits for the reply, whose header is returned.
    pub fn send(&mut self, request: &Request) -> Result<OutHeader> {
        self.messages += 1;
        self.queue.exchange(request).with_context(|| format!("{:?} failed", request.opcode))
    }

    /// Sends a request that succeeds.
    pub fn must(&mut self, request: &Request) -> Result<OutHeader> {
        let header = self.send(request)?;
        ensure!(header.error == 0, "{:?}: {}", request.opcode, errno(&header));
        Ok(header)
    }

    /// A name in a directory; `None` if there is none, however the backend says so.
    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<Option<EntryOut>> {
        let header = self.send(&Request::lookup(parent, name))?;
        match errno(&header) {
            Errno::UnknownErrno if header.error == 0 => {
                let entry: EntryOut = self.queue.body(0);
                Ok((entry.nodeid != 0).then_some(entry))
            }
            Errno::ENOENT => Ok(None),
            error => bail!("LOOKUP: {error}"),
        }
    }

    /// The node at a path below the root.
    pub fn walk(&mut self, path: &str) -> Result<EntryOut> {
        let mut node = ROOT;
        let mut found = None;
        for name in path.split('/') {
            let entry =
                self.lookup(node, name.as_bytes())?.with_context(|| format!("No {name} in {path}"))?;
            node = entry.nodeid;
            found = Some(entry);
        }
        found.context("An empty path")
    }

    /// Opens a file.
    pub fn open(&mut self, node: u64) -> Result<Handle> {
        let (handle, no_open) = self.opened(Request::open(node), self.no_open)?;
        self.no_open = no_open;
        Ok(handle)
    }

    /// Opens a directory.
    pub fn opendir(&mut self, node: u64) -> Result<Handle> {
        let (handle, no_opendir) = self.opened(Request::opendir(node), self.no_opendir)?;
        self.no_opendir = no_opendir;
        Ok(handle)
    }

    fn opened(&mut self, request: Request, without: bool) -> Result<(Handle, bool)> {
        let node = request.node;
        let none = (Handle { node, handle: 0, open: false }, true);
        if without {
            return Ok(none);
        }
        let header = self.send(&request)?;
        match header.error {
            0 => {
                let opened: OpenOut = self.queue.body(0);
                Ok((Handle { node, handle: opened.fh, open: true }, false))
            }
            _ if errno(&header) == Errno::ENOSYS => Ok(none),
            _ => bail!("{:?}: {}", request.opcode, errno(&header)),
        }
    }

    /// Closes a file.
    pub fn close(&mut self, file: Handle) -> Result<()> {
        if !self.no_flush {
            let header = self.send(&Request::flush(file.node, file.handle))?;
            match errno(&header) {
                Errno::ENOSYS => self.no_flush = true,
                _ => ensure!(header.error == 0, "FLUSH: {}", errno(&header)),
            }
        }
        if file.open {
            self.must(&Request::release(file.node, file.handle))?;
        }
        Ok(())
    }

    /// Closes a directory.
    pub fn closedir(&mut self, directory: Handle) -> Result<()> {
        if directory.open {
            self.must(&Request::releasedir(directory.node, directory.handle))?;
        }
        Ok(())
    }

    /// Everything in a directory but `.` and `..`.
    pub fn list(&mut self, node: u64) -> Result<Vec<Entry>> {
        let directory = self.opendir(node)?;
        let mut entries = Vec::new();
        let mut offset = 0;
        loop {
            let header = self.must(&Request::readdirplus(node, directory.handle, offset))?;
            let mut data = vec![0; header.len as usize - size_of::<OutHeader>()];
            ensure!(data.len() <= LISTING as usize, "READDIRPLUS: more than there is room for");
            self.queue.data(0, &mut data);
            if data.is_empty() {
                break;
            }
            offset = parse_listing(&data, &mut entries)?;
        }
        self.closedir(directory)?;
        Ok(entries)
    }

    /// Contents of a file, in one request.
    pub fn read(&mut self, file: Handle, offset: u64, size: u32) -> Result<Vec<u8>> {
        let header = self.must(&Request::read(file.node, file.handle, offset, size))?;
        let mut data = vec![0; header.len as usize - size_of::<OutHeader>()];
        self.queue.data(0, &mut data);
        Ok(data)
    }
}

/// The error of a reply.
pub fn errno(header: &OutHeader) -> Errno {
    Errno::from_raw(header.error.saturating_neg())
}

/// Appends what a reply to READDIRPLUS lists. Where the next one is to go on.
pub fn parse_listing(mut data: &[u8], entries: &mut Vec<Entry>) -> Result<u64> {
    let mut offset = 0;
    while !data.is_empty() {
        let cut = || "READDIRPLUS: an entry is cut off";
        let (entry, rest) = EntryOut::read_from_prefix(data).ok().with_context(cut)?;
        let (dirent, rest) = Dirent::read_from_prefix(rest).ok().with_context(cut)?;
        let length = dirent.namelen as usize;
        let name = rest.get(..length).with_context(cut)?;
        data = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
        offset = dirent.off;
        if !matches!(name, b"." | b"..") {
            entries.push(Entry { name: name.to_vec(), entry });
        }
    }
    Ok(offset)
}
