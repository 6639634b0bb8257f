//! The metadata of store paths: one immutable manifest each, in flat arrays.
//!
//! Inodes are numbered breadth first, so that the children of a directory are one range, and in it sorted by name: a lookup is a
//! binary search, a listing is a slice. There are offsets and no pointers, so that a manifest can come to live in a file that is
//! mapped.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

pub mod build;

use crate::{
    store::{Source, path::StorePath},
    view::View,
};
use build::BuildError;
use std::ops::Range;

/// The kinds of files in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Whether it may be executed.
        executable: bool,
    },
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// One inode of a manifest. Its name and, for a link, its target are ranges of the manifest's text.
#[derive(Debug, Clone)]
struct Inode {
    kind: Kind,
    /// Bytes of a file's contents or of a link's target; for a directory, the number of its children.
    size: u64,
    parent: u32,
    name: Range<u32>,
    /// For a directory the range of its children's numbers, for a link the range of its target in the text.
    range: Range<u32>,
}

/// The metadata of one store path; inode 0 is the path itself.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    inodes: Vec<Inode>,
    text: Vec<u8>,
    /// The store directory that has the path: its place among the sources.
    source: usize,
}

/// A file of the view: which store path, which inode in it. Slots begin with 1: 0 would be the root of the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Node {
    /// The store path's place in the view, from 1.
    pub slot: u32,
    /// The number of the inode within the store path.
    pub inode: u32,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Its kind.
    pub kind: Kind,
    /// Its size in bytes; of a directory, the number of its entries.
    pub size: u64,
    /// Its inode number, which no other file of the view has.
    pub ino: u64,
}

/// The metadata of all paths of a view.
#[derive(Debug, Default)]
pub struct Index {
    entries: Vec<Entry>,
    /// Places in `entries`, sorted by name.
    by_name: Vec<u32>,
    inodes: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    path: StorePath,
    manifest: Manifest,
    /// The inode number of the path's first inode.
    first_ino: u64,
}

/// The inode number of the view's root. Smaller ones are left free.
pub const ROOT_INO: u64 = 1;

impl Index {
    /// Reads the metadata of all paths of `view`; each is looked up in the sources in their order.
    pub fn build(sources: &[Source], view: &View) -> Result<Self, BuildError> {
        let mut index = Self { inodes: 0, ..Self::default() };
        for path in view.paths() {
            let manifest = build::manifest(sources, path)?;
            let first_ino = index.inodes.saturating_add(ROOT_INO).saturating_add(1);
            index.inodes =
                index.inodes.saturating_add(u64::try_from(manifest.inodes.len()).unwrap_or(u64::MAX));
            index.bytes =
                manifest.inodes.iter().map(|inode| inode.size).fold(index.bytes, u64::saturating_add);
            index.entries.push(Entry { path: path.clone(), manifest, first_ino });
        }
        index.by_name = (0..).take(index.entries.len()).collect();
        let entries = &index.entries;
        index
            .by_name
            .sort_by_key(|place| entries.get(*place as usize).map(|entry| entry.path.name().to_owned()));
        Ok(index)
    }

    /// How many store paths there are.
    pub fn paths(&self) -> usize {
        self.entries.len()
    }

