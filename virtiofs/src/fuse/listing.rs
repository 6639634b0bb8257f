//! READDIR and READDIRPLUS.
//!
//! An entry's offset is its position: 0 `.`, 1 `..`, then the children in their fixed order. What an entry says as its own
//! offset is that of the next one, from which the guest goes on. In the root paths come at the end and leave their position
//! empty when they go, so a guest that is listing it meanwhile sees each of the others once.

use super::{
    attr::{dirent_kind, entry_out},
    wire::{Dirent, EntryOut},
};
use crate::index::{Node, Tree};
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
    while let Some((name, node, next)) = entry(tree, directory, position)? {
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

/// An entry of a listing: its name, what it names, and the position from which the next one is looked for.
type Listed<'a> = (&'a [u8], Node<'a>, u64);

/// The entry at a position, or in the root the next one behind it. `None` at the end; EIO for damage, since the guest would
/// take an end that is none for the whole listing.
fn entry<'a>(tree: &'a Tree, directory: &Node<'a>, position: u64) -> Result<Option<Listed<'a>>, Errno> {
    let next = position.saturating_add(1);
    let Some(child) = position.checked_sub(2) else {
        let (name, node) = match position {
            0 => (&b"."[..], Some(*directory)),
            _ => (&b".."[..], tree.parent(directory)),
        };
        return node.ok_or(Errno::EIO).map(|node| Some((name, node, next)));
    };
    let Ok(child) = u32::try_from(child) else { return Ok(None) };
    match *directory {
        Node::Root(_) => {
            let Some(entry) = tree.entry_from(child) else { return Ok(None) };
            let node = entry.node(0).ok_or(Errno::EIO)?;
            let next = u64::from(entry.position).saturating_add(3);
            Ok(Some((entry.path.base_name().as_bytes(), node, next)))
        }
        Node::Inode { entry, inode, .. } => {
            let (first, children) = entry.manifest.children(inode).ok_or(Errno::EIO)?;
            let Some(record) = usize::try_from(child).ok().and_then(|child| children.get(child)) else {
                return Ok(None);
            };
            let node = first.checked_add(child).and_then(|number| entry.node(number)).ok_or(Errno::EIO)?;
            Ok(Some((entry.manifest.name(record), node, next)))
        }
    }
}
