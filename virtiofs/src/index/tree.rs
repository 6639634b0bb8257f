//! All that one VM may see: a root directory, and in it the store paths of its view.

use super::{IndexError, Inode, Manifest};
use crate::{store::StorePath, view::View};
use nix::{errno::Errno, fcntl::AtFlags, sys::stat::fstatat};
use std::{
    collections::HashMap,
    ffi::OsStr,
    os::fd::{AsFd, BorrowedFd},
};

/// What a guest calls an inode. The root is 1; else the slot of the store path, shifted by 32, and the inode's number in it.
///
/// Slots are the positions in the view, from 1. Views only grow at their end, so an id keeps its meaning for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeId {
    /// The root directory.
    Root,
    /// An inode in a store path.
    Inode {
        /// Which store path, from 1.
        slot: u32,
        /// The inode's number in it.
        number: u32,
    },
}

impl NodeId {
    /// The root's number on the wire, fixed by FUSE.
    const ROOT: u64 = 1;

    /// The number on the wire.
    pub fn to_wire(self) -> u64 {
        match self {
            Self::Root => Self::ROOT,
            Self::Inode { slot, number } => (u64::from(slot) << 32) | u64::from(number),
        }
    }

    /// `None` for a number that was never given out for any view.
    pub fn from_wire(wire: u64) -> Option<Self> {
        if wire == Self::ROOT {
            return Some(Self::Root);
        }
        let slot = u32::try_from(wire >> 32).ok().filter(|&slot| slot > 0)?;
        let number = u32::try_from(wire & u64::from(u32::MAX)).ok()?;
        Some(Self::Inode { slot, number })
    }
}

/// A store path in the root directory.
#[derive(Debug)]
pub struct Entry {
    /// The path.
    pub path: StorePath,
    /// Which of the sources has its files, from 0.
    pub source: usize,
    /// Its metadata.
    pub manifest: Manifest,
    /// The inode number that programs in the guest see (`st_ino`) for its inode 0; its others follow.
    pub first_ino: u64,
}

/// What a node id stands for.
#[derive(Debug, Clone, Copy)]
pub enum Node<'a> {
    /// The root directory.
    Root,
    /// An inode in a store path.
    Inode {
        /// The store path's slot.
        slot: u32,
        /// The store path.
        entry: &'a Entry,
        /// The inode's number in it.
        number: u32,
        /// The inode.
        inode: &'a Inode,
    },
}

/// The metadata of all that one VM may see.
#[derive(Debug)]
pub struct Tree {
    entries: Vec<Entry>,
    slots: HashMap<Box<[u8]>, u32>,
}

/// What the guest sees as the root's inode number.
const ROOT_INO: u64 = 1;

impl Tree {
    /// Reads the metadata of all paths of `view`, each from the first of the store directories that has it.
    pub fn build<D: AsFd>(stores: &[D], view: &View) -> Result<Self, IndexError> {
        let mut tree = Self { entries: Vec::new(), slots: HashMap::new() };
        let mut next_ino = ROOT_INO.saturating_add(1);
        for path in view.paths() {
            let source = find(stores, path)?;
            let store = stores.get(source).ok_or_else(|| IndexError::Missing { path: path.clone() })?;
            let manifest = Manifest::build(store.as_fd(), path)?;
            let first_ino = next_ino;
            next_ino = next_ino.saturating_add(manifest.len() as u64);
            tree.entries.push(Entry { path: path.clone(), source, manifest, first_ino });
            let slot =
                u32::try_from(tree.entries.len()).map_err(|_| IndexError::TooLarge { path: path.clone() })?;
            tree.slots.insert(path.base_name().as_bytes().into(), slot);
        }
        Ok(tree)
    }

    /// The store paths, in the order of their slots, which begin at 1.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many inodes there are in all store paths together.
    pub fn inodes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.manifest.len() as u64).fold(0, u64::saturating_add)
    }

    /// What an id stands for; `None` if it is outside the view.
    pub fn node(&self, id: NodeId) -> Option<Node<'_>> {
        let NodeId::Inode { slot, number } = id else { return Some(Node::Root) };
        let entry = self.entries.get(usize::try_from(slot).ok()?.checked_sub(1)?)?;
        let inode = entry.manifest.inode(number)?;
        Some(Node::Inode { slot, entry, number, inode })
    }

    /// The store path with this last component.
    pub fn lookup(&self, base_name: &[u8]) -> Option<NodeId> {
        self.slots.get(base_name).map(|&slot| NodeId::Inode { slot, number: 0 })
    }
}

impl Node<'_> {
    /// Its id.
    pub fn id(&self) -> NodeId {
        match *self {
            Self::Root => NodeId::Root,
            Self::Inode { slot, number, .. } => NodeId::Inode { slot, number },
        }
    }

    /// The id of the directory that holds it; the root's is the root.
    pub fn parent(&self) -> NodeId {
        match *self {
            Self::Root | Self::Inode { number: 0, .. } => NodeId::Root,
            Self::Inode { slot, inode, .. } => NodeId::Inode { slot, number: inode.parent },
        }
    }

    /// What programs in the guest see as its inode number.
    pub fn ino(&self) -> u64 {
        match *self {
            Self::Root => ROOT_INO,
            Self::Inode { entry, number, .. } => entry.first_ino.saturating_add(u64::from(number)),
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        match self {
            Self::Root => true,
            Self::Inode { inode, .. } => inode.is_directory(),
        }
    }
}

fn find<D: AsFd>(stores: &[D], path: &StorePath) -> Result<usize, IndexError> {
    for (number, store) in stores.iter().enumerate() {
        let store: BorrowedFd<'_> = store.as_fd();
        match fstatat(store, OsStr::new(path.base_name()), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => return Ok(number),
            Err(Errno::ENOENT) => {}
            Err(source) => return Err(IndexError::Io { path: path.clone(), names: Vec::new(), source }),
        }
    }
    Err(IndexError::Missing { path: path.clone() })
}
