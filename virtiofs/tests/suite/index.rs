//! Indexes on disk: what backends find in them, and what becomes of damage, of runs side by side and of runs that are killed.

use crate::{
    driver::{Driver, read_in},
    fixture::{Fixture, HELLO, MANY, ODD_NAME, path},
    fuse::{ROOT, all_nodes, list, names},
};
use lair_virtiofs::{
    error::chain,
    files::Files,
    fuse::{Opcode, wire::EntryOut},
    index::{Added, Index, Manifest, NodeId, Summary, UpdateError, update},
    store::StorePath,
    view::View,
};
use nix::errno::Errno;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    num::NonZero,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A store and an index.
struct Indexed {
    fixture: Fixture,
    dir: TempDir,
}

impl Indexed {
    fn new() -> Self {
        Self { fixture: Fixture::new(), dir: tempfile::tempdir().unwrap() }
    }

    /// One with a few small store paths, so that it can be damaged at every byte.
    fn small() -> (Self, View) {
        let it = Self::new();
        let (one, two, three) = (path(21, "a"), path(22, "b"), path(23, "c"));
        fs::create_dir(it.fixture.host(&one)).unwrap();
        fs::write(it.fixture.host(&one).join("x"), "one").unwrap();
        fs::write(it.fixture.host(&two), "two").unwrap();
        std::os::unix::fs::symlink("three", it.fixture.host(&three)).unwrap();
        (it, View::new([one, two, three]).unwrap())
    }

    fn index(&self) -> &Path {
        self.dir.path()
    }

    fn update(&self, paths: &[StorePath]) -> Result<Summary, UpdateError> {
        let files = Files::open_stores(&[self.fixture.store()]).unwrap();
        update(self.index(), files.stores(), paths, NonZero::new(3).unwrap(), |_, _| ())
    }

    fn start(&self, view: &View) -> (Driver, Added) {
        Driver::start(&self.fixture.store(), view, Some(self.index()))
    }

    /// What is in the directory of the index.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let name = |entry: &fs::DirEntry| entry.file_name().into_string().unwrap();
        let entries = fs::read_dir(self.index()).unwrap().map(Result::unwrap);
        let entries = entries.filter(|entry| entry.file_type().unwrap().is_file());
        entries.map(|entry| (name(&entry), fs::read(entry.path()).unwrap())).collect()
    }

    fn restore(&self, files: &BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(self.index()).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        files.iter().for_each(|(name, bytes)| fs::write(self.index().join(name), bytes).unwrap());
    }

    fn pack(&self, number: u32) -> PathBuf {
        self.index().join(format!("pack-{number:08}"))
    }
}

/// All that a guest can find out, but for numbers: by path, attributes and contents.
pub(crate) fn world(driver: &Driver) -> BTreeMap<Vec<u8>, (u32, u64, u32, Vec<u8>)> {
    let mut world = BTreeMap::new();
    let mut todo = vec![(Vec::new(), ROOT)];
    while let Some((at, node)) = todo.pop() {
        for l in list(driver, node, 1 << 20, true).iter().skip(2) {
            let entry = l.entry.unwrap();
            assert_eq!(driver.lookup(node, &l.name).unwrap(), entry);
            let name = [&at[..], b"/", &l.name].concat();
            let content = match l.dirent.kind {
                4 => {
                    todo.push((name.clone(), entry.nodeid));
                    Vec::new()
                }
                8 => driver.read(entry.nodeid, 0, 1 << 20).unwrap(),
                _ => driver.call(Opcode::Readlink, entry.nodeid, &[]).unwrap(),
            };
            let a = entry.attr;
            assert_eq!(world.insert(name, (a.mode, a.size, a.nlink, content)), None);
        }
    }
    world
}

pub(crate) fn slots(driver: &Driver) -> HashMap<StorePath, u32> {
    driver.server.tree().entries().iter().map(|entry| (entry.path.clone(), entry.slot)).collect()
}

fn find(driver: &Driver, path: &StorePath) -> Result<EntryOut, Errno> {
    driver.lookup(ROOT, path.base_name().as_bytes())
}

