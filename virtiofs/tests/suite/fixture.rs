//! A small store with all that a view can hold, and some that it must not.

use lair_virtiofs::{store::StorePath, view::View};
use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A temporary store directory.
pub(crate) struct Fixture {
    dir: TempDir,
}

/// A name that is not UTF-8.
pub(crate) const ODD_NAME: &[u8] = b"odd-\xff\xfe";

/// Contents of `bin/hello`.
pub(crate) const HELLO: &[u8] = b"#!/bin/sh\necho hello\n";

/// How many files there are in `many`.
pub(crate) const MANY: usize = 300;

pub(crate) fn path(number: u8, name: &str) -> StorePath {
    StorePath::from_base_name(&format!("{number:032}-{name}")).unwrap()
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        let tree = fixture.host(&path(1, "tree"));
        for dir in ["bin", "share/doc", "empty", "many"] {
            fs::create_dir_all(tree.join(dir)).unwrap();
        }
        fs::write(tree.join("bin/hello"), HELLO).unwrap();
        fs::set_permissions(tree.join("bin/hello"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(tree.join("share/doc/readme"), "read me").unwrap();
        fs::write(tree.join("big"), big()).unwrap();
        fs::write(tree.join(OsStr::from_bytes(ODD_NAME)), "odd").unwrap();
        fs::write(tree.join("n".repeat(255)), "").unwrap();
        symlink("bin/hello", tree.join("link")).unwrap();
        symlink("/etc/passwd", tree.join("outside")).unwrap();
        nix::unistd::mkfifo(&tree.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        drop(UnixListener::bind(tree.join("socket")).unwrap());
        for i in 0..MANY {
            fs::write(tree.join(format!("many/file-{i:03}")), format!("{i}")).unwrap();
        }
        fs::write(fixture.host(&path(2, "file")), "a file").unwrap();
        symlink("/nix/store/elsewhere", fixture.host(&path(3, "link"))).unwrap();
        fs::create_dir(fixture.host(&path(4, "hidden"))).unwrap();
        fs::write(fixture.host(&path(4, "hidden")).join("secret"), "secret").unwrap();
        fixture.view().write(&fixture.view_file()).unwrap();
        fixture
    }

    /// All but the hidden one.
    pub(crate) fn view(&self) -> View {
        View::new([path(1, "tree"), path(2, "file"), path(3, "link")]).unwrap()
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn store(&self) -> PathBuf {
        let store = self.dir.path().join("store");
        fs::create_dir_all(&store).unwrap();
        store
    }

    pub(crate) fn view_file(&self) -> PathBuf {
        self.dir.path().join("view")
    }

    /// Where a store path is on the host.
    pub(crate) fn host(&self, path: &StorePath) -> PathBuf {
        self.store().join(path.base_name())
    }
}

/// Contents of `big`: more than a request reads at once, and not a multiple of anything.
pub(crate) fn big() -> Vec<u8> {
    (0u32..400_001).flat_map(u32::to_le_bytes).collect()
}
