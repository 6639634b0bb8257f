//! Indexes that are damaged: nothing wrong is ever served, and the next run repairs what can be repaired.

use crate::{
    driver::{Driver, read_in},
    fixture::path,
    fuse::all_nodes,
    index::{Indexed, World, slots, world},
};
use lair_virtiofs::{
    error::chain,
    fuse::Opcode,
    index::{Added, Manifest, NodeId},
    view::View,
};
use std::{collections::HashSet, fs, path::Path};

/// That the view is served right whatever has become of the index, and how much of it came from there.
fn serves(it: &Indexed, view: &View, expected: &World) -> Added {
    let (driver, added) = it.start(view);
    assert!(world(&driver) == *expected);
    assert_eq!(all_nodes(&driver).len(), expected.len() + 1);
    added
}

#[test]
fn each_byte_of_a_pack_damaged() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let slots = slots(&it.start(&view).0);
    let pack = &sound["pack-00000001"];
    let (mut damaged, mut last) = ([0; 4], 0);
    for at in 0..pack.len() {
        for bit in [0x01, 0x80] {
            let mut bytes = pack.clone();
            bytes[at] ^= bit;
            fs::write(it.pack(1), bytes).unwrap();
            let added = serves(&it, &view, &expected);
            assert_eq!(added.unindexed.damaged, added.unindexed.count());
            damaged[added.unindexed.damaged] += 1;
            last = added.unindexed.damaged;
        }
    }
    // The header is everyone's; what fills up to the next manifest is nobody's.
    let filling = pack.len() - 64 - (32 + 2 * 32 + 4 * 8 + 8) - (32 + 32) - (32 + 32 + 8);
    assert_eq!(damaged, [2 * filling, 2 * (pack.len() - 64 - filling), 0, 2 * 64]);
    // The next run repairs it. All ids stay. Whose the last byte is, if it is anybody's, depends on which thread was done last.
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present), (3, 3 - last));
    it.restore(&sound);
    let mut bytes = pack.clone();
    bytes[100] ^= 1;
    fs::write(it.pack(1), bytes).unwrap();
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present), (3, 2));
    assert_eq!(serves(&it, &view, &expected).unindexed.count(), 0);
    assert_eq!(self::slots(&it.start(&view).0), slots);
    assert_eq!(it.files().len(), 4);
}

#[test]
fn a_pack_of_each_length() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let slots = slots(&it.start(&view).0);
    let pack = &sound["pack-00000001"];
    for length in 0..pack.len() {
        fs::write(it.pack(1), &pack[..length]).unwrap();
        let added = serves(&it, &view, &expected);
        assert_eq!(added.unindexed.damaged, added.unindexed.count());
        assert!(length > pack.len() - 64 || added.unindexed.damaged > 0, "{length}");
        if length % 37 == 0 {
            it.update(view.paths()).unwrap();
            assert_eq!(serves(&it, &view, &expected).unindexed.count(), 0, "{length}");
            assert_eq!(self::slots(&it.start(&view).0), slots);
            it.restore(&sound);
        }
    }
}

#[test]
fn other_things_in_place_of_a_pack() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let pack = it.pack(1);
    type Put<'a> = &'a dyn Fn(&Path);
    let with = |at: usize, bytes: &[u8]| {
        let mut whole = sound["pack-00000001"].clone();
        whole[at..at + bytes.len()].copy_from_slice(bytes);
        whole
    };
    let cases: [(&str, Put<'_>); 8] = [
        ("nothing", &|_| ()),
        ("another magic", &|pack| fs::write(pack, with(0, b"ELF")).unwrap()),
        ("another version", &|pack| fs::write(pack, with(8, &2u32.to_le_bytes())).unwrap()),
        ("another number", &|pack| fs::write(pack, with(12, &2u32.to_le_bytes())).unwrap()),
        ("the registry", &|pack| fs::write(pack, &sound["registry"]).unwrap()),
        ("a directory", &|pack| fs::create_dir(pack).unwrap()),
        ("a symbolic link", &|pack| std::os::unix::fs::symlink("registry", pack).unwrap()),
        ("a FIFO", &|pack| nix::unistd::mkfifo(pack, nix::sys::stat::Mode::S_IRWXU).unwrap()),
    ];
    for (what, put) in cases {
        fs::remove_file(&pack).unwrap();
        put(&pack);
        assert_eq!(serves(&it, &view, &expected).unindexed.damaged, 3, "{what}");
        let summary = it.update(view.paths()).unwrap();
        assert_eq!((summary.paths, summary.present), (3, 0), "{what}");
        assert_eq!(serves(&it, &view, &expected).unindexed.count(), 0, "{what}");
        assert_eq!(it.files()["registry"].len(), 2 * sound["registry"].len() - 16, "{what}");
        it.restore(&sound);
    }
}

