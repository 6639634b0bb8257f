//! What is measured: operations, each as the requests that a Linux guest sends for it.

use anyhow::{Context, Result, ensure};
use lair_harness::{
    frontend::{
        known::Known,
        request::Request,
        session::{self, ROOT, Session},
    },
    tree::{Entry, HOT, Kind, Random, Tree, check_content},
};
use lair_virtiofs::fuse::wire::{EntryOut, OutHeader};
use nix::errno::Errno;
use std::{collections::HashMap, path::Path};

/// An operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Lookup,
    LookupMissing,
    Getattr,
    Read4K,
    Read128K,
    Read1M,
    Readdirplus,
    OpenCycle,
    SmallFile,
}

impl Operation {
    pub(crate) const ALL: [Self; 9] = [
        Self::Lookup,
        Self::LookupMissing,
        Self::Getattr,
        Self::Read4K,
        Self::Read128K,
        Self::Read1M,
        Self::Readdirplus,
        Self::OpenCycle,
        Self::SmallFile,
    ];

    /// Its name in JSON, for good.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::LookupMissing => "lookup_missing",
            Self::Getattr => "getattr",
            Self::Read4K => "read_4k",
            Self::Read128K => "read_128k",
            Self::Read1M => "read_1m",
            Self::Readdirplus => "readdirplus",
            Self::OpenCycle => "open_flush_release",
            Self::SmallFile => "small_file",
        }
    }

    /// The operation of a name in JSON.
    pub(crate) fn parse(key: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::key).join(", ");
        Self::ALL
            .into_iter()
            .find(|operation| operation.key() == key)
            .ok_or_else(|| format!("known are {}", known()))
    }

    /// Its name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Lookup => "LOOKUP",
            Self::LookupMissing => "LOOKUP, no such name",
            Self::Getattr => "GETATTR",
            Self::Read4K => "READ 4 KiB",
            Self::Read128K => "READ 128 KiB",
            Self::Read1M => "READ 1 MiB",
            Self::Readdirplus => "READDIRPLUS, one page",
            Self::OpenCycle => "open + flush + release",
            Self::SmallFile => "a small file, with open",
        }
    }
}

/// Inodes by path, looked up once.
#[derive(Default)]
pub(crate) struct Nodes(HashMap<String, EntryOut>);

impl Nodes {
    fn get(&mut self, session: &mut Session, path: &str) -> Result<EntryOut> {
        if let Some(entry) = self.0.get(path) {
            return Ok(*entry);
        }
        let (parent, name) = match path.rsplit_once('/') {
            Some((parent, name)) => (self.get(session, parent)?.nodeid, name),
            None => (ROOT, path),
        };
        let entry = session.lookup(parent, name.as_bytes())?.with_context(|| format!("No {path}"))?;
        self.0.insert(path.into(), entry);
        Ok(entry)
    }
}

/// An operation, ready to be done again and again.
pub(crate) struct Work {
    operation: Operation,
    pub(crate) requests: Vec<Request>,
}

/// Bytes that Linux asks for to read a small file: whole pages.
fn pages(size: u64) -> u32 {
    (size.next_multiple_of(4096)) as u32
}