#[test]
fn what_is_indexed_is_what_is_there() {
    let it = Indexed::new();
    let view = it.fixture.view();
    let private = Driver::new(&it.fixture.store(), &view);
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present, summary.inodes), (3, 0, private.server.tree().inodes()));
    let (driver, added) = it.start(&view);
    assert_eq!((added.paths, added.unindexed.count()), (3, 0));
    let world = world(&driver);
    assert_eq!(world, self::world(&private));
    assert_eq!(driver.server.tree().inodes(), world.len() as u64);
    let at = |name: &[u8]| [b"/", path(1, "tree").base_name().as_bytes(), b"/", name].concat();
    assert_eq!(world[&at(b"bin/hello")], (0o100_555, HELLO.len() as u64, 1, HELLO.to_vec()));
    assert_eq!(world[&at(ODD_NAME)].3, b"odd");
    assert!(world.contains_key(&at(&[b'n'; 255])) && !world.contains_key(&at(b"fifo")));
    assert_eq!(world.keys().filter(|name| name.starts_with(&at(b"many/"))).count(), MANY);
}

#[test]
fn a_second_run_has_nothing_to_do() {
    let it = Indexed::new();
    let view = it.fixture.view();
    it.update(view.paths()).unwrap();
    let before = it.files();
    let names: Vec<_> = before.keys().map(String::as_str).collect();
    assert_eq!(names, ["lock", "pack-00000001", "registry"]);
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present, summary.damaged), (3, 3, 0));
    // Nor has a backend, which only reads.
    it.start(&view);
    assert!(it.files() == before);
    let mode = |name: &str| fs::metadata(it.index().join(name)).unwrap().permissions().mode() & 0o777;
    // Backends have other uids, but may not keep a run from starting.
    assert_eq!(["registry", "pack-00000001", "lock"].map(mode), [0o644, 0o644, 0o600]);
    // One more path.
    let summary = it.update(&[view.paths()[0].clone(), path(4, "hidden")]).unwrap();
    assert_eq!((summary.paths, summary.present), (2, 1));
    assert!(it.files()["registry"].starts_with(&before["registry"]));
    assert_eq!(it.files()["pack-00000001"], before["pack-00000001"]);
}

#[test]
fn st8_ids_are_the_same_in_all_backends_and_after_restarts() {
    let it = Indexed::new();
    let (tree, file, link, hidden) = (path(1, "tree"), path(2, "file"), path(3, "link"), path(4, "hidden"));
    it.update(&[hidden.clone(), link.clone()]).unwrap();
    it.update(&[tree.clone(), file.clone(), link.clone()]).unwrap();
    let one = View::new([tree.clone(), link.clone()]).unwrap();
    let other = View::new([file.clone(), hidden.clone(), link.clone()]).unwrap();
    let first = [it.start(&one).0, it.start(&other).0];
    let again = [it.start(&one).0, it.start(&other).0];
    for (driver, again) in first.iter().zip(&again) {
        assert_eq!(all_nodes(driver), all_nodes(again));
    }
    let [one, other] = first;
    assert_eq!(find(&one, &link), find(&other, &link));
    let shared: HashSet<u64> = all_nodes(&one).intersection(&all_nodes(&other)).copied().collect();
    assert_eq!(shared, HashSet::from([ROOT, find(&one, &link).unwrap().nodeid]));
    // Neither serves what is the other's.
    for (driver, others) in [(&one, &other), (&other, &one)] {
        for node in all_nodes(others).difference(&shared) {
            for opcode in [Opcode::Getattr, Opcode::Read, Opcode::Readlink, Opcode::Readdirplus] {
                assert_eq!(driver.call(opcode, *node, &read_in(0, 4096)), Err(Errno::ESTALE));
            }
            assert_eq!(driver.lookup(*node, b"secret"), Err(Errno::ESTALE));
        }
    }
    assert_eq!(find(&one, &hidden), Err(Errno::ENOENT));
    // Another view, in another order: those that stay keep their ids, those that went have none.
    let text = format!("{link}\n{tree}\n");
    let (less, _) = it.start(&View::parse(text.as_bytes()).unwrap());
    assert_eq!(find(&less, &link), find(&other, &link));
    assert_eq!(find(&less, &tree), find(&one, &tree));
    assert_eq!(less.getattr(find(&other, &file).unwrap().nodeid), Err(Errno::ESTALE));
    assert_eq!(names(&list(&less, ROOT, 4096, false))[2..], [link.base_name(), tree.base_name()]);
}

