//! Seeds for [`super::super::index`].

use super::Seed;
use crate::{
    files::Files,
    fuzzing::{
        index::{mend, paths},
        world,
    },
    index::{Tree, update},
};
use std::{fs, num::NonZero};

pub(super) fn seeds() -> Vec<Seed> {
    let (store, index) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let view = world::make(store.path());
    let files = Files::open_stores(&[store.path()]).unwrap();
    let origin = crate::index::Origin { stores: files.stores(), index: None };
    let (tree, _) = Tree::load(origin, &view).unwrap();
    let manifest = |number: usize| [&[0], tree.entries()[number].manifest.as_bytes()].concat();
    update(index.path(), files.stores(), &paths(), NonZero::<usize>::MIN, |_, _| ()).unwrap();
    let mut registry = fs::read(index.path().join("registry")).unwrap();
    let mut pack = fs::read(index.path().join("pack-00000001")).unwrap();
    // What is this machine's: the inode and its time in each record.
    for at in (16..registry.len()).step_by(8) {
        if registry[at..].starts_with(b"\xffRecord\xff") {
            registry[at + 56..at + 76].fill(1);
        }
    }
    mend(&mut registry, &mut pack);
    let whole = |flags: u8, registry: &[u8], pack: &[u8]| {
        [&[flags], &(registry.len() as u16).to_le_bytes()[..], registry, pack].concat()
    };
    let mut mended = manifest(0);
    mended[0] = 1;
    vec![
        ("tree", manifest(0)),
        ("tree-mended", mended),
        ("file", manifest(1)),
        ("link", manifest(2)),
        ("index", whole(2, &registry, &pack)),
        ("index-mended", whole(3, &registry, &pack)),
        ("registry-cut", whole(3, &registry[..registry.len() - 20], &pack)),
        ("pack-cut", whole(3, &registry, &pack[..pack.len() - 64])),
        ("no-pack", whole(3, &registry, &[])),
    ]
}
