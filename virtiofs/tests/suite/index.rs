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
    index::{Added, Index, Summary, UpdateError, update},
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
pub(crate) struct Indexed {
    pub(crate) fixture: Fixture,
    dir: TempDir,
}

impl Indexed {
    pub(crate) fn new() -> Self {
        Self { fixture: Fixture::new(), dir: tempfile::tempdir().unwrap() }
    }

    /// One with a few small store paths, so that it can be damaged at every byte.
    pub(crate) fn small() -> (Self, View) {
        let it = Self::new();
        let (one, two, three) = (path(21, "a"), path(22, "b"), path(23, "c"));
        fs::create_dir(it.fixture.host(&one)).unwrap();
        fs::write(it.fixture.host(&one).join("x"), "one").unwrap();
        fs::write(it.fixture.host(&two), "two").unwrap();
        std::os::unix::fs::symlink("three", it.fixture.host(&three)).unwrap();
        (it, View::new([one, two, three]).unwrap())
    }

    pub(crate) fn index(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn update(&self, paths: &[StorePath]) -> Result<Summary, UpdateError> {
        let files = Files::open_stores(&[self.fixture.store()]).unwrap();
        update(self.index(), files.stores(), paths, NonZero::new(3).unwrap(), |_, _| ())
    }

    pub(crate) fn start(&self, view: &View) -> (Driver, Added) {
        Driver::start(&self.fixture.store(), view, Some(self.index()))
    }

    /// What is in the directory of the index.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let name = |entry: &fs::DirEntry| entry.file_name().into_string().unwrap();
        let entries = fs::read_dir(self.index()).unwrap().map(Result::unwrap);
        let entries = entries.filter(|entry| entry.file_type().unwrap().is_file());
        entries.map(|entry| (name(&entry), fs::read(entry.path()).unwrap())).collect()
    }

    pub(crate) fn restore(&self, files: &BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(self.index()).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        files.iter().for_each(|(name, bytes)| fs::write(self.index().join(name), bytes).unwrap());
    }

    pub(crate) fn pack(&self, number: u32) -> PathBuf {
        self.index().join(format!("pack-{number:08}"))
    }
}

/// All that a guest can find out, but for numbers: by path, attributes and contents.
pub(crate) type World = BTreeMap<Vec<u8>, (u32, u64, u32, Vec<u8>)>;

pub(crate) fn world(driver: &Driver) -> World {
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

#[test]
fn directories_may_be_nested_deeply_but_not_without_end() {
    use nix::sys::stat::{Mode, mkdirat};
    let it = Indexed::new();
    let nest = |number, depth: usize| {
        let path = path(number, "deep");
        fs::create_dir(it.fixture.host(&path)).unwrap();
        let mut at = fs::File::open(it.fixture.host(&path)).unwrap();
        for _ in 0..depth {
            mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            let flags = nix::fcntl::OFlag::O_DIRECTORY;
            at = nix::fcntl::openat(&at, "d", flags, Mode::empty()).unwrap().into();
        }
        path
    };
    let (deep, deeper) = (nest(40, 2048), nest(41, 2049));
    let summary = it.update(&[deep.clone(), deeper.clone()]).unwrap();
    assert_eq!((summary.paths, summary.inodes), (1, 2049));
    let told = format!("{deeper} has directories that are nested more than 2048 deep");
    assert_eq!(summary.failed.iter().map(|e| chain(e)).collect::<Vec<_>>(), [told]);
    let driver = it.start(&View::new([deep]).unwrap()).0;
    let mut node = 1 << 32;
    for depth in 0..2048 {
        node = driver.lookup(node, b"d").unwrap().nodeid;
        assert_ne!(node, 0, "{depth}");
    }
    assert_eq!(driver.lookup(node, b"d").unwrap().nodeid, 0);
    assert_eq!(driver.server.tree().entries()[0].manifest.path(2048).unwrap().len(), 2048);
}

/// Does `work` in a mount namespace of its own, which goes with the thread. `false` where that is not allowed.
fn with_mounts(work: impl FnOnce() + Send) -> bool {
    use nix::{mount::MsFlags, sched::CloneFlags};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if nix::sched::unshare(CloneFlags::CLONE_NEWNS).is_err() {
                return false;
            }
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            work();
            true
        });
        thread.join().unwrap()
    })
}