#[test]
fn inode_numbers_are_unique_and_small() {
    let it = Indexed::new();
    let all = [path(1, "tree"), path(2, "file"), path(3, "link"), path(4, "hidden")];
    it.update(&all[2..]).unwrap();
    it.update(&all[..2]).unwrap();
    // One that is not indexed, among those that are.
    fs::write(it.fixture.host(&path(5, "new")), "new").unwrap();
    let view = View::new(all.into_iter().chain([path(5, "new")])).unwrap();
    let (driver, added) = it.start(&view);
    assert_eq!(added.unindexed.missing, 1);
    let nodes = all_nodes(&driver);
    let inos: HashSet<u64> = nodes.iter().map(|&node| driver.getattr(node).unwrap().attr.ino).collect();
    assert_eq!(inos.len(), nodes.len());
    assert!(inos.iter().all(|&ino| ino < 1 << 32));
}

#[test]
fn what_is_not_indexed_is_read_without_the_index() {
    let it = Indexed::new();
    it.update(&[path(1, "tree")]).unwrap();
    let view = it.fixture.view();
    let (driver, added) = it.start(&view);
    assert_eq!((added.paths, added.unindexed.missing, added.unindexed.count()), (3, 2, 2));
    assert_eq!(world(&driver), world(&Driver::new(&it.fixture.store(), &view)));
    // In slots that no index gives.
    let slots = slots(&driver);
    assert_eq!(slots[&path(1, "tree")], 1);
    assert_eq!([slots[&path(2, "file")], slots[&path(3, "link")]], [u32::MAX - 1, u32::MAX - 2]);
    // No index at all.
    it.restore(&BTreeMap::new());
    let (driver, added) = it.start(&view);
    assert_eq!(added.unindexed.missing, 3);
    assert_eq!(self::slots(&driver)[&path(1, "tree")], u32::MAX);
    assert!(it.files().is_empty());
    assert!(Index::open(&it.index().join("none")).is_err());
}

#[test]
fn a_store_path_that_was_made_anew_has_new_ids() {
    let it = Indexed::new();
    let (file, other) = (path(2, "file"), path(3, "link"));
    let view = View::new([file.clone(), other.clone()]).unwrap();
    it.update(view.paths()).unwrap();
    let old = it.start(&view).0;
    let old_node = find(&old, &file).unwrap().nodeid;
    let host = it.fixture.host(&file);
    fs::remove_file(&host).unwrap();
    fs::create_dir(&host).unwrap();
    fs::write(host.join("inside"), "now a directory").unwrap();
    let (driver, added) = it.start(&view);
    assert_eq!((added.unindexed.stale, added.unindexed.count()), (1, 1));
    assert_eq!(driver.getattr(old_node), Err(Errno::ESTALE));
    assert_eq!(driver.lookup(find(&driver, &file).unwrap().nodeid, b"inside").unwrap().attr.size, 15);
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present), (2, 1));
    let (driver, added) = it.start(&view);
    assert_eq!(added.unindexed.count(), 0);
    assert_eq!(driver.getattr(old_node), Err(Errno::ESTALE));
    let new_node = find(&driver, &file).unwrap().nodeid;
    assert_eq!(slots(&driver)[&file], 3);
    assert_eq!(find(&driver, &other), find(&old, &other));
    // As it was before: then the old ids are right again.
    fs::remove_dir_all(&host).unwrap();
    fs::write(&host, "a file").unwrap();
    it.update(view.paths()).unwrap();
    let (driver, _) = it.start(&view);
    assert_eq!(find(&driver, &file).unwrap().nodeid, old_node);
    assert_eq!(driver.getattr(new_node), Err(Errno::ESTALE));
}

#[test]
fn a_store_path_that_is_the_same_but_for_its_inode_keeps_its_ids() {
    let it = Indexed::new();
    let view = it.fixture.view();
    it.update(view.paths()).unwrap();
    let (before, files) = (it.start(&view).0, it.files());
    // As when it was substituted again, or linked by `nix store optimise`.
    let host = it.fixture.host(&path(2, "file"));
    fs::rename(&host, it.fixture.root().join("away")).unwrap();
    fs::copy(it.fixture.root().join("away"), &host).unwrap();
    assert_eq!(it.start(&view).1.unindexed.stale, 1);
    assert_eq!(it.update(view.paths()).unwrap().present, 2);
    let (after, added) = it.start(&view);
    assert_eq!(added.unindexed.count(), 0);
    assert_eq!(all_nodes(&after), all_nodes(&before));
    assert_eq!(it.files().keys().collect::<Vec<_>>(), files.keys().collect::<Vec<_>>(), "a needless pack");
    // Both are known now: a store that has the other one, such as another source, is served as well.
    fs::rename(it.fixture.root().join("away"), &host).unwrap();
    assert_eq!(it.start(&view).1.unindexed.stale, 1, "its ctime has changed");
}