impl Work {
    /// Looks up what the operation needs, does it once with each of its requests, and compares the replies with the tree.
    pub(crate) fn prepare(
        operation: Operation,
        tree: &Tree,
        session: &mut Session,
        nodes: &mut Nodes,
    ) -> Result<Self> {
        let mut work = Self { operation, requests: Vec::new() };
        let prepared = match operation {
            Operation::Lookup | Operation::LookupMissing | Operation::Getattr => {
                some(tree, 1000).try_for_each(|entry| work.add_entry(entry, session, nodes))
            }
            Operation::Read4K => {
                small(tree).try_for_each(|file| work.add_read(&file.path, 0, 4096, session, nodes))
            }
            Operation::Read128K | Operation::Read1M => {
                let size = if operation == Operation::Read1M { 1 << 20 } else { 128 << 10 };
                (0..HOT)
                    .step_by(size as usize)
                    .try_for_each(|offset| work.add_read(&tree.hot, offset, size, session, nodes))
            }
            Operation::Readdirplus => work.add_listings(tree, session, nodes),
            Operation::OpenCycle => {
                tree.files(1..=u64::MAX).step_by(97).take(64).try_for_each(|(file, _)| {
                    let node = nodes.get(session, &file.path)?.nodeid;
                    work.requests.push(Request::open(node));
                    Ok(())
                })
            }
            Operation::SmallFile => {
                tree.files(1..=4096).step_by(19).take(2000).try_for_each(|(file, size)| {
                    let node = nodes.get(session, &file.path)?.nodeid;
                    work.requests.push(Request::read(node, 0, 0, pages(size)));
                    let opened = session.open(node)?;
                    let content = session.read(opened, 0, pages(size))?;
                    session.close(opened)?;
                    ensure!(
                        content.len() as u64 == size,
                        "{} has {size} bytes, not {}",
                        file.path,
                        content.len()
                    );
                    check_content(&file.path, 0, &content)
                })
            }
        };
        prepared.with_context(|| format!("{} does not work", operation.title()))?;
        ensure!(!work.requests.is_empty(), "The tree has nothing for {}", operation.title());
        for number in 0..work.requests.len() {
            work.once(session, number)?;
        }
        Ok(work)
    }

    fn add_entry(&mut self, entry: &Entry, session: &mut Session, nodes: &mut Nodes) -> Result<()> {
        let (parent, name) = entry.split().context("A store path")?;
        let parent = nodes.get(session, parent)?.nodeid;
        let found = nodes.get(session, &entry.path)?;
        check_attributes(entry, &found)?;
        self.requests.push(match self.operation {
            Operation::LookupMissing => {
                let missing = format!("{name}.missing");
                ensure!(session.lookup(parent, missing.as_bytes())?.is_none(), "{missing} is not missing");
                Request::lookup(parent, missing.as_bytes())
            }
            Operation::Getattr => Request::getattr(found.nodeid),
            _ => Request::lookup(parent, name.as_bytes()),
        });
        Ok(())
    }

    fn add_read(
        &mut self,
        path: &str,
        offset: u64,
        size: u32,
        session: &mut Session,
        nodes: &mut Nodes,
    ) -> Result<()> {
        let node = nodes.get(session, path)?.nodeid;
        let file = session.open(node)?;
        let content = session.read(file, offset, size)?;
        ensure!(content.len() == size as usize, "{path} at {offset} gives {} bytes", content.len());
        check_content(path, offset, &content)?;
        self.requests.push(Request::read(node, file.handle, offset, size));
        Ok(())
    }

    /// The first page of directories that fill one.
    fn add_listings(&mut self, tree: &Tree, session: &mut Session, nodes: &mut Nodes) -> Result<()> {
        let mut children: HashMap<&str, Vec<&str>> = HashMap::new();
        for (parent, name) in tree.entries.iter().filter_map(Entry::split) {
            children.entry(parent).or_default().push(name);
        }
        let full = tree
            .entries
            .iter()
            .filter(|entry| children.get(entry.path.as_str()).is_some_and(|c| c.len() > 40));
        for directory in full.step_by(7).take(64) {
            let node = nodes.get(session, &directory.path)?.nodeid;
            let listed = session.list(node)?;
            let mut names: Vec<_> = listed.iter().map(|entry| entry.name.as_slice()).collect();
            let mut expected: Vec<_> =
                children[directory.path.as_str()].iter().map(|name| name.as_bytes()).collect();
            names.sort_unstable();
            expected.sort_unstable();
            ensure!(names == expected, "{} is not listed as it is", directory.path);
            let opened = session.opendir(node)?;
            self.requests.push(Request::readdirplus(node, opened.handle, 0));
        }
        Ok(())
    }

