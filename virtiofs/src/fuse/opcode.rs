//! Every operation of FUSE, and what becomes of it.

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// It has a handler.
    Served,
    /// The guest expects no reply to it, and there is nothing to do.
    Silent,
    /// It would change something: EROFS. There is no handler behind it.
    ReadOnly,
    /// ENOTTY.
    NotATerminal,
    /// ENOSYS. Linux remembers that for most of these, and does without.
    Unsupported,
}

macro_rules! opcodes {
    ($($name:ident = $number:literal $treatment:ident,)*) => {
        /// An operation of FUSE.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Opcode {
            $($name = $number,)*
        }

        impl Opcode {
            /// All operations.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// `None` for a number that FUSE does not define.
            #[inline]
            pub fn from_wire(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// What becomes of it.
            pub fn treatment(self) -> Treatment {
                match self {
                    $(Self::$name => Treatment::$treatment,)*
                }
            }

            /// Its name, as in metrics.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1 Served,
    Forget = 2 Silent,
    Getattr = 3 Served,
    Setattr = 4 ReadOnly,
    Readlink = 5 Served,
    Symlink = 6 ReadOnly,
    Mknod = 8 ReadOnly,
    Mkdir = 9 ReadOnly,
    Unlink = 10 ReadOnly,
    Rmdir = 11 ReadOnly,
    Rename = 12 ReadOnly,
    Link = 13 ReadOnly,
    Open = 14 Served,
    Read = 15 Served,
    Write = 16 ReadOnly,
    Statfs = 17 Served,
    Release = 18 Served,
    Fsync = 20 Unsupported,
    Setxattr = 21 ReadOnly,
    Getxattr = 22 Unsupported,
    Listxattr = 23 Unsupported,
    Removexattr = 24 ReadOnly,
    Flush = 25 Unsupported,
    Init = 26 Served,
    Opendir = 27 Served,
    Readdir = 28 Served,
    Releasedir = 29 Served,
    Fsyncdir = 30 Unsupported,
    Getlk = 31 Unsupported,
    Setlk = 32 Unsupported,
    Setlkw = 33 Unsupported,
    Access = 34 Unsupported,
    Create = 35 ReadOnly,
    Interrupt = 36 Unsupported,
    Bmap = 37 Unsupported,
    Destroy = 38 Served,
    Ioctl = 39 NotATerminal,
    Poll = 40 Unsupported,
    NotifyReply = 41 Silent,
    BatchForget = 42 Silent,
    Fallocate = 43 ReadOnly,
    Readdirplus = 44 Served,
    Rename2 = 45 ReadOnly,
    Lseek = 46 Unsupported,
    CopyFileRange = 47 ReadOnly,
    Setupmapping = 48 Unsupported,
    Removemapping = 49 Unsupported,
    Syncfs = 50 Unsupported,
    Tmpfile = 51 ReadOnly,
    Statx = 52 Unsupported,
    CopyFileRange64 = 53 ReadOnly,
}
