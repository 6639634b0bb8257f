//! All that one VM may see: a root directory, and in it the store paths of its view.
//!
//! A tree does not change; what a VM may see grows by replacing its tree, in which all that was there before keeps its id.

use super::{IndexError, Inode, Kind, Manifest, ManifestError, near::BySlot, slot::Slots};
use crate::store::StorePath;
use foldhash::fast::RandomState;
use std::{
    borrow::Borrow,
    collections::HashSet,
    hash::{Hash, Hasher},
    sync::Arc,
};

/// What a guest calls an inode. The root is 1; else the slot of the store path, shifted by 32, and the inode's number in it.
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
    #[inline]
    pub fn from_wire(wire: u64) -> Option<Self> {
        if wire == Self::ROOT {
            return Some(Self::Root);
        }
        let slot = u32::try_from(wire >> 32).ok().filter(|&slot| slot > 0)?;
        let number = u32::try_from(wire & u64::from(u32::MAX)).ok()?;
        Some(Self::Inode { slot, number })
    }
}

/// A store path in the root directory. What a reply needs of it comes first, for one fetch of memory.
#[derive(Debug)]
#[repr(C)]
pub struct Entry {
    /// The inode number that programs in the guest see (`st_ino`) for its inode 0; its others follow.
    pub first_ino: u64,
    /// The upper half of its inodes' ids.
    pub slot: u32,
    /// Its place in the root directory, from 0. Those of paths that went stay empty.
    pub position: u32,
    /// Which of the sources has its files, from 0.
    pub source: usize,
    /// The path.
    pub path: StorePath,
    /// Its metadata.
    pub manifest: Manifest,
}

/// What a node id stands for.
#[derive(Debug, Clone, Copy)]
pub enum Node<'a> {
    /// The root directory.
    Root(&'a Tree),
    /// An inode in a store path. Never an alias.
    Inode {
        /// The store path.
        entry: &'a Entry,
        /// The inode's number in it.
        number: u32,
        /// The inode.
        inode: &'a Inode,
    },
}

/// The metadata of all that one VM may see.
#[derive(Debug, Clone)]
pub struct Tree {
    /// By position.
    entries: Vec<Arc<Entry>>,
    names: HashSet<ByName, RandomState>,
    slots: BySlot,
    /// How store paths are numbered that no index has.
    numbering: Slots,
    next_position: u32,
    next_ino: u64,
    /// How many paths came or went, those of the beginning included.
    changes: u64,
    /// How many of the paths are directories.
    directories: u32,
    /// How many inodes all paths have together.
    inodes: u64,
}

/// An entry in a set in which it is found by the last component of its path. The guest looks for names of its choice, but what
/// is in the set is not its choice, so a name costs it one look whatever it is.
#[derive(Debug, Clone)]
struct ByName(Arc<Entry>);

impl Borrow<[u8]> for ByName {
    fn borrow(&self) -> &[u8] {
        self.0.path.base_name().as_bytes()
    }
}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Borrow::<[u8]>::borrow(self).hash(state);
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        Borrow::<[u8]>::borrow(self) == Borrow::<[u8]>::borrow(other)
    }
}

impl Eq for ByName {}

/// What the guest sees as the root's inode number.
const ROOT_INO: u64 = 1;

impl Tree {
    /// A tree of nothing.
    pub(super) fn empty(numbering: Slots) -> Self {
        Self {
            entries: Vec::new(),
            names: HashSet::default(),
            slots: BySlot::default(),
            numbering,
            next_position: 0,
            next_ino: numbering.first_ino(),
            changes: 0,
            directories: 0,
            inodes: 0,
        }
    }

    /// A tree of one store path whose metadata is this. For tests and fuzzers.
    pub fn of(path: &StorePath, manifest: Manifest) -> Result<Self, IndexError> {
        let mut tree = Self::empty(Slots::Upwards);
        tree.insert(path, 0, manifest, None).map(|()| tree)
    }

    /// Makes room for so many more paths.
    pub(super) fn reserve(&mut self, paths: usize) {
        self.entries.reserve(paths);
        self.names.reserve(paths);
        self.slots.reserve(paths);
    }

    /// Adds a path that is not there yet. With `indexed` it has this slot and these inode numbers, else ones of this tree.
    pub(super) fn insert(
        &mut self,
        path: &StorePath,
        source: usize,
        manifest: Manifest,
        indexed: Option<(u32, u64)>,
    ) -> Result<(), IndexError> {
        let full = || IndexError::TooLarge { path: path.clone() };
        let position = self.next_position;
        let (slot, first_ino) = match indexed {
            Some(given) => given,
            None => {
                let first_ino = self.next_ino;
                self.next_ino = first_ino.checked_add(u64::from(manifest.len())).ok_or_else(full)?;
                (self.numbering.slot(position).ok_or_else(full)?, first_ino)
            }
        };
        self.next_position = position.checked_add(1).ok_or_else(full)?;
        self.changes = self.changes.saturating_add(1);
        self.inodes = self.inodes.saturating_add(u64::from(manifest.inodes()));
        self.directories = self.directories.saturating_add(u32::from(is_directory(&manifest)));
        let entry = Arc::new(Entry { path: path.clone(), source, slot, position, manifest, first_ino });
        self.slots.insert(entry.clone());
        self.names.insert(ByName(entry.clone()));
        self.entries.push(entry);
        Ok(())
    }

