//! The store that is served to fuzzers: small, with all that a store path can hold, and wholly in memory.

use crate::{
    files::Files,
    fuse::Server,
    index::{Node, Origin, Tree},
    store::StorePath,
    vhost::{Config, Service},
    view::View,
};
use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::Path,
    sync::{Arc, OnceLock},
};

/// What is served.
pub(super) struct World {
    pub(super) service: Arc<Service>,
    pub(super) config: Config,
}

/// The `number`th store path.
pub(super) fn path(number: u8, name: &str) -> StorePath {
    StorePath::from_base_name(&format!("{number:032}-{name}")).unwrap()
}

/// Contents of `page`: more than a page, and not the same anywhere.
pub(super) fn page() -> Vec<u8> {
    (0u16..3000).flat_map(u16::to_le_bytes).collect()
}

/// Makes the store in an empty directory.
pub(super) fn make(store: &Path) -> View {
    let tree = path(1, "tree");
    let top = store.join(tree.base_name());
    fs::create_dir_all(top.join("bin")).unwrap();
    fs::create_dir(top.join("empty")).unwrap();
    fs::create_dir(top.join("many")).unwrap();
    fs::write(top.join("bin/hello"), "#!/bin/sh\necho hello\n").unwrap();
    fs::hard_link(top.join("bin/hello"), top.join("bin/hi")).unwrap();
    fs::write(top.join("nothing"), "").unwrap();
    fs::write(top.join("page"), page()).unwrap();
    fs::write(top.join(OsStr::from_bytes(b"odd-\xff")), "odd").unwrap();
    fs::write(top.join("n".repeat(255)), "n").unwrap();
    symlink("bin/hello", top.join("link")).unwrap();
    for i in 0..40 {
        fs::write(top.join(format!("many/{i:02}")), [i]).unwrap();
    }
    let (file, link) = (path(2, "file"), path(3, "link"));
    fs::write(store.join(file.base_name()), "a file").unwrap();
    symlink("/nix/store/elsewhere", store.join(link.base_name())).unwrap();
    View::new([tree, file, link]).unwrap()
}

impl World {
    /// The one world of this process.
    pub(super) fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(Self::new)
    }

    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let view = make(dir.path());
        let files = Files::open_stores(&[dir.path()]).unwrap();
        let origin = Origin { stores: files.stores(), index: None };
        let (tree, _) = Tree::load(origin, &view).unwrap();
        // All files are open and in memory, so their directory is not needed any more, and no read has to wait.
        for entry in tree.entries() {
            for id in (0..entry.manifest.len()).filter_map(|number| Some(entry.node(number)?.id())) {
                if let Some(Node::Inode { inode, .. }) = tree.node(id) {
                    files.warm(&tree, id, 0, inode.size());
                }
            }
        }
        let config = Config::new("store", 1).unwrap();
        let service = Service::new(Server::new(tree), files, &config);
        Self { service: Arc::new(service), config }
    }
}
