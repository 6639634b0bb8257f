//! `lair-virtiofs index`, and the program with an index: what they print, and runs side by side or killed.

use crate::{
    driver::Driver,
    fixture::{Fixture, path},
    frontend::{Connection, Guest, Program, REQUEST, warning},
    index::{slots, world},
    program::{complaint, run},
    serve::{check, lookup, read, tree},
};
use lair_virtiofs::{store::StorePath, view::View};
use nix::errno::Errno;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

struct Setup {
    fixture: Fixture,
    index: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let fixture = Fixture::new();
        let index = fixture.root().join("index");
        Self { fixture, index }
    }

    /// Store paths with some files each, in views that overlap.
    fn many(&self, count: usize) -> Vec<StorePath> {
        let make = |number| {
            let path = StorePath::from_base_name(&format!("{number:032}-many")).unwrap();
            let host = self.fixture.host(&path);
            fs::create_dir(&host).unwrap();
            (0..10).for_each(|file| fs::write(host.join(format!("{number}-{file}")), "").unwrap());
            path
        };
        (1000..1000 + count).map(make).collect()
    }

    fn view(&self, name: &str, paths: &[StorePath]) -> PathBuf {
        let file = self.fixture.root().join(name);
        View::new(paths.iter().cloned()).unwrap().write(&file).unwrap();
        file
    }

    fn command(&self, views: &[&Path], more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"));
        command.args(["index".as_ref(), "--index".as_ref(), self.index.as_os_str()]);
        command.arg("--source").arg(self.fixture.store()).arg("--view").args(views).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn index(&self, views: &[&Path], more: &[&str]) -> Output {
        self.command(views, more).output().unwrap()
    }

    fn start(&self, view: &Path) -> Program {
        let (dir, store) = (self.fixture.root(), self.fixture.store());
        Program::start_with(dir, &store, view, &["--index".as_ref(), self.index.as_os_str()])
    }

    /// What a backend would give each path, if all of them are indexed.
    fn indexed(&self, paths: &[StorePath]) -> Option<HashMap<StorePath, u32>> {
        let view = View::new(paths.iter().cloned()).unwrap();
        let (driver, added) = Driver::start(&self.fixture.store(), &view, Some(&self.index));
        (added.unindexed.count() == 0).then(|| slots(&driver))
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn what_a_run_prints() {
    let setup = Setup::new();
    let view = setup.fixture.view_file();
    let without_time = |output: &Output| {
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "not on a terminal: {output:?}");
        let text = stdout(output);
        let (told, time) = text.rsplit_once(", ").unwrap();
        assert!(time.ends_with(" s\n"), "{text}");
        told.to_owned()
    };
    insta::assert_snapshot!(without_time(&setup.index(&[&view], &[])), @"3 store paths are indexed, 0 were before: 315 inodes, 21128 bytes");
    insta::assert_snapshot!(without_time(&setup.index(&[&view, &view], &["--jobs", "1"])), @"3 store paths are indexed, 3 were before: 315 inodes, 21128 bytes");
    let mut json: serde_json::Value =
        serde_json::from_str(&stdout(&setup.index(&[&view], &["--json"]))).unwrap();
    assert!(json["seconds"].as_f64().unwrap() >= 0.0);
    json["seconds"] = "(seconds)".into();
    insta::assert_json_snapshot!(json, @r#"
    {
      "bytes": 21128,
      "damaged_registry_bytes": 0,
      "failed": [],
      "inodes": 315,
      "paths": 3,
      "present": 3,
      "seconds": "(seconds)"
    }
    "#);
}

#[test]
fn what_a_run_says_when_it_fails() {
    let setup = Setup::new();
    let dir = setup.fixture.root();
    let absent: Vec<_> = (100..112).map(|number| path(number, "absent")).collect();
    let mut paths = absent.clone();
    paths.push(path(2, "file"));
    let view = setup.view("some", &paths);
    let output = setup.index(&[&view], &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(complaint(&output, dir), "12 of 13 store paths are not indexed");
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    let told = format!("ERROR {} is in none of the store directories", absent[0]);
    assert!(stderr.contains(&told), "{stderr}");
    assert_eq!(stderr.lines().count(), 11, "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((json["paths"].as_u64(), json["failed"].as_array().unwrap().len()), (Some(1), 12));
    // What could be indexed was.
    assert!(setup.indexed(&[path(2, "file")]).is_some());

    let fails = |output: &Output| {
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(stdout(output), "");
        complaint(output, dir)
    };
    let none = dir.join("none");
    insta::assert_snapshot!(fails(&setup.index(&[&none], &[])), @"Cannot read the view file DIR/none: No such file or directory (os error 2)");
    fs::write(setup.index.join("registry"), "This is something else.").unwrap();
    insta::assert_snapshot!(fails(&setup.index(&[&setup.fixture.view_file()], &[])), @"Cannot bring the index DIR/index up to date: DIR/index/registry is not what its name says, or is damaged");
    let elsewhere = Setup { fixture: Fixture::new(), index: none.join("index") };
    let output = elsewhere.index(&[&setup.fixture.view_file()], &[]);
    insta::assert_snapshot!(fails(&output), @"Cannot bring the index DIR/none/index up to date: Cannot make the directory DIR/none/index: No such file or directory (os error 2)");
    for args in [&["index"][..], &["index", "--index", "i", "--source", "s"], &["index", "--jobs", "0"]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn st8_a_backend_with_an_index_is_killed_and_its_successor_goes_on() {
    let setup = Setup::new();
    let view = setup.fixture.view_file();
    assert!(setup.index(&[&view], &[]).status.success());
    let mut program = setup.start(&view);
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let node = lookup(&connection, &mut guest, &tree("bin/hello"));
    let gone = lookup(&connection, &mut guest, path(2, "file").base_name());
    assert_eq!(read(&connection, &mut guest, gone, 0, 100).unwrap(), b"a file");
    program.kill();
    drop(connection);
    // The next one has another view, in another order.
    let text = format!("{}\n{}\n{}\n", path(4, "hidden"), path(3, "link"), path(1, "tree"));
    fs::write(&view, text).unwrap();
    assert!(setup.index(&[&view], &[]).status.success());
    let program = setup.start(&view);
    let connection = Connection::with_base(&program.socket, &guest, [0, guest.used_index(REQUEST)]);
    assert_eq!(read(&connection, &mut guest, node, 0, 100).unwrap(), crate::fixture::HELLO);
    assert_eq!(read(&connection, &mut guest, gone, 0, 100), Err(Errno::ESTALE));
    check(&connection, &mut guest);
    let (status, lines) = program.terminate();
    assert_eq!(status, Some(0));
    assert!(!lines.iter().any(|line| warning(line).is_some()), "{lines:#?}");
}

#[test]
fn one_line_tells_what_the_index_did_not_have() {
    let setup = Setup::new();
    let view = setup.fixture.view_file();
    assert!(setup.index(&[&view], &[]).status.success());
    fs::remove_file(setup.fixture.host(&path(2, "file"))).unwrap();
    fs::write(setup.fixture.host(&path(2, "file")), "other").unwrap();
    let mut paths = setup.many(30);
    paths.extend([path(1, "tree"), path(2, "file"), path(3, "link")]);
    let view = setup.view("more", &paths);
    let mut pack = fs::read(setup.index.join("pack-00000001")).unwrap();
    pack[1000] ^= 1;
    fs::write(setup.index.join("pack-00000001"), pack).unwrap();
    let listing = || -> BTreeMap<PathBuf, Vec<u8>> {
        let entries = fs::read_dir(&setup.index).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let before = listing();
    let program = setup.start(&view);
    fs::write(setup.fixture.host(&path(7, "granted")), "granted").unwrap();
    let answer =
        program.control(format!("grant\n{}\n{}\n\n", path(7, "granted"), path(4, "hidden")).as_bytes());
    assert!(answer.starts_with("granted 2, "), "{answer}");
    assert_eq!(program.stat("lair_virtiofs_view_paths"), 35);
    assert!(listing() == before);
    let (_, lines) = program.terminate();
    let told: Vec<_> = lines.iter().filter_map(|line| warning(line)).collect();
    insta::assert_debug_snapshot!(told, @r#"
    [
        "Read the metadata of 32 store paths without the index: 30 not in it, 1 changed since, 1 damaged in it",
        "Read the metadata of 2 store paths without the index: 2 not in it, 0 changed since, 0 damaged in it",
    ]
    "#);
}

#[test]
fn granted_paths_come_from_the_index() {
    let setup = Setup::new();
    let view = setup.fixture.view_file();
    assert!(setup.index(&[&view], &[]).status.success());
    let program = setup.start(&view);
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    // Indexed while the backend runs.
    let more = setup.view("more", &[path(4, "hidden")]);
    assert!(setup.index(&[&more], &[]).status.success());
    let grant = format!("grant\n{}\n\n", path(4, "hidden"));
    assert_eq!(program.control(grant.as_bytes()), "granted 1, refresh no\n");
    let hidden = path(4, "hidden");
    let node = lookup(&connection, &mut guest, &format!("{}/secret", hidden.base_name()));
    assert_eq!(node >> 32, u64::from(setup.indexed(std::slice::from_ref(&hidden)).unwrap()[&hidden]));
    assert_eq!(read(&connection, &mut guest, node, 0, 100).unwrap(), b"secret");
    let (_, lines) = program.terminate();
    assert!(!lines.iter().any(|line| warning(line).is_some()), "{lines:#?}");
}

#[test]
fn runs_side_by_side() {
    let setup = Setup::new();
    let paths = setup.many(60);
    // Each has half of what its neighbours have.
    let views: Vec<PathBuf> =
        (0..5).map(|n| setup.view(&format!("view-{n}"), &paths[n * 10..n * 10 + 20])).collect();
    let mut seen: HashMap<StorePath, u32> = HashMap::new();
    for _ in 0..3 {
        let runs: Vec<Child> =
            views.iter().map(|view| setup.command(&[view], &[]).spawn().unwrap()).collect();
        // Backends that start meanwhile see what is there so far, and never anything else.
        for _ in 0..5 {
            let view = View::new(paths.iter().cloned()).unwrap();
            if setup.index.exists() {
                let (driver, added) = Driver::start(&setup.fixture.store(), &view, Some(&setup.index));
                assert_eq!((added.unindexed.stale, added.unindexed.damaged), (0, 0));
                assert_eq!(world(&driver).len(), 60 * 11);
                for (path, slot) in slots(&driver).into_iter().filter(|(_, slot)| *slot < 1000) {
                    assert_eq!(*seen.entry(path).or_insert(slot), slot);
                }
            }
        }
        for run in runs {
            let output = run.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{output:?}");
        }
    }
    let slots = setup.indexed(&paths).unwrap();
    assert!(seen.iter().all(|(path, slot)| slots[path] == *slot));
    assert_eq!(slots.values().collect::<HashSet<_>>().len(), 60);
    assert!(slots.values().all(|&slot| slot <= 60), "{slots:?}");
}

#[test]
fn runs_that_are_killed() {
    let setup = Setup::new();
    let paths = setup.many(200);
    let mut known: HashMap<StorePath, u32> = HashMap::new();
    let mut killed = 0;
    let mut wait = Duration::ZERO;
    for round in 0..40 {
        // A few more each time, so that there is something to do.
        let some = &paths[..5 * (round + 1)];
        let view = setup.view("view", some);
        let mut run = setup.command(&[&view], &["--jobs", "2"]).spawn().unwrap();
        std::thread::sleep(wait);
        // From at once to as long as a whole run takes, in steps that are no multiple of anything.
        wait += Duration::from_micros(437);
        killed += usize::from(run.try_wait().unwrap().is_none());
        run.kill().unwrap();
        run.wait().unwrap();
        if !setup.index.exists() {
            continue;
        }
        let view = View::new(some.iter().cloned()).unwrap();
        let (driver, added) = Driver::start(&setup.fixture.store(), &view, Some(&setup.index));
        assert_eq!((added.unindexed.stale, added.unindexed.damaged), (0, 0));
        assert!(added.unindexed.error.is_none());
        assert_eq!(world(&driver).len(), some.len() * 11);
        for (path, slot) in slots(&driver).into_iter().filter(|(_, slot)| *slot < 100_000) {
            assert_eq!(*known.entry(path.clone()).or_insert(slot), slot, "{path}");
        }
    }
    assert!(killed > 5, "{killed}");
    let view = setup.view("view", &paths);
    let output = setup.index(&[&view], &[]);
    assert!(output.status.success(), "{output:?}");
    let slots = setup.indexed(&paths).unwrap();
    assert!(known.iter().all(|(path, slot)| slots[path] == *slot));
    assert_eq!(slots.values().collect::<HashSet<_>>().len(), 200);
    let left: Vec<_> = fs::read_dir(&setup.index).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_str().unwrap().ends_with(".tmp")), "{left:?}");
}