#[test]
fn each_byte_of_a_registry_damaged() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let count = view.paths().len();
    let registry = &sound["registry"];
    let record = (registry.len() - 16) / count;
    for at in 0..registry.len() {
        let mut bytes = registry.clone();
        bytes[at] ^= 0x10;
        fs::write(it.index().join("registry"), bytes).unwrap();
        let added = serves(&it, &view, &expected);
        let updated = it.update(view.paths());
        if at < 12 {
            // It is no registry, or none of this version.
            assert_eq!(added.unindexed.missing, count, "{at}");
            assert!(added.unindexed.error.is_some(), "{at}");
            let error = chain(&updated.unwrap_err());
            assert!(error.contains("registry"), "{error}");
            assert_eq!(it.files()["registry"].len(), registry.len());
        } else if at < 16 {
            assert_eq!(added.unindexed.count(), 0, "{at}: a reserved byte");
        } else {
            assert_eq!((added.unindexed.missing, added.unindexed.count()), (1, 1), "{at}");
            let last = at >= registry.len() - record;
            let summary = updated.unwrap();
            assert_eq!((summary.present, summary.paths), (count - 1, count), "{at}");
            assert_eq!(summary.damaged, if last { 0 } else { record }, "{at}");
            // Nobody knows any more which slot it had, so it gets one that was never given.
            let (driver, added) = it.start(&view);
            assert_eq!(added.unindexed.count(), 0);
            let mut slots: Vec<u32> = self::slots(&driver).into_values().collect();
            slots.sort_unstable();
            assert_eq!(slots.last(), Some(&4), "{at}");
            assert_eq!(slots.iter().collect::<HashSet<_>>().len(), count);
        }
        it.restore(&sound);
    }
}

#[test]
fn a_registry_of_each_length() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let registry = &sound["registry"];
    let count = view.paths().len();
    let record = (registry.len() - 16) / count;
    for length in 0..registry.len() {
        fs::write(it.index().join("registry"), &registry[..length]).unwrap();
        let added = serves(&it, &view, &expected);
        let updated = it.update(view.paths());
        if length < 16 {
            assert!(added.unindexed.error.is_some() && updated.is_err(), "{length}");
        } else {
            let whole = (length - 16) / record;
            assert_eq!(added.unindexed.missing, count - whole, "{length}");
            assert_eq!(updated.unwrap().present, whole, "{length}");
            // What was cut short is gone.
            let now = &it.files()["registry"];
            assert_eq!(now.len(), registry.len(), "{length}");
            assert_eq!(now[..16 + whole * record], registry[..16 + whole * record], "{length}");
            assert_eq!(serves(&it, &view, &expected).unindexed.count(), 0, "{length}");
            // Slots of records that are lost are not given again, thanks to the pack.
            let slots = slots(&it.start(&view).0);
            assert!(slots.values().all(|&slot| (slot as usize) <= whole || slot > 3), "{length} {slots:?}");
        }
        it.restore(&sound);
    }
}

#[test]
fn other_things_in_place_of_a_registry() {
    let (it, view) = Indexed::small();
    it.update(view.paths()).unwrap();
    let sound = it.files();
    let expected = world(&it.start(&view).0);
    let registry = it.index().join("registry");
    type Put<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Put<'_>, &str); 5] = [
        ("empty", &|at| fs::write(at, "").unwrap(), "DIR/registry is not what its name says, or is damaged"),
        (
            "another version",
            &|at| {
                let mut bytes = sound["registry"].clone();
                bytes[8] = 9;
                fs::write(at, bytes).unwrap();
            },
            "DIR/registry has version 9 of the format; version 1 is known",
        ),
        ("a directory", &|at| fs::create_dir(at).unwrap(), "DIR/registry is not a regular file"),
        (
            "a symbolic link",
            &|at| std::os::unix::fs::symlink("lock", at).unwrap(),
            "DIR/registry is not a regular file",
        ),
        (
            "too large",
            &|at| fs::File::create(at).unwrap().set_len((1 << 30) + 1).unwrap(),
            "DIR/registry has more than 1073741824 bytes",
        ),
    ];
    for (what, put, told) in cases {
        fs::remove_file(&registry).unwrap();
        put(&registry);
        let added = serves(&it, &view, &expected);
        assert_eq!(added.unindexed.missing, 3, "{what}");
        let dir = it.index().to_str().unwrap();
        assert_eq!(chain(&added.unindexed.error.unwrap()).replace(dir, "DIR"), told, "{what}");
        assert_eq!(chain(&it.update(view.paths()).unwrap_err()).replace(dir, "DIR"), told, "{what}");
        it.restore(&sound);
    }
    // Gone: the packs remember what was given.
    fs::remove_file(&registry).unwrap();
    assert_eq!(serves(&it, &view, &expected).unindexed.missing, 3);
    assert_eq!(it.update(view.paths()).unwrap().present, 0);
    let slots: HashSet<u32> = slots(&it.start(&view).0).into_values().collect();
    assert_eq!(slots, HashSet::from([4, 5, 6]));
}

