//! What the program may still do once it serves.

mod calls;

use crate::{
    cold::chill,
    driver::request,
    fixture::{Fixture, big, path},
    frontend::{Connection, Guest, Part, Program, REPLY_AT, REQUEST, REQUEST_AT},
    serve::{check, lookup, read, tree},
};
use lair_virtiofs::{fuse::Opcode, view::View};
use nix::{
    errno::Errno,
    libc::{self, c_long},
    sys::resource::{Resource, setrlimit},
    unistd::geteuid,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, Permissions},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Output},
};
use vhost::vhost_user::VhostUserFrontend;

/// Ids that nothing else has.
const IDS: [&str; 4] = ["--uid", "70001", "--gid", "70002"];

fn is_root() -> bool {
    geteuid().is_root()
}

/// What to start the program with, to have it have ids of its own where that is possible.
fn ids() -> &'static [&'static str] {
    if is_root() {
        &IDS
    } else {
        println!("SKIPPED: ids of its own, which only root can give");
        &[]
    }
}

/// The program on a fixture's store, with more arguments.
fn begin(fixture: &Fixture, more: &[&str]) -> Program {
    let more: Vec<&OsStr> = more.iter().map(OsStr::new).collect();
    Program::start_with(fixture.root(), &fixture.store(), &fixture.view_file(), &more)
}

/// The fields of a `status` file in `/proc`.
fn status(file: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(file).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.into(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

#[test]
fn every_thread_is_confined_and_workers_more() {
    let fixture = Fixture::new();
    let more = [ids(), &["--queues", "3"]].concat();
    let program = begin(&fixture, &more);
    let mut guest = Guest::new();
    let mut connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    for queue in 0..4 {
        if queue > REQUEST {
            connection.set_up(&guest, queue, 0);
            connection.vhost.set_vring_enable(queue, true).unwrap();
        }
        let bytes = request(Opcode::Getattr as u32, 1, &[0; 16]);
        guest.write(REQUEST_AT, &bytes);
        let ask = Part { at: REQUEST_AT, len: bytes.len() as u32, write: false };
        guest.chain(queue, &[ask, Part { at: REPLY_AT, len: 4096, write: true }]);
        assert!(connection.submit(&mut guest, queue) > 16, "queue {queue}");
    }
    chill(&fixture.host(&path(1, "tree")).join("big"));
    let node = lookup(&connection, &mut guest, &tree("big"));
    for offset in [0, 1_000_000] {
        let content = read(&connection, &mut guest, node, offset, 4096).unwrap();
        assert_eq!(content, big()[offset as usize..][..4096]);
    }
    if program.stat("lair_virtiofs_cold_reads_total") == 0 {
        println!("SKIPPED: reads that wait, as this file system does not forget what was read");
    }

    let mut filters: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{}/task", program.pid())).unwrap() {
        let task = task.unwrap().path();
        let status = status(&task.join("status"));
        let is = |key: &str, value: &str| assert_eq!(status[key], value, "{key} of {status:#?}");
        // What cannot be traced belongs to root, whoever runs it.
        assert_eq!(fs::metadata(task.join("status")).unwrap().uid(), 0, "it can be traced");
        is("Seccomp", "2");
        is("NoNewPrivs", "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            is(set, "0000000000000000");
        }
        if is_root() {
            is("CapBnd", "0000000000000000");
            is("Uid", "70001 70001 70001 70001");
            is("Gid", "70002 70002 70002 70002");
            is("Groups", "");
        }
        filters.entry(status["Name"].clone()).or_default().push(status["Seccomp_filters"].clone());
    }
    insta::assert_debug_snapshot!(filters);
}

#[test]
fn limits() {
    let fixture = Fixture::new();
    let program = Program::start(fixture.root(), &fixture.store(), &fixture.view_file());
    drop(crate::frontend::raw_connection(&program.socket));
    // Answered after the sandbox was closed.
    program.stats();
    let text = fs::read_to_string(format!("/proc/{}/limits", program.pid())).unwrap();
    let limit = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().unwrap_or(u64::MAX));
        (fields.next().unwrap(), fields.next().unwrap())
    };
    // 1024 open files of the store, 512 that queues have kept, 509 regions, 32 queues with 6 each, 256 others, 1 source.
    assert_eq!(limit("Max open files"), (2494, 2494));
    assert_eq!(limit("Max core file size"), (0, 0));
    assert_eq!(limit("Max locked memory"), (0, 0));
    let (soft, hard) = limit("Max data size");
    assert_eq!(soft, hard);
    assert!((256 << 20..300 << 20).contains(&soft), "{soft}");
}

#[test]
fn too_few_open_files_are_an_error() {
    if caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE).unwrap() {
        println!("SKIPPED: this user may raise limits");
        return;
    }
    let fixture = Fixture::new();
    let output = start_after(&fixture, &[], || {
        setrlimit(Resource::RLIMIT_NOFILE, 500, 500)?;
        Ok(())
    });
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(last_line(&output), @"2494 files can be needed open at once, and this process may have 500; raise its hard limit (ulimit -Hn, LimitNOFILE= of systemd): EPERM: Operation not permitted");
}

/// What the program says before it ends, when it is started with `prepare` done in it.
fn start_after(
    fixture: &Fixture,
    more: &[&str],
    prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"));
    command.arg("--socket").arg(fixture.root().join("s")).args(more);
    command.arg("--source").arg(fixture.store()).arg("--view").arg(fixture.view_file());
    // SAFETY: what the tests do there are system calls, and nothing is allocated.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(prepare);
    }
    command.output().unwrap()
}

/// Without the time and the level.
fn last_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let last = text.lines().last().unwrap_or_default();
    last.split_once("ERROR ").map_or(last, |(_, rest)| rest).to_owned()
}

