//! Looks at the host. Changes nothing, and waits for nothing without a limit.

use super::{
    facts::{Directory, Driver, Facts, FleetContent, FleetFile, Found, Laird, Program, Seen, Space, Unit},
    parse,
};
use crate::output::harmless;
use lair_vmm::{
    api::{
        client::{Client, ClientError},
        gpus::{GpusQuery, GpusReply},
    },
    cgroup,
    fleet::{self, Loaded, limits::HostFacts, schema},
    host::{
        facts, ids,
        pci::{Inventory, Sysfs, Vfio},
        tools::{self, Tool, Tools},
    },
    state::dirs::{self, Dirs},
};
use nix::{
    sys::{
        resource::{Resource, getrlimit},
        statfs::{TMPFS_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{Group, User, geteuid},
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

/// The longest file that is read, in bytes: a passwd file of a million users is longer.
const FILE_MAX: u64 = 64 << 20;

/// The longest answer of a program that is read, in bytes.
const ANSWER_MAX: u64 = 16 << 10;

/// How long a program or `laird` may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Where things are.
pub(super) struct Places {
    pub(super) dirs: Dirs,
    pub(super) fleet: PathBuf,
}

pub(super) async fn facts(places: Places, client: &Client) -> Facts {
    let root = dirs::is_root();
    let Places { dirs, fleet } = places;
    let host = HostFacts::read();
    let fleet = fleet_file(fleet, host.as_ref().ok());
    let systemd = Path::new("/run/systemd/system").is_dir();
    let unit = if systemd { unit().await } else { None };
    let own = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let release = nix::sys::utsname::uname()
        .map_or_else(|_| "?".into(), |kernel| kernel.release().to_string_lossy().into_owned());
    let sysfs = Sysfs::of_this_host();
    let vfio = Vfio::read(&sysfs);
    Facts {
        root,
        user: user(),
        kvm: facts::kvm(),
        host: host.map_err(|error| error.to_string()),
        swaps: parse::swaps(&text("/proc/swaps")),
        ksm: text("/sys/kernel/mm/ksm/run").trim() == "1",
        kernel: release.clone(),
        command_line: text("/proc/cmdline"),
        unsafe_interrupts: vfio.unsafe_interrupts,
        iommu_groups: fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count),
        vfio: Path::new("/dev/vfio/vfio").exists(),
        no_iommu_mode: vfio.no_iommu_mode,
        vfio_pci: if vfio.driver { Driver::Loaded } else { module("vfio-pci", &release) },
        gpus: Inventory::read(&sysfs)
            .map(|inventory| GpusReply::new(&inventory, &BTreeMap::new(), &GpusQuery::default()))
            .map_err(|error| lair_vmm::error::chain(&error)),
        cgroups: cgroup::available(),
        landlock: landlock(),
        seccomp: text("/proc/sys/kernel/seccomp/actions_avail")
            .split_ascii_whitespace()
            .any(|word| word == "errno"),
        clashes: clashes(&fleet.host),
        group: group(),
        descriptors: unit.as_ref().map_or(own, |unit| unit.descriptors),
        programs: programs().await,
        run: directory(&dirs.run),
        state: directory(&dirs.state),
        elsewhere: elsewhere(&dirs.state),
        journal: fs::metadata("/run/systemd/journal/socket").is_ok_and(|file| file.file_type().is_socket()),
        systemd,
        unit,
        fleet,
        laird: laird(client, &dirs).await,
    }
}

/// A file's text; nothing of one that is missing.
fn text(path: &str) -> String {
    let mut bytes = Vec::new();
    // What was read before an error counts.
    let _ = File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether the modules of the kernel that runs have one. NixOS has them elsewhere.
fn module(name: &str, release: &str) -> Driver {
    let found = ["/lib/modules", "/run/booted-system/kernel-modules/lib/modules"].iter().any(|directory| {
        let lists = |list: &str| parse::lists_module(&text(&format!("{directory}/{release}/{list}")), name);
        lists("modules.dep") || lists("modules.builtin")
    });
    if found { Driver::Loadable } else { Driver::Missing }
}

fn user() -> String {
    let uid = geteuid();
    User::from_uid(uid).ok().flatten().map_or_else(|| format!("user {uid}"), |user| user.name)
}

/// Whether a ruleset can be made; none is obeyed.
fn landlock() -> bool {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1));
    ruleset.is_ok_and(|ruleset| ruleset.create().is_ok())
}

fn fleet_file(path: PathBuf, host: Option<&HostFacts>) -> FleetFile {
    let missing = !path.exists();
    let (content, settings) = match host.filter(|_| !missing).map(|host| fleet::check_file(&path, host)) {
        None => (FleetContent::Missing, schema::Host::default()),
        Some(Ok(Loaded { fleet, .. })) => (FleetContent::Good(fleet.vms.len()), fleet.host),
        Some(Err(problems)) => {
            let more = problems.problems.len().saturating_sub(1).saturating_add(problems.omitted);
            let first = problems.problems.first().map(ToString::to_string).unwrap_or_default();
            match host.and_then(|host| fleet::load_file(&path, host).ok()) {
                Some(loaded) => (FleetContent::Lacking(first, more), loaded.fleet.host),
                None => (FleetContent::Wrong(first, more), schema::Host::default()),
            }
        }
    };
    FleetFile { path, content, host: settings }
}

fn clashes(host: &schema::Host) -> Vec<String> {
    let files = ["/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid"].map(|file| (file, text(file)));
    let files = files.each_ref().map(|(file, text)| (*file, text.as_str()));
    parse::clashes(host.ids.unwrap_or(ids::DEFAULT), &files)
}

fn group() -> Option<Vec<String>> {
    let group = Group::from_name("lair").ok().flatten()?;
    let mut members = group.mem;
    // Those whose first group it is.
    let passwd = text("/etc/passwd");
    let gid = group.gid.to_string();
    members.extend(passwd.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (*fields.get(3)? == gid).then(|| fields.first().copied().unwrap_or_default().to_owned())
    }));
    members.sort();
    members.dedup();
    Some(members)
}