#[test]
fn a_path_in_no_source_fails_and_the_others_are_indexed() {
    let it = Indexed::new();
    let summary = it.update(&[path(9, "absent"), path(2, "file")]).unwrap();
    assert_eq!((summary.paths, summary.failed.len()), (1, 1));
    let told = chain(&summary.failed[0]);
    assert_eq!(told, format!("{} is in none of the store directories", path(9, "absent")));
    nix::unistd::mkfifo(&it.fixture.host(&path(8, "fifo")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let summary = it.update(&[path(8, "fifo"), path(2, "file")]).unwrap();
    assert_eq!((summary.paths, summary.present, summary.failed.len()), (1, 1, 1));
    assert_eq!(it.start(&View::new([path(2, "file")]).unwrap()).1.unindexed.count(), 0);
}

#[test]
fn several_sources_in_their_order() {
    let (it, other) = (Indexed::new(), Fixture::new());
    let file = path(2, "file");
    fs::write(other.host(&file), "another file").unwrap();
    let stores = [it.fixture.store(), other.store()];
    let reversed = [other.store(), it.fixture.store()];
    let view = View::new([file.clone()]).unwrap();
    let content = |stores: &[PathBuf]| {
        let files = Files::open_stores(stores).unwrap();
        update(it.index(), files.stores(), view.paths(), NonZero::<usize>::MIN, |_, _| ()).unwrap();
        let (driver, added) = Driver::start(&stores[0], &view, Some(it.index()));
        assert_eq!(added.unindexed.count(), 0);
        let node = find(&driver, &file).unwrap();
        (node.nodeid, driver.read(node.nodeid, 0, 100).unwrap())
    };
    let (first, second) = (content(&stores), content(&reversed));
    assert_eq!((first.1.as_slice(), second.1.as_slice()), (&b"a file"[..], &b"another file"[..]));
    assert_ne!(first.0, second.0);
    // Both stay known: nothing is to be done any more, whichever is asked for.
    let files = it.files();
    assert_eq!((content(&stores), content(&reversed)), (first, second));
    assert!(it.files() == files);
}

#[test]
fn a_directory_of_ten_thousand() {
    let it = Indexed::new();
    let big = path(11, "big");
    fs::create_dir(it.fixture.host(&big)).unwrap();
    for number in 0..10_000 {
        fs::write(it.fixture.host(&big).join(format!("entry-{number}")), "").unwrap();
    }
    let view = View::new([big.clone()]).unwrap();
    let driver = Driver::indexed(&it.fixture.store(), &view, it.index());
    let top = find(&driver, &big).unwrap().nodeid;
    let listed = list(&driver, top, 65_536, true);
    assert_eq!(listed.len(), 10_002);
    for l in &listed[2..] {
        assert_eq!(driver.lookup(top, &l.name).unwrap(), l.entry.unwrap());
    }
    for name in ["entry-", "entry-00", "entry-10000", "a", "z"] {
        assert_eq!(driver.lookup(top, name.as_bytes()).unwrap().nodeid, 0, "{name}");
    }
}

/// That the view is served right whatever has become of the index, and how much of it came from there.
fn serves(it: &Indexed, view: &View, expected: &BTreeMap<Vec<u8>, (u32, u64, u32, Vec<u8>)>) -> Added {
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
    let mut damaged = [0; 4];
    for at in 0..pack.len() {
        for bit in [0x01, 0x80] {
            let mut bytes = pack.clone();
            bytes[at] ^= bit;
            fs::write(it.pack(1), bytes).unwrap();
            let added = serves(&it, &view, &expected);
            assert_eq!(added.unindexed.damaged, added.unindexed.count());
            damaged[added.unindexed.damaged] += 1;
        }
    }
    // The header is everyone's; what fills up to the next manifest is nobody's.
    let filling = pack.len() - 64 - (32 + 2 * 32 + 8) - (32 + 32) - (32 + 32 + 8);
    assert_eq!(damaged, [2 * filling, 2 * (pack.len() - 64 - filling), 0, 2 * 64]);
    // The next run repairs it. All ids stay.
    let summary = it.update(view.paths()).unwrap();
    assert_eq!((summary.paths, summary.present), (3, 3), "the last byte fills up");
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
