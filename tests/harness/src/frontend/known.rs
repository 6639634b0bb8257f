//! Answers about a tree, made beforehand: what a device would have that knows what it will be asked, and need not find out anything.
//!
//! No backend can have this: the answers to all that could be asked take many times the room, for one guest, and nothing of it is shared,
//! checked or kept up to date. Only files are copied from where they are, in the page cache: there would be no end of copies of them.

#![allow(unsafe_code)] // Mapping files.

use crate::tree::{Entry, Kind};
use anyhow::{Context, Result};
use foldhash::fast::RandomState;
use lair_virtiofs::{
    fuse::{
        Opcode,
        wire::{Attr, AttrOut, EntryOut, InHeader, ReadIn},
    },
    index::NodeId,
};
use memmap2::{Mmap, MmapOptions};
use std::{collections::HashMap, fs::File, path::Path};
use zerocopy::{FromBytes, IntoBytes};

/// The longest name, the NUL behind it, and the node before it.
pub const KEY_MAX: usize = NODE + 256;
/// Bytes of a node's number.
pub const NODE: usize = size_of::<u64>();

/// Parts of a tree, known by heart. Nodes are numbered as what is known of a store path could be shared by all guests that see it: by the store
/// path, and in it.
#[derive(Debug, Default)]
pub struct Known {
    /// By store path, from 1, and by node in it, from 0.
    attributes: Vec<Vec<AttrOut>>,
    /// By the directory's node and the name, as they come in a request.
    names: HashMap<Box<[u8]>, EntryOut, RandomState>,
    /// Those files that were asked for.
    contents: HashMap<u64, Mmap, RandomState>,
    /// Of paths.
    nodes: HashMap<String, NodeId>,
    slots: HashMap<String, u32>,
}

impl Known {
    /// Learns of an inode that is no store path: its node, and that of its directory.
    pub fn learn(&mut self, entry: &Entry) -> Result<[u64; 2]> {
        let (parent, name) = entry.split().context("A store path")?;
        let parent = self.node(parent).to_wire();
        let node = self.node(&entry.path);
        let place = self.place(node).context("A root")?;
        let node = node.to_wire();
        let attr = attributes(node, entry);
        *place = AttrOut { attr_valid: 1, attr, ..AttrOut::default() };
        let key = [parent.as_bytes(), name.as_bytes(), b"\0"].concat();
        self.names.insert(key.into(), EntryOut { nodeid: node, attr, ..EntryOut::default() });
        Ok([node, parent])
    }

    /// The node of a path, a new one if there is none.
    fn node(&mut self, path: &str) -> NodeId {
        if let Some(&node) = self.nodes.get(path) {
            return node;
        }
        let store_path = path.split('/').next().unwrap_or(path);
        let slots = self.slots.len() as u32;
        let slot = *self.slots.entry(store_path.into()).or_insert(slots + 1);
        self.attributes.resize(self.slots.len() + 1, vec![]);
        let those = &mut self.attributes[slot as usize];
        let node = NodeId::Inode { slot, number: those.len() as u32 };
        those.push(AttrOut::default());
        self.nodes.insert(path.into(), node);
        node
    }

    /// Where its attributes are kept.
    fn place(&mut self, node: NodeId) -> Option<&mut AttrOut> {
        let NodeId::Inode { slot, number } = node else { return None };
        self.attributes.get_mut(slot as usize)?.get_mut(number as usize)
    }

    /// Maps a file of the store directory, whole, as it is in the page cache. Its node.
    pub fn map(&mut self, store: &Path, path: &str) -> Result<u64> {
        let node = self.node(path).to_wire();
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
            let NodeId::Inode { slot, number } = NodeId::from_wire(header.nodeid)? else { return None };
            return self.attributes.get(slot as usize)?.get(number as usize).map(IntoBytes::as_bytes);
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
