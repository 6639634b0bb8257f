//! The opcodes, and what is done with each.

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// It has an answer of its own.
    Answered(Request),
    /// It would change something: EROFS, from its header alone.
    Write,
    /// The guest's kernel does it by itself once it has been told ENOSYS.
    Unsupported,
    /// A device's control: ENOTTY.
    Ioctl,
    /// It has no reply.
    Silent,
}

/// The requests that have an answer of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Begins a session.
    Init,
    /// Ends a session.
    Destroy,
    /// Looks a name up.
    Lookup,
    /// Attributes of a file.
    GetAttr,
    /// The target of a link.
    ReadLink,
    /// Contents of a file.
    Read,
    /// Names in a directory.
    ReadDir,
    /// Names in a directory with their attributes.
    ReadDirPlus,
    /// Figures of the file system.
    StatFs,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Opcode {
    /// The number on the wire.
    pub number: u32,
    /// The name, for counters.
    pub name: &'static str,
    /// What is done.
    pub treatment: Treatment,
}

const fn row(number: u32, name: &'static str, treatment: Treatment) -> Opcode {
    Opcode { number, name, treatment }
}

use Request::{Destroy, GetAttr, Init, Lookup, Read, ReadDir, ReadDirPlus, ReadLink, StatFs};
use Treatment::{Answered, Ioctl, Silent, Unsupported, Write};

/// All opcodes up to 7.45. What is not here is answered like [`Treatment::Unsupported`].
///
/// OPEN, OPENDIR and FLUSH are refused once and then never sent again: a file is named by its node alone.
pub const OPCODES: &[Opcode] = &[
    row(1, "lookup", Answered(Lookup)),
    row(2, "forget", Silent),
    row(3, "getattr", Answered(GetAttr)),
    row(4, "setattr", Write),
    row(5, "readlink", Answered(ReadLink)),
    row(6, "symlink", Write),
    row(8, "mknod", Write),
    row(9, "mkdir", Write),
    row(10, "unlink", Write),
    row(11, "rmdir", Write),
    row(12, "rename", Write),
    row(13, "link", Write),
    row(14, "open", Unsupported),
    row(15, "read", Answered(Read)),
    row(16, "write", Write),
    row(17, "statfs", Answered(StatFs)),
    row(18, "release", Unsupported),
    row(20, "fsync", Unsupported),
    row(21, "setxattr", Write),
    row(22, "getxattr", Unsupported),
    row(23, "listxattr", Unsupported),
    row(24, "removexattr", Write),
    row(25, "flush", Unsupported),
    row(26, "init", Answered(Init)),
    row(27, "opendir", Unsupported),
    row(28, "readdir", Answered(ReadDir)),
    row(29, "releasedir", Unsupported),
    row(30, "fsyncdir", Unsupported),
    row(31, "getlk", Unsupported),
    row(32, "setlk", Unsupported),
    row(33, "setlkw", Unsupported),
    row(34, "access", Unsupported),
    row(35, "create", Write),
    row(36, "interrupt", Silent),
    row(37, "bmap", Unsupported),
    row(38, "destroy", Answered(Destroy)),
    row(39, "ioctl", Ioctl),
    row(40, "poll", Unsupported),
    row(41, "notify_reply", Silent),
    row(42, "batch_forget", Silent),
    row(43, "fallocate", Write),
    row(44, "readdirplus", Answered(ReadDirPlus)),
    row(45, "rename2", Write),
    row(46, "lseek", Unsupported),
    row(47, "copy_file_range", Write),
    row(48, "setupmapping", Unsupported),
    row(49, "removemapping", Unsupported),
    row(50, "syncfs", Unsupported),
    row(51, "tmpfile", Write),
    row(52, "statx", Unsupported),
];

/// The place of an opcode in [`OPCODES`]; `None` if it is unknown.
pub fn find(number: u32) -> Option<usize> {
    OPCODES.binary_search_by_key(&number, |row| row.number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_so_that_it_can_be_searched() {
        assert!(OPCODES.is_sorted_by(|a, b| a.number < b.number));
        for (place, row) in OPCODES.iter().enumerate() {
            assert_eq!(find(row.number), Some(place));
        }
        assert_eq!((find(0), find(7), find(u32::MAX)), (None, None, None));
    }
}