async fn programs() -> Vec<Program> {
    let tools = Tools::of_this_process();
    let mut programs = Vec::new();
    for tool in tools::ALL {
        let found = match tools.find(tool) {
            Ok(path) => run(tool, path).await,
            Err(_) => Found::Nowhere,
        };
        programs.push(Program { tool, found });
    }
    programs
}

/// Asks a program for its version.
async fn run(tool: Tool, path: PathBuf) -> Found {
    let option = if tool == tools::MKFS { "-V" } else { "--version" };
    match timeout(ANSWER, answer(Command::new(&path).arg(option))).await {
        Ok(Ok(answer)) => Found::At(path, version(&answer)),
        Ok(Err(error)) => Found::Broken(path, harmless(&error.to_string()).into_owned()),
        Err(_) => Found::Broken(path, format!("it does not answer in {} s", ANSWER.as_secs())),
    }
}

/// The first line that says something, without what is in brackets: who built it.
fn version(answer: &str) -> String {
    let first = answer.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no version told");
    let version = first.split_once(" (").map_or(first, |(version, _)| version);
    harmless(version).chars().take(60).collect()
}

/// What a program says, on standard output or else on standard error. It is killed if this is dropped.
async fn answer(command: &mut Command) -> io::Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
        let (mut stdout, mut stderr) = (stdout.take(ANSWER_MAX), stderr.take(ANSWER_MAX));
        tokio::try_join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err))?;
    }
    let status = child.wait().await?;
    let said = if out.is_empty() { err } else { out };
    let said = String::from_utf8_lossy(&said).into_owned();
    if status.success() {
        return Ok(said);
    }
    let first: String = said.lines().next().unwrap_or_default().chars().take(200).collect();
    Err(io::Error::other(format!("{status}: {first}")))
}

async fn unit() -> Option<Unit> {
    const WANTED: &str = "--property=LoadState,ActiveState,KillMode,Delegate,LimitNOFILE";
    let mut command = Command::new("systemctl");
    let said = timeout(ANSWER, answer(command.args(["show", "lair.service", WANTED]))).await.ok()?.ok()?;
    parse::unit(&said)
}

fn directory(path: &Path) -> Directory {
    let seen = match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => Seen::NoDirectory,
        Ok(metadata) => space(path)
            .map(|space| Seen::There {
                uid: metadata.uid(),
                mode: metadata.permissions().mode() & 0o7777,
                ours: metadata.uid() == geteuid().as_raw(),
                space,
            })
            .unwrap_or_else(Seen::Unknown),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
            space(above).map_or_else(Seen::Unknown, Seen::Missing)
        }
        Err(error) => Seen::Unknown(error.to_string()),
    };
    Directory { path: path.into(), seen }
}

