//! READDIR and READDIRPLUS.
//!
//! An entry's offset is its position: 0 `.`, 1 `..`, then the children in their fixed order. What an entry says as its own
//! offset is that of the next one, from which the guest goes on.

use super::{
    attr::{dirent_kind, entry_out},
    wire::{Dirent, EntryOut},
};
use crate::index::{Node, NodeId, Tree};
use nix::errno::Errno;
use zerocopy::IntoBytes;

/// Appends entries from `offset` on to `out`, as many as fit in `room` bytes. Nothing appended means the end.
pub(super) fn list(
    tree: &Tree,
    directory: &Node<'_>,
    offset: u64,
    room: usize,
    plus: bool,
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    if !directory.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    let mut room = room;
    let mut position = offset;
    while let Some((name, node)) = entry(tree, directory, position) {
        let next = position.saturating_add(1);
        let length = length(name.len(), plus).ok_or(Errno::EINVAL)?;
        let Some(left) = room.checked_sub(length) else {
            // An empty answer would be taken for the end.
            return if position == offset { Err(Errno::EINVAL) } else { Ok(()) };
        };
        room = left;
        if plus {
            // The guest takes no reference on `.` and `..`; a node id of 0 tells it to leave them alone.
            let own = matches!(name, b"." | b"..");
            out.extend(if own { EntryOut::default() } else { entry_out(&node) }.as_bytes());
        }
        let namelen = u32::try_from(name.len()).map_err(|_| Errno::EINVAL)?;
        out.extend(Dirent { ino: node.ino(), off: next, namelen, kind: dirent_kind(&node) }.as_bytes());
        out.extend(name);
        out.resize(out.len().next_multiple_of(8), 0);
        position = next;
    }
    Ok(())
}

/// Bytes of an entry. `out` begins with a header of 16 bytes, so padding it to 8 pads the entry.
fn length(name: usize, plus: bool) -> Option<usize> {
    let fixed = if plus { size_of::<EntryOut>() } else { 0 };
    size_of::<Dirent>().checked_add(name)?.checked_next_multiple_of(8)?.checked_add(fixed)
}

fn entry<'a>(tree: &'a Tree, directory: &Node<'a>, position: u64) -> Option<(&'a [u8], Node<'a>)> {
    let child = match position {
        0 => return Some((b".", *directory)),
        1 => return Some((b"..", tree.node(directory.parent())?)),
        _ => u32::try_from(position.checked_sub(2)?).ok()?,
    };
    match *directory {
        Node::Root => {
            let node = tree.node(NodeId::Inode { slot: child.checked_add(1)?, number: 0 })?;
            let Node::Inode { entry, .. } = node else { return None };
            Some((entry.path.base_name().as_bytes(), node))
        }
        Node::Inode { slot, entry, inode, .. } => {
            let (first, children) = entry.manifest.children(inode);
            let inode = children.get(usize::try_from(child).ok()?)?;
            let number = first.checked_add(child)?;
            Some((entry.manifest.name(inode), Node::Inode { slot, entry, number, inode }))
        }
    }
}
