//! Attributes and lifetimes, the same whatever the host's file system says: root owns all, nothing is writable, and all
//! times are one second after the epoch, as in every Nix store. Only the root's time goes on with each change, so that the guest
//! sees that a listing that it has kept is out of date.

use super::wire::{Attr, AttrOut, EntryOut};
use crate::index::{Kind, Node};

/// Lifetime in seconds of what never changes: 30 years. Much larger values risk overflows in the guest.
pub(super) const FOREVER: u64 = 1_000_000_000;

/// Lifetime in seconds of the root's attributes, the only ones that can change.
const ROOT_VALID: u64 = 1;

const BLOCK: u32 = 4096;

/// Type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

#[inline(always)]
pub(super) fn attr(node: &Node<'_>) -> Attr {
    let (mode, size, nlink, time) = match node {
        Node::Root(tree) => (DIRECTORY | 0o555, 0, tree.root_links(), tree.changes().saturating_add(1)),
        Node::Inode { inode, .. } => {
            let mode = match inode.kind() {
                Kind::Directory => DIRECTORY | 0o555,
                Kind::File { executable: true } => FILE | 0o555,
                Kind::File { executable: false } => FILE | 0o444,
                Kind::Symlink | Kind::Alias => SYMLINK | 0o777,
            };
            (mode, inode.size(), inode.links, 1)
        }
    };
    Attr {
        ino: node.ino(),
        size,
        blocks: size.div_ceil(512),
        atime: 1,
        mtime: time,
        ctime: time,
        mode,
        nlink,
        blksize: BLOCK,
        ..Attr::default()
    }
}

#[inline(always)]
pub(super) fn attr_out(node: &Node<'_>) -> AttrOut {
    AttrOut { attr_valid: attr_valid(node), attr: attr(node), ..AttrOut::default() }
}

#[inline(always)]
pub(super) fn entry_out(node: &Node<'_>) -> EntryOut {
    EntryOut {
        nodeid: node.id().to_wire(),
        entry_valid: FOREVER,
        attr_valid: attr_valid(node),
        attr: attr(node),
        ..EntryOut::default()
    }
}

/// The type of a directory entry, `DT_*`.
pub(super) fn dirent_kind(node: &Node<'_>) -> u32 {
    attr(node).mode >> 12
}

fn attr_valid(node: &Node<'_>) -> u64 {
    match node {
        Node::Root(_) => ROOT_VALID,
        Node::Inode { .. } => FOREVER,
    }
}