    /// How many inodes there are, the root not counted.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// The bytes of all files' contents.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn entry(&self, slot: u32) -> Option<&Entry> {
        self.entries.get(usize::try_from(slot.checked_sub(1)?).ok()?)
    }

    fn inode(&self, node: Node) -> Option<(&Entry, &Inode)> {
        let entry = self.entry(node.slot)?;
        Some((entry, entry.manifest.inodes.get(usize::try_from(node.inode).ok()?)?))
    }

    /// What is known of a file; `None` if the view has no such file.
    pub fn attributes(&self, node: Node) -> Option<Attributes> {
        let (entry, inode) = self.inode(node)?;
        let ino = entry.first_ino.saturating_add(node.inode.into());
        Some(Attributes { kind: inode.kind, size: inode.size, ino })
    }

    /// The file `name` in a directory; `None` if there is none, or `node` is no directory.
    pub fn child(&self, node: Node, name: &[u8]) -> Option<Node> {
        let (entry, inode) = self.inode(node)?;
        let Range { start, end } = children(inode)?;
        let range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
        let siblings = entry.manifest.inodes.get(range)?;
        let found =
            siblings.binary_search_by(|sibling| entry.manifest.slice(&sibling.name).cmp(name)).ok()?;
        Some(Node { inode: start.checked_add(u32::try_from(found).ok()?)?, ..node })
    }

    /// The directory that holds a file; `None` for a store path itself, which the root holds.
    pub fn parent(&self, node: Node) -> Option<Node> {
        let (_, inode) = self.inode(node)?;
        (node.inode != 0).then_some(Node { inode: inode.parent, ..node })
    }

    /// The children of a directory from place `from` on, with their names.
    pub fn children(&self, node: Node, from: u64) -> impl Iterator<Item = (Node, &[u8])> {
        let found = self.inode(node).and_then(|(entry, inode)| Some((entry, children(inode)?)));
        found.into_iter().flat_map(move |(entry, range)| {
            let start = u64::from(range.start).saturating_add(from).min(range.end.into());
            (u32::try_from(start).unwrap_or(range.end)..range.end).filter_map(move |number| {
                let inode = entry.manifest.inodes.get(usize::try_from(number).ok()?)?;
                Some((Node { inode: number, ..node }, entry.manifest.slice(&inode.name)))
            })
        })
    }

    /// The target of a link; `None` if it is none.
    pub fn target(&self, node: Node) -> Option<&[u8]> {
        let (entry, inode) = self.inode(node)?;
        (inode.kind == Kind::Symlink).then(|| entry.manifest.slice(&inode.range))
    }

    /// The store path of this name.
    pub fn store_path(&self, name: &[u8]) -> Option<Node> {
        let place = self.by_name.binary_search_by(|place| self.name_at(*place).as_bytes().cmp(name)).ok()?;
        Some(Node { slot: self.by_name.get(place)?.checked_add(1)?, inode: 0 })
    }

    /// The store paths from place `from` on, sorted by name.
    pub fn store_paths(&self, from: u64) -> impl Iterator<Item = (Node, &[u8])> {
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(self.by_name.len());
        self.by_name.iter().skip(from).filter_map(|place| {
            Some((Node { slot: place.checked_add(1)?, inode: 0 }, self.name_at(*place).as_bytes()))
        })
    }

    fn name_at(&self, place: u32) -> &str {
        usize::try_from(place)
            .ok()
            .and_then(|place| self.entries.get(place))
            .map_or("", |entry| entry.path.name())
    }

    /// Where a file is on the host: the place of its source, and its path below that store directory.
    pub fn location(&self, node: Node) -> Option<(usize, Vec<u8>)> {
        let (entry, _) = self.inode(node)?;
        let mut names = Vec::new();
        let mut at = node;
        while let Some(parent) = self.parent(at) {
            names.push(entry.manifest.slice(&self.inode(at)?.1.name));
            at = parent;
        }
        names.push(entry.path.name().as_bytes());
        names.reverse();
        Some((entry.manifest.source, names.join(&b'/')))
    }
}

fn children(inode: &Inode) -> Option<Range<u32>> {
    (inode.kind == Kind::Directory).then(|| inode.range.clone())
}

impl Manifest {
    fn slice(&self, range: &Range<u32>) -> &[u8] {
        let range =
            usize::try_from(range.start).unwrap_or(usize::MAX)..usize::try_from(range.end).unwrap_or(0);
        self.text.get(range).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::BTreeMap, ffi::OsStr, fs, os::unix::ffi::OsStrExt, os::unix::fs::PermissionsExt,
        path::Path,
    };

    /// A store with one path and everything that a store may hold.
    pub(crate) fn store() -> (tempfile::TempDir, Source, View) {
        let directory = tempfile::tempdir().unwrap();
        let name = format!("{}-a", "a".repeat(32));
        let path = directory.path().join(&name);
        fs::create_dir_all(path.join("dir/deep/deeper")).unwrap();
        fs::write(path.join("dir/file"), "contents").unwrap();
        fs::write(path.join("run"), "#!").unwrap();
        fs::set_permissions(path.join("run"), fs::Permissions::from_mode(0o555)).unwrap();
        fs::write(path.join(OsStr::from_bytes(b"latin-\xe9")), "").unwrap();
        fs::write(path.join("n".repeat(255)), "long").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path.join("dir/link")).unwrap();
        fs::hard_link(path.join("run"), path.join("same")).unwrap();
        nix::unistd::mkfifo(&path.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let source = Source { store: directory.path().into(), database: directory.path().into() };
        (directory, source, View::new([StorePath::from_name(&name).unwrap()]))
    }