    /// Does the operation once, with one of its requests.
    pub(crate) fn once(&self, session: &mut Session, number: usize) -> Result<()> {
        let request = &self.requests[number % self.requests.len()];
        match self.operation {
            Operation::OpenCycle => {
                let file = session.open(request.node)?;
                session.close(file)
            }
            Operation::SmallFile => {
                let file = session.open(request.node)?;
                session.must(&Request::read(file.node, file.handle, 0, request.data))?;
                session.close(file)
            }
            _ => {
                let header = session.send(request)?;
                self.check(request, &header, || session.queue.body(0))
            }
        }
    }

    /// Whether a reply is what it must be, as far as a glance shows.
    pub(crate) fn check(
        &self,
        request: &Request,
        header: &OutHeader,
        entry: impl FnOnce() -> EntryOut,
    ) -> Result<()> {
        let right = match self.operation {
            Operation::Lookup => header.error == 0 && entry().nodeid != 0,
            Operation::LookupMissing => {
                session::errno(header) == Errno::ENOENT || (header.error == 0 && entry().nodeid == 0)
            }
            Operation::Read4K | Operation::Read128K | Operation::Read1M => {
                header.error == 0 && header.len == request.data + size_of::<OutHeader>() as u32
            }
            _ => header.error == 0,
        };
        ensure!(right, "{} got {header:?}", self.operation.title());
        Ok(())
    }
}

/// The operation's requests for a device that then knows all answers to them. `None` for what no gate is about.
pub(crate) fn known(
    operation: Operation,
    tree: &Tree,
    store: &Path,
    known: &mut Known,
) -> Result<Option<Vec<Request>>> {
    let hot = |known: &mut Known, size: u32| {
        let node = known.map(store, &tree.hot)?;
        Ok((0..HOT).step_by(size as usize).map(|offset| Request::read(node, 0, offset, size)).collect())
    };
    let requests: Result<Vec<_>> = match operation {
        Operation::Lookup => some(tree, 1000)
            .map(|entry| {
                let [_, parent] = known.learn(entry)?;
                let (_, name) = entry.split().context("A store path")?;
                Ok(Request::lookup(parent, name.as_bytes()))
            })
            .collect(),
        Operation::Getattr => {
            some(tree, 1000).map(|entry| Ok(Request::getattr(known.learn(entry)?[0]))).collect()
        }
        Operation::Read4K => {
            small(tree).map(|file| Ok(Request::read(known.map(store, &file.path)?, 0, 0, 4096))).collect()
        }
        Operation::Read128K => hot(known, 128 << 10),
        Operation::Read1M => hot(known, 1 << 20),
        _ => return Ok(None),
    };
    requests.map(Some)
}

/// The files of which the first 4 KiB are read.
fn small(tree: &Tree) -> impl Iterator<Item = &Entry> {
    tree.files(4096..=16384).step_by(97).take(64).map(|(file, _)| file)
}

/// Entries from all over the tree that are no store paths.
fn some(tree: &Tree, count: usize) -> impl Iterator<Item = &Entry> {
    let mut random = Random(7);
    std::iter::repeat_with(move || &tree.entries[random.below(tree.entries.len() as u64) as usize])
        .filter(|entry| entry.split().is_some())
        .take(count)
}

fn check_attributes(entry: &Entry, found: &EntryOut) -> Result<()> {
    let (kind, size) = match &entry.kind {
        Kind::Directory => (0o040_000, None),
        Kind::File { size } => (0o100_000, Some(*size)),
        Kind::Link { target } => (0o120_000, Some(target.len() as u64)),
    };
    ensure!(
        found.attr.mode & 0o170_000 == kind && size.is_none_or(|size| size == found.attr.size),
        "{entry:?} is shown as {:?}",
        found.attr
    );
    Ok(())
}

/// Walks the whole tree as `find` does. How many inodes there are.
pub(crate) fn walk(session: &mut Session) -> Result<u64> {
    let mut directories = vec![ROOT];
    let mut inodes = 0;
    while let Some(directory) = directories.pop() {
        for entry in session.list(directory)? {
            inodes += 1;
            if entry.entry.attr.mode & 0o170_000 == 0o040_000 {
                ensure!(entry.entry.nodeid != 0, "READDIRPLUS gives no node for a directory");
                directories.push(entry.entry.nodeid);
            }
        }
    }
    Ok(inodes)
}
