//! The records of a store path's inodes, with their names and the table: all that is needed to find one.

use super::{
    inode::{Inode, Kind},
    manifest::ManifestError,
    table::{self, Place},
};

/// The records of one store path, wherever they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records<'a> {
    pub(super) inodes: &'a [Inode],
    pub(super) table: &'a [Place],
    pub(super) names: &'a [u8],
}

impl<'a> Records<'a> {
    pub(super) fn name(&self, inode: &Inode) -> &'a [u8] {
        range(self.names, inode.name, u64::from(inode.name_len)).unwrap_or_default()
    }

    #[inline]
    pub(super) fn inode(&self, number: u32) -> Option<&'a Inode> {
        self.inodes.get(usize::try_from(number).ok()?)
    }

    pub(super) fn path(&self, number: u32) -> Option<Vec<&'a [u8]>> {
        let mut names = Vec::new();
        let mut number = number;
        while number != 0 {
            let inode = self.inode(number)?;
            // A parent comes before its children, so this ends.
            if inode.parent >= number {
                return None;
            }
            let name = self.name(inode);
            // With anything else an index could lead out of the store path.
            if matches!(name, b"" | b"." | b"..") || name.iter().any(|&c| c == 0 || c == b'/') {
                return None;
            }
            names.push(name);
            number = inode.parent;
        }
        names.reverse();
        Some(names)
    }

    pub(super) fn children(&self, directory: &Inode) -> Option<&'a [Inode]> {
        directory.is_directory().then(|| range(self.inodes, directory.first, u64::from(directory.count)))?
    }

    /// The number and the record of the child with this name of the directory with this number. Where there is a table, the directory's
    /// own record is not looked at.
    #[inline]
    fn find(&self, directory: u32, name: &[u8]) -> Result<Option<(u32, &'a Inode)>, ManifestError> {
        if self.table.is_empty() {
            return self.search(directory, name);
        }
        let hash = table::hash(name);
        let tag = table::tag(hash);
        // A loop, since the compiler puts what is chained into a function of its own.
        for place in table::find(self.table, directory, hash) {
            let child = self.inode(place.number).ok_or(ManifestError::Range)?;
            if child.tag == tag
                && child.parent == directory
                && range(self.names, place.name, u64::from(child.name_len)) == Some(name)
            {
                return Ok(Some((place.number, child)));
            }
        }
        Ok(None)
    }

    /// The same, without a table.
    #[cold]
    fn search(&self, directory: u32, name: &[u8]) -> Result<Option<(u32, &'a Inode)>, ManifestError> {
        let Some(directory) = self.inode(directory).filter(|inode| inode.is_directory()) else {
            return Ok(None);
        };
        let children = self.children(directory).ok_or(ManifestError::Range)?;
        let Ok(at) = children.binary_search_by(|child| self.name(child).cmp(name)) else { return Ok(None) };
        let number = u32::try_from(at).ok().and_then(|at| directory.first.checked_add(at));
        number.zip(children.get(at)).map(Some).ok_or(ManifestError::Range)
    }

    /// The inode that a record stands for, and its number: its own, or for an alias that of the first name.
    pub(super) fn resolve(&self, number: u32) -> Option<(u32, &'a Inode)> {
        let inode = self.inode(number)?;
        if inode.kind() != Kind::Alias {
            return Some((number, inode));
        }
        self.inode(inode.first).filter(|of| of.kind() != Kind::Alias).map(|of| (inode.first, of))
    }

    /// The child with this name of the directory with this number, for an alias the inode that it stands for, and its number.
    #[inline]
    pub(super) fn lookup(
        &self,
        directory: u32,
        name: &[u8],
    ) -> Result<Option<(u32, &'a Inode)>, ManifestError> {
        match self.find(directory, name)? {
            Some((_, child)) if child.kind() == Kind::Alias => {
                self.resolve(child.first).ok_or(ManifestError::Range).map(Some)
            }
            found => Ok(found),
        }
    }
}

/// So many of `all` from `first` on; `None` if there are not as many.
#[inline]
pub(super) fn range<T>(all: &[T], first: u32, count: u64) -> Option<&[T]> {
    let first = usize::try_from(first).ok()?;
    let end = first.checked_add(usize::try_from(count).ok()?)?;
    all.get(first..end)
}