    /// Whether a store path has this slot.
    pub(super) fn has_slot(&self, slot: u32) -> bool {
        self.slots.get(slot).is_some()
    }

    /// A tree without these paths, and how many of them were there.
    pub fn without(&self, paths: &[StorePath]) -> (Self, usize) {
        // All but the table of slots, which is made anew.
        let (entries, names) = (self.entries.clone(), self.names.clone());
        let mut tree = Self { entries, names, slots: BySlot::default(), ..*self };
        for path in paths {
            if let Some(ByName(entry)) = tree.names.take(path.base_name().as_bytes()) {
                tree.changes = tree.changes.saturating_add(1);
                tree.inodes = tree.inodes.saturating_sub(u64::from(entry.manifest.inodes()));
                tree.directories = tree.directories.saturating_sub(u32::from(is_directory(&entry.manifest)));
            }
        }
        tree.entries.retain(|entry| tree.names.contains(entry.path.base_name().as_bytes()));
        tree.slots = tree.entries.iter().cloned().collect();
        let gone = self.entries.len().saturating_sub(tree.entries.len());
        (tree, gone)
    }

    /// The store paths, in the order of the root directory.
    pub fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// The first store path at this place in the root directory or behind it.
    pub fn entry_from(&self, position: u32) -> Option<&Entry> {
        // With nothing gone it is right there.
        let guess = usize::try_from(position).ok()?;
        match self.entries.get(guess) {
            Some(entry) if entry.position == position => Some(entry),
            _ => {
                let index = self.entries.partition_point(|entry| entry.position < position);
                self.entries.get(index).map(Arc::as_ref)
            }
        }
    }

    /// How many inodes there are in all store paths together.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// The root's link count: 2 and its subdirectories.
    pub fn root_links(&self) -> u32 {
        self.directories.saturating_add(2)
    }

    /// How many paths came or went so far, those that were there in the beginning included.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What an id stands for; `None` if it is outside the view.
    #[inline(always)]
    pub fn node(&self, id: NodeId) -> Option<Node<'_>> {
        match id {
            NodeId::Root => Some(Node::Root(self)),
            NodeId::Inode { slot, number } => {
                let near = self.slots.get(slot)?;
                let inode = near.records().inode(number).filter(|inode| inode.kind() != Kind::Alias)?;
                Some(Node::Inode { entry: near.entry(), number, inode })
            }
        }
    }

    /// The child with this name of a directory in the store path with this slot. The directory itself is not looked at: that would be one more
    /// thing to wait for.
    #[inline(always)]
    pub fn child(&self, slot: u32, directory: u32, name: &[u8]) -> Result<Option<Node<'_>>, ManifestError> {
        let Some(near) = self.slots.get(slot) else { return Ok(None) };
        let found = near.records().lookup(directory, name)?;
        Ok(found.map(|(number, inode)| Node::Inode { entry: near.entry(), number, inode }))
    }

    /// Whether the view has this path.
    pub fn contains(&self, path: &StorePath) -> bool {
        self.names.contains(path.base_name().as_bytes())
    }

    /// The store path with this last component.
    pub fn lookup(&self, base_name: &[u8]) -> Option<Node<'_>> {
        self.names.get(base_name)?.0.node(0)
    }

    /// The directory that holds a node; the root is in itself.
    pub fn parent(&self, node: &Node<'_>) -> Option<Node<'_>> {
        match node {
            Node::Root(_) | Node::Inode { number: 0, .. } => Some(Node::Root(self)),
            Node::Inode { entry, inode, .. } => {
                self.node(NodeId::Inode { slot: entry.slot, number: inode.parent })
            }
        }
    }
}

fn is_directory(manifest: &Manifest) -> bool {
    manifest.inode(0).is_some_and(Inode::is_directory)
}

impl Entry {
    /// The inode with this number, or if that is an alias, what it stands for.
    pub fn node(&self, number: u32) -> Option<Node<'_>> {
        let (number, inode) = self.manifest.resolve(number)?;
        Some(Node::Inode { entry: self, number, inode })
    }
}

impl Node<'_> {
    /// Its id.
    pub fn id(&self) -> NodeId {
        match self {
            Self::Root(_) => NodeId::Root,
            Self::Inode { entry, number, .. } => NodeId::Inode { slot: entry.slot, number: *number },
        }
    }

    /// What programs in the guest see as its inode number.
    pub fn ino(&self) -> u64 {
        match self {
            Self::Root(_) => ROOT_INO,
            Self::Inode { entry, number, .. } => entry.first_ino.saturating_add(u64::from(*number)),
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        match self {
            Self::Root(_) => true,
            Self::Inode { inode, .. } => inode.is_directory(),
        }
    }
}