/// A filter by which one system call fails.
fn without(call: c_long, errno: Errno) -> BpfProgram {
    let rules = [(call, vec![])].into_iter().collect();
    let action = SeccompAction::Errno(errno as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(rules, SeccompAction::Allow, action, arch).unwrap().try_into().unwrap()
}

#[test]
fn a_kernel_without_landlock_or_seccomp_is_refused() {
    let fixture = Fixture::new();
    let refused = |call, errno| {
        let filter = without(call, errno);
        let apply = move || seccompiler::apply_filter(&filter).map_err(|_| std::io::Error::last_os_error());
        let output = start_after(&fixture, ids(), apply);
        assert_eq!(output.status.code(), Some(1));
        last_line(&output)
    };
    insta::assert_snapshot!(refused(libc::SYS_landlock_create_ruleset, Errno::ENOSYS), @"This kernel offers no Landlock, and without it nothing is served; what is needed is Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and landlock in the list of security modules (kernel parameter lsm=)");
    assert!(!fixture.root().join("s").exists(), "it listens");
    insta::assert_snapshot!(refused(libc::SYS_landlock_create_ruleset, Errno::EOPNOTSUPP), @"This kernel offers no Landlock, and without it nothing is served; what is needed is Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and landlock in the list of security modules (kernel parameter lsm=)");
    insta::assert_snapshot!(refused(libc::SYS_seccomp, Errno::EINVAL), @"Cannot confine system calls (seccomp), and without that nothing is served; what is needed is a kernel with CONFIG_SECCOMP_FILTER, and a container runtime that allows seccomp(2): Invalid argument (os error 22)");
}

#[test]
fn who_it_is() {
    let lines = |more: &[&str]| {
        let fixture = Fixture::new();
        let program = begin(&fixture, more);
        program.stats();
        let uid = status(Path::new(&format!("/proc/{}/status", program.pid())))["Uid"].clone();
        let (status, lines) = program.terminate();
        assert_eq!(status, Some(0));
        (uid, lines.into_iter().filter(|line| line.contains(" uid ")).collect::<Vec<_>>())
    };
    let refused = |more: &[&str]| {
        let fixture = Fixture::new();
        let output = start_after(&fixture, more, || Ok(()));
        assert_eq!(output.status.code(), Some(1));
        last_line(&output)
    };
    if !is_root() {
        let (uid, said) = lines(&[]);
        assert!(uid.starts_with(&geteuid().to_string()));
        assert!(said.len() == 1 && said[0].contains(" INFO uid ") && said[0].contains("stays"), "{said:?}");
        assert!(refused(&IDS).starts_with("Only root can give this program other ids"));
        println!("SKIPPED: what root can do");
        return;
    }
    let (uid, said) = lines(&[]);
    assert_eq!(uid, "65534 65534 65534 65534");
    assert!(said.len() == 1 && said[0].contains(" WARN uid 65534 is shared"), "{said:?}");
    assert_eq!(lines(&IDS), ("70001 70001 70001 70001".into(), vec![]));
    insta::assert_snapshot!(refused(&["--uid", "0", "--gid", "7"]), @"uid 0 with gid 7 is not possible: 0 is root's; 1 and above are");
    insta::assert_snapshot!(refused(&["--uid", "7", "--gid", "0"]), @"uid 7 with gid 0 is not possible: 0 is root's; 1 and above are");
}

#[test]
fn an_index_is_read_when_something_is_granted() {
    let fixture = Fixture::new();
    fs::set_permissions(fixture.root(), Permissions::from_mode(0o700)).unwrap();
    let index = fixture.root().join("index");
    let indexed = |view: &Path| {
        let arguments = ["index".as_ref(), "--index".as_ref(), index.as_os_str(), "--source".as_ref()];
        let mut command = Command::new(env!("CARGO_BIN_EXE_lair-virtiofs"));
        let output = command.args(arguments).arg(fixture.store()).arg("--view").arg(view).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    };
    indexed(&fixture.view_file());
    let program = begin(&fixture, &[ids(), &["--index", index.to_str().unwrap()]].concat());
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    let more = path(6, "more");
    fs::write(fixture.host(&more), "more").unwrap();
    let view = fixture.root().join("more");
    View::new([more.clone()]).unwrap().write(&view).unwrap();
    indexed(&view);
    assert_eq!(program.control(format!("grant\n{more}\n\n").as_bytes()), "granted 1, refresh no\n");
    let node = lookup(&connection, &mut guest, more.base_name());
    assert_eq!(read(&connection, &mut guest, node, 0, 100).unwrap(), b"more");
    let (status, lines) = program.terminate();
    assert_eq!(status, Some(0));
    assert!(!lines.iter().any(|line| line.contains("without the index")), "{lines:#?}");
}

#[test]
fn a_store_below_a_directory_that_only_root_may_enter() {
    if !is_root() {
        println!("SKIPPED: only root can become another user");
        return;
    }
    let fixture = Fixture::new();
    fs::set_permissions(fixture.root(), Permissions::from_mode(0o700)).unwrap();
    let program = begin(&fixture, &IDS);
    let mut guest = Guest::new();
    let connection = Connection::new(&program.socket, &guest);
    connection.init(&mut guest);
    check(&connection, &mut guest);
    drop(program);
    // The store directory itself has to be open to it.
    fs::set_permissions(fixture.store(), Permissions::from_mode(0o700)).unwrap();
    let output = start_after(&fixture, &IDS, || Ok(()));
    assert_eq!(output.status.code(), Some(1));
    let line = last_line(&output).replace(fixture.root().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(line, @"uid 70001 with gid 70002 may not enter DIR/store, which it is to serve; allow it to all, or give another --uid and --gid: EACCES: Permission denied");
}