#[test]
fn st3_stores_on_other_file_systems() {
    use nix::mount::{MsFlags, mount};
    use std::os::unix::fs::MetadataExt;
    let plain = Indexed::new();
    let view = plain.fixture.view();
    let expected = world(&Driver::new(&plain.fixture.store(), &view));
    let copy = |to: &Path| {
        let mut copy = std::process::Command::new("cp");
        assert!(copy.arg("-a").arg(plain.fixture.store()).arg(to).status().unwrap().success());
    };
    let at = |name: &str| {
        let path = plain.fixture.root().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let check = |what: &str, store: &Path| {
        assert!(world(&Driver::new(store, &view)) == expected, "{what}");
        let index = tempfile::tempdir().unwrap();
        // Twice: the second time it is all there.
        for _ in 0..2 {
            assert!(world(&Driver::indexed(store, &view, index.path())) == expected, "{what}");
        }
    };
    let done = with_mounts(|| {
        let tmpfs =
            |on: &Path| mount(Some("none"), on, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let on = at("tmpfs");
        tmpfs(&on);
        copy(&on);
        check("tmpfs", &on.join("store"));

        let bind = at("bind");
        mount(Some(&on.join("store")), &bind, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        check("bind mount", &bind);

        // A store path of which a part is elsewhere.
        let mixed = at("mixed");
        copy(&mixed);
        let share = mixed.join("store").join(path(1, "tree").base_name()).join("share");
        tmpfs(&share);
        fs::create_dir(share.join("doc")).unwrap();
        fs::write(share.join("doc/readme"), "read me").unwrap();
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        assert_ne!(device(&share), device(&mixed));
        check("two file systems", &mixed.join("store"));

        let merged = at("merged");
        let (upper, work) = (on.join("upper"), on.join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let lower = plain.fixture.store();
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        match mount(Some("none"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())) {
            Ok(()) => {
                fs::write(merged.join(path(2, "file").base_name()), "a file").unwrap();
                check("overlay", &merged);
            }
            Err(errno) => println!("SKIPPED: no overlayfs here: {errno}"),
        }
    });
    if !done {
        println!("SKIPPED: mounting needs privileges");
    }
}

#[test]
fn many_runs_make_few_packs() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let it = Indexed::new();
    let paths: Vec<_> =
        (0..150).map(|n| StorePath::from_base_name(&format!("{n:032}-one")).unwrap()).collect();
    for path in &paths {
        fs::write(it.fixture.host(path), path.base_name()).unwrap();
    }
    it.update(&paths[..5]).unwrap();
    let expected = slots(&it.start(&View::new(paths[..5].to_vec()).unwrap()).0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A backend that starts in the middle of it finds all that there was before.
        let reader = scope.spawn(|| {
            let view = View::new(paths[..5].to_vec()).unwrap();
            let mut starts = 0;
            while !done.load(Ordering::Relaxed) {
                let (driver, added) = it.start(&view);
                assert_eq!(added.unindexed.count(), 0, "{}", added.unindexed);
                assert_eq!(slots(&driver), expected);
                starts += 1;
            }
            starts
        });
        // One that runs all the time.
        let (running, _) = it.start(&View::new(paths[..5].to_vec()).unwrap());
        let before = world(&running);
        for path in &paths[5..] {
            it.update(std::slice::from_ref(path)).unwrap();
            let packs = it.files().keys().filter(|name| name.starts_with("pack-")).count();
            assert!(packs <= 33, "{packs}");
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 10);
        assert!(world(&running) == before);
    });
    let view = View::new(paths.clone()).unwrap();
    let (driver, added) = it.start(&view);
    assert_eq!(added.unindexed.count(), 0);
    let slots = slots(&driver);
    assert!(expected.iter().all(|(path, slot)| slots[path] == *slot));
    assert_eq!(slots.values().collect::<HashSet<_>>().len(), 150);
    assert!(slots.values().all(|&slot| slot <= 150));
    assert_eq!(it.update(&paths).unwrap().present, 150);
    // All of it, in few bytes: what was moved is not kept twice.
    let bytes: usize =
        it.files().iter().filter(|(name, _)| name.starts_with("pack-")).map(|(_, b)| b.len()).sum();
    assert!(bytes < 150 * 64 + 33 * 64 + 150 * 64, "{bytes}");
}

#[test]
fn packs_of_which_nobody_knows_go() {
    let it = Indexed::new();
    it.update(&[path(2, "file")]).unwrap();
    // As left behind by a run that was killed before it wrote to the registry, and one killed before that.
    fs::copy(it.pack(1), it.pack(2)).unwrap();
    fs::write(it.index().join("pack-00000003.tmp"), "half a pack").unwrap();
    fs::write(it.index().join("unrelated"), "left alone").unwrap();
    it.update(&[path(2, "file")]).unwrap();
    assert_eq!(it.files().len(), 5, "nothing to write: only what has no name goes");
    it.update(&[path(3, "link")]).unwrap();
    let names: Vec<_> = it.files().into_keys().collect();
    assert_eq!(names, ["lock", "pack-00000001", "pack-00000003", "registry", "unrelated"]);
    let view = View::new([path(2, "file"), path(3, "link")]).unwrap();
    assert_eq!(it.start(&view).1.unindexed.count(), 0);
}