    fn walk(
        index: &Index,
        node: Node,
        prefix: &Path,
        found: &mut BTreeMap<std::path::PathBuf, (Node, Attributes)>,
    ) {
        for (child, name) in index.children(node, 0) {
            let path = prefix.join(OsStr::from_bytes(name));
            assert_eq!(index.child(node, name), Some(child));
            assert_eq!(index.parent(child), Some(node));
            found.insert(path.clone(), (child, index.attributes(child).unwrap()));
            walk(index, child, &path, found);
        }
    }

    #[test]
    fn the_index_has_what_the_store_has_and_nothing_else() {
        let (directory, source, view) = store();
        let index = Index::build(&[source], &view).unwrap();
        let name = view.paths()[0].name();
        let root = index.store_path(name.as_bytes()).unwrap();
        assert_eq!(root, Node { slot: 1, inode: 0 });
        let mut found = BTreeMap::new();
        walk(&index, root, Path::new(""), &mut found);
        let long = "n".repeat(255);
        let latin = OsStr::from_bytes(b"latin-\xe9");
        let expected = ["dir", "dir/deep", "dir/deep/deeper", "dir/file", "dir/link", &long, "run", "same"];
        let mut expected: Vec<_> = expected.iter().map(std::path::PathBuf::from).collect();
        expected.push(latin.into());
        expected.sort();
        assert_eq!(found.keys().cloned().collect::<Vec<_>>(), expected);
        assert_eq!(index.inodes(), 10);
        let attributes = |path: &str| found[Path::new(path)].1;
        assert_eq!((attributes("run").kind, attributes("run").size), (Kind::File { executable: true }, 2));
        assert_eq!(
            (attributes("dir/file").kind, attributes("dir/file").size),
            (Kind::File { executable: false }, 8)
        );
        assert_eq!(attributes("dir").kind, Kind::Directory);
        let link = found[Path::new("dir/link")].0;
        assert_eq!(index.target(link), Some(&b"/etc/passwd"[..]));
        assert_eq!(index.target(root), None);
        let inos: std::collections::BTreeSet<_> =
            found.values().map(|(_, attributes)| attributes.ino).collect();
        assert_eq!(inos.len(), found.len());
        assert!(inos.first().is_some_and(|ino| *ino > ROOT_INO));
        let (source, place) = index.location(found[Path::new("dir/file")].0).unwrap();
        assert_eq!((source, place), (0, format!("{name}/dir/file").into_bytes()));
        assert!(directory.path().join(format!("{name}/dir/file")).exists());
    }

    #[test]
    fn what_is_not_there_is_none_never_a_panic() {
        let (_directory, source, view) = store();
        let index = Index::build(&[source], &view).unwrap();
        for slot in [0, 2, u32::MAX] {
            assert_eq!(index.attributes(Node { slot, inode: 0 }), None);
        }
        let wrong = Node { slot: 1, inode: u32::MAX };
        assert_eq!((index.attributes(wrong), index.parent(wrong), index.target(wrong)), (None, None, None));
        assert_eq!((index.child(wrong, b"x"), index.location(wrong)), (None, None));
        assert_eq!(
            index.children(wrong, 0).count() + index.children(Node { slot: 1, inode: 0 }, u64::MAX).count(),
            0
        );
        assert_eq!((index.store_path(b"x"), index.store_paths(u64::MAX).count()), (None, 0));
        assert_eq!(index.child(Node { slot: 1, inode: 0 }, b"fifo"), None);
    }

    #[test]
    fn a_path_that_is_nowhere_is_an_error() {
        let (_directory, source, _) = store();
        let view = View::new([StorePath::from_name(&format!("{}-z", "z".repeat(32))).unwrap()]);
        assert!(Index::build(&[source], &view).is_err());
    }
}
