//! Answers about a tree, made beforehand: what a device would have that knows what it will be asked, and need not find out anything.
//!
//! No backend can have this: the answers to all that could be asked take many times the room, for one guest, and nothing of it is shared,
//! checked or kept up to date. Only files are copied from where they are, in the page cache: there would be no end of copies of them.

#![allow(unsafe_code)] // Mapping files.

use crate::tree::{Entry, Kind};
use anyhow::{Context, Result};
use foldhash::fast::RandomState;
use lair_virtiofs::fuse::{
    Opcode,
    wire::{Attr, AttrOut, EntryOut, InHeader, ReadIn},
};
use memmap2::{Mmap, MmapOptions};
use std::{collections::HashMap, fs::File, path::Path};
use zerocopy::{FromBytes, IntoBytes};

/// The longest name, the NUL behind it, and the node before it.
pub const KEY_MAX: usize = NODE + 256;
/// Bytes of a node's number.
pub const NODE: usize = size_of::<u64>();

/// The first node's number; 1 is a root's.
const FIRST: u64 = 2;

/// Parts of a tree, known by heart.
#[derive(Debug, Default)]
pub struct Known {
    /// By node, from [`FIRST`].
    attributes: Vec<AttrOut>,
    /// By the directory's node and the name, as they come in a request.
    names: HashMap<Box<[u8]>, EntryOut, RandomState>,
    /// Those files that were asked for.
    contents: HashMap<u64, Mmap, RandomState>,
    nodes: HashMap<String, u64>,
}

impl Known {
    /// Learns of an inode that is no store path: its node, and that of its directory.
    pub fn learn(&mut self, entry: &Entry) -> Result<[u64; 2]> {
        let (parent, name) = entry.split().context("A store path")?;
        let parent = self.node(parent);
        let node = self.node(&entry.path);
        let attr = attributes(node, entry);
        if let Some(known) = self.attributes.get_mut((node - FIRST) as usize) {
            *known = AttrOut { attr_valid: 1, attr, ..AttrOut::default() };
        }
        let key = [parent.as_bytes(), name.as_bytes(), b"\0"].concat();
        self.names.insert(key.into(), EntryOut { nodeid: node, attr, ..EntryOut::default() });
        Ok([node, parent])
    }

    /// The node of a path, a new one if there is none.
    fn node(&mut self, path: &str) -> u64 {
        let next = FIRST + self.attributes.len() as u64;
        let node = *self.nodes.entry(path.into()).or_insert(next);
        if node == next {
            self.attributes.push(AttrOut::default());
        }
        node
    }

    /// Maps a file of the store directory, whole, as it is in the page cache. Its node.
    pub fn map(&mut self, store: &Path, path: &str) -> Result<u64> {
        let node = self.node(path);
        let file = File::open(store.join(path)).with_context(|| format!("Cannot open {path}"))?;
        // SAFETY: a file of the store that is measured, which nobody changes meanwhile.
        let map = unsafe { MmapOptions::new().populate().map(&file) };
        self.contents.insert(node, map.with_context(|| format!("Cannot map {path}"))?);
        Ok(node)
    }

    /// What the answer to a request holds behind its header. The request's arguments are behind its node in `key`.
    pub(super) fn answer(&self, header: &InHeader, key: &[u8]) -> Option<&[u8]> {
        if header.opcode == Opcode::Lookup as u32 {
            return self.names.get(key).map(IntoBytes::as_bytes);
        }
        if header.opcode == Opcode::Getattr as u32 {
            return self.attributes.get(header.nodeid.checked_sub(FIRST)? as usize).map(IntoBytes::as_bytes);
        }
        let (read, _) = ReadIn::read_from_prefix(key.get(NODE..)?).ok()?;
        let begin = read.offset as usize;
        self.contents.get(&header.nodeid)?.get(begin..begin.checked_add(read.size as usize)?)
    }
}

fn attributes(node: u64, entry: &Entry) -> Attr {
    let (mode, size) = match &entry.kind {
        Kind::Directory => (0o040_555, 0),
        Kind::File { size } => (0o100_444, *size),
        Kind::Link { target } => (0o120_777, target.len() as u64),
    };
    Attr { ino: node, size, mode, nlink: 1, ..Attr::default() }
}