fn space(path: &Path) -> Result<Space, String> {
    let (kind, room) =
        statfs(path).and_then(|kind| Ok((kind, statvfs(path)?))).map_err(|error| error.to_string())?;
    Ok(Space {
        free: room.blocks_available().saturating_mul(room.fragment_size()),
        read_only: room.flags().contains(FsFlags::ST_RDONLY),
        memory: kind.filesystem_type() == TMPFS_MAGIC,
    })
}

/// Directories of VMs, and the one above them, that are not on the state directory's file system.
fn elsewhere(state: &Path) -> Vec<PathBuf> {
    let Ok(own) = fs::metadata(state) else { return Vec::new() };
    let vms = state.join("vms");
    let each = fs::read_dir(&vms).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> = std::iter::once(vms.clone())
        .chain(each)
        .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.dev() != own.dev()))
        .collect();
    found.sort();
    found
}

async fn laird(client: &Client, dirs: &Dirs) -> Laird {
    match timeout(ANSWER, client.version()).await {
        Ok(Ok(version)) => Laird::Answers(harmless(&version.laird).into_owned()),
        Ok(Err(ClientError::Down(socket))) => Laird::Down(socket),
        Ok(Err(ClientError::Denied(socket))) => Laird::Denied(socket),
        Ok(Err(error)) => Laird::Odd(harmless(&lair_vmm::error::chain(&error)).into_owned()),
        Err(_) => {
            let socket = dirs.api_socket();
            Laird::Odd(format!("does not answer on {} in {} s", socket.display(), ANSWER.as_secs()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_vmm::host::tools::{MKFS, SHIM};

    #[test]
    fn versions_are_one_harmless_line() {
        let qemu = "\nQEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright\n";
        assert_eq!(version(qemu), "QEMU emulator version 7.2.22");
        assert_eq!(version(&format!("a\x1b[1m{}", "b".repeat(100))).len(), 60);
        assert_eq!(version(" \n"), "no version told");
    }

    #[tokio::test]
    async fn hv1_a_program_that_does_not_run_is_told_apart_from_one_that_does() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        let written = |text: &str| {
            fs::write(&program, text).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            program.clone()
        };
        let found = run(SHIM, written("#!/bin/sh\n[ \"$1\" = --version ] && echo lair-shim 7\n")).await;
        assert!(matches!(&found, Found::At(_, version) if version == "lair-shim 7"), "{found:?}");
        let found = run(MKFS, written("#!/bin/sh\n[ \"$1\" = -V ] && echo mke2fs 1 >&2\n")).await;
        assert!(matches!(&found, Found::At(_, version) if version == "mke2fs 1"), "{found:?}");
        let found = run(SHIM, written("#!/bin/sh\necho no libpixman >&2\nexit 127\n")).await;
        let reason = "exit status: 127: no libpixman";
        assert!(matches!(&found, Found::Broken(_, said) if said == reason), "{found:?}");
        let found = run(SHIM, directory.path().join("missing")).await;
        assert!(matches!(found, Found::Broken(..)), "{found:?}");
    }

    #[test]
    fn directories_are_seen_as_they_are() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path();
        assert!(matches!(directory(path).seen, Seen::There { ours: true, .. }));
        assert!(matches!(directory(&path.join("a/b")).seen, Seen::Missing(_)));
        fs::write(path.join("file"), "").unwrap();
        assert!(matches!(directory(&path.join("file")).seen, Seen::NoDirectory));
        // laird follows no link either.
        std::os::unix::fs::symlink(path, path.join("link")).unwrap();
        assert!(matches!(directory(&path.join("link")).seen, Seen::NoDirectory));
        assert_eq!(elsewhere(path), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_fleet_file_is_missing_or_wrong_or_its_host_counts() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("fleet.toml");
        let host = HostFacts { cpus: 2, memory: lair_vmm::fleet::units::Size(8 << 30) };
        let file = || fleet_file(path.clone(), Some(&host));
        assert!(matches!(file().content, FleetContent::Missing));
        fs::write(&path, "schema = 1\nstore.sources = []\nnonsense = 1\n").unwrap();
        assert!(matches!(file().content, FleetContent::Wrong(first, _) if first.contains("fleet.toml:")));
        // Good but for a store that is not there.
        let source = parent.path().join("source");
        let text = format!(
            "schema = 1\nhost = {{ accel = \"tcg\" }}\nstore.sources = [{{ root = \"{}\" }}]\n",
            source.display()
        );
        fs::write(&path, text).unwrap();
        let file = file();
        assert!(
            matches!(&file.content, FleetContent::Lacking(first, 0) if first.contains("source")),
            "{file:?}"
        );
        assert_eq!(file.host.accel, schema::Accel::Tcg);
    }
}