/// Manifests that say nonsense with a sound checksum are never made, but must do no harm.
#[test]
fn nonsense_with_a_sound_checksum_does_no_harm() {
    use proptest::prelude::*;
    let it = Indexed::new();
    it.update(&[path(1, "tree")]).unwrap();
    let pack = it.files()["pack-00000001"].clone();
    let length = {
        let (driver, _) = it.start(&View::new([path(1, "tree")]).unwrap());
        driver.server.tree().entries()[0].manifest.as_bytes().len()
    };
    let manifest = &pack[64..64 + length];
    let case = prop::collection::vec((12usize..length, any::<u8>()), 1..6);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
    runner
        .run(&case, |changes| {
            let mut bytes = manifest.to_vec();
            for (at, value) in changes {
                // Mostly among the inodes of the top directory.
                let at = if at % 3 == 0 { at } else { 16 + at % 600 };
                bytes[at] = value;
            }
            let sum = twox_hash::XxHash3_64::oneshot(&bytes[8..]);
            bytes[..8].copy_from_slice(&sum.to_le_bytes());
            let Ok(manifest) = Manifest::from_bytes(&bytes) else { return Ok(()) };
            let driver = Driver::of(&it.fixture.store(), &path(1, "tree"), manifest);
            for number in 0..60 {
                let node = NodeId::Inode { slot: 1, number }.to_wire();
                for name in [&b"bin"[..], b"big", b"many", b"..", b"."] {
                    let _ = driver.lookup(node, name);
                }
                for opcode in [Opcode::Readlink, Opcode::Getattr] {
                    let _ = driver.call(opcode, node, &[0; 16]);
                }
                let mut offset = 0;
                for _ in 0..20 {
                    let Ok(body) = driver.call(Opcode::Readdirplus, node, &read_in(offset, 4096)) else {
                        break;
                    };
                    if body.is_empty() {
                        break;
                    }
                    offset += 20;
                }
                let tree = driver.server.tree();
                let entry = &tree.entries()[0];
                if let Some(names) = entry.manifest.path(number) {
                    assert!(names.iter().all(|n| !n.contains(&b'/') && !matches!(*n, b"" | b"." | b"..")));
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_listing_is_never_cut_short() {
    use nix::errno::Errno;
    use std::os::unix::fs::symlink;
    let (it, _) = Indexed::small();
    let one = path(30, "one");
    let host = it.fixture.host(&one);
    fs::create_dir(&host).unwrap();
    (0..20).for_each(|number| fs::write(host.join(format!("{number:02}")), "").unwrap());
    symlink("target", host.join("link")).unwrap();
    let whole = Driver::new(&it.fixture.store(), &View::new([one.clone()]).unwrap());
    let bytes = whole.server.tree().entries()[0].manifest.as_bytes().to_vec();
    // The bytes of an inode from `at` on are something else.
    let with = |inode: usize, at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[32 + 32 * inode + at..][..value.len()].copy_from_slice(value);
        let sum = twox_hash::XxHash3_64::oneshot(&bytes[8..]);
        bytes[..8].copy_from_slice(&sum.to_le_bytes());
        Driver::of(&it.fixture.store(), &one, Manifest::from_bytes(&bytes).unwrap())
    };
    let top = 1 << 32;
    // More children than there are inodes; children elsewhere. Names are found nevertheless, without a look at that.
    let (count, first) = (99u32.to_le_bytes(), 9u32.to_le_bytes());
    for (what, driver) in [("count", with(0, 16, &count)), ("first", with(0, 12, &first))] {
        for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
            assert_eq!(driver.call(opcode, top, &read_in(2, 4096)), Err(Errno::EIO), "{what}");
        }
        assert_eq!(driver.lookup(top, b"07").unwrap(), whole.lookup(top, b"07").unwrap(), "{what}");
    }
    // The table, which is behind the inodes, refers to inodes that are not there; to names that are not there; is empty.
    let inodes = 22;
    assert_eq!(with(inodes, 0, &[0xff; 64 * 8]).lookup(top, b"07"), Err(Errno::EIO));
    let nameless = [8u32.to_le_bytes(), [0xff; 4]].concat().repeat(64);
    assert_eq!(with(inodes, 0, &nameless).lookup(top, b"07").unwrap().nodeid, 0);
    assert_eq!(with(inodes, 0, &[0; 64 * 8]).lookup(top, b"07").unwrap().nodeid, 0);
    // A child that is an alias of nothing.
    let mut alias = [0; 20];
    alias[..4].fill(0xff);
    alias[17] = 4;
    let driver = with(5, 12, &alias);
    assert_eq!(driver.call(Opcode::Readdirplus, top, &read_in(0, 4096)), Err(Errno::EIO));
    // A target that is not there.
    let link = (1..22).find(|&number| whole.call(Opcode::Readlink, top + number, &[]).is_ok()).unwrap();
    let broken = with(link as usize, 12, &[0xff; 4]);
    assert_eq!(broken.call(Opcode::Readlink, top + link, &[]), Err(Errno::EIO));
}
