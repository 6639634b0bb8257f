//! Where `laird` may make cgroups: found, checked and prepared at its start.
//!
//! ```text
//! DELEGATED/              what systemd, or whoever started laird, gave it
//!   supervisor/           laird itself: a cgroup with controllers for others has no processes of its own
//!   lair/vms/NAME/        one VM: all limits stand here
//!     hypervisor/ store/ vsock/ shim/    one process each
//! ```

use super::{CgroupError, VmCgroup, file};
use nix::errno::Errno;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The cgroup of `laird` itself. systemd makes it with `DelegateSubgroup=supervisor`.
const SUPERVISOR: &str = "supervisor";

/// Controllers without which limits cannot be held.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// Needed where a VM has limits for its disks.
const IO: &str = "io";

/// What to do about it. Said after each reason.
const HINT: &str = "Start laird by its systemd unit (Delegate=yes, DelegateSubgroup=supervisor) or below `systemd-run -p Delegate=yes` \
                    (with --user where you are not root), or set host.limits = \"none\" in the fleet file: VMs are then not limited, and vmctl says so";

/// What a host with both versions is told.
const HYBRID: &str =
    "; this host uses cgroup v1 beside v2 (systemd.unified_cgroup_hierarchy=1 at its boot ends that)";

/// Why there can be no cgroups of ours.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroups {
    /// There is no hierarchy of version 2.
    #[error(
        "This host has no cgroup v2 mounted. Boot it with the unified hierarchy (systemd.unified_cgroup_hierarchy=1), or set host.limits = \
         \"none\" in the fleet file: VMs are then not limited, and vmctl says so"
    )]
    NoV2,
    /// This process's cgroup is not below the part of the hierarchy that is mounted, as in some containers.
    #[error(
        "The cgroup of laird is outside of what is mounted here as cgroup v2, as in a container without a cgroup namespace. {HINT}"
    )]
    Outside,
    /// Controllers are missing.
    #[error("The cgroup {dir} has no controller {missing}{hybrid}. {HINT}")]
    Controllers {
        /// The cgroup.
        dir: PathBuf,
        /// Which are missing.
        missing: String,
        /// Why that may be.
        hybrid: &'static str,
    },
    /// `laird` may not change its cgroup.
    #[error("The cgroup {path} is not delegated to laird: {reason}. {HINT}")]
    NotDelegated {
        /// What could not be changed.
        path: PathBuf,
        /// Why, as the system says it.
        reason: String,
    },
    /// Others live in the cgroup of `laird`.
    #[error(
        "The cgroup {dir} has {count} processes besides laird, so it cannot have limits for others. {HINT}"
    )]
    Occupied {
        /// The cgroup.
        dir: PathBuf,
        /// How many.
        count: usize,
    },
    /// It cannot be found out.
    #[error("Cannot find the cgroup of laird")]
    Unknown(#[source] io::Error),
    /// Something else went wrong.
    #[error("Cannot prepare cgroups")]
    Cgroup(#[from] CgroupError),
}

/// How cgroups are made and removed: by the kernel, which puts files into them and takes them away again; or, in tests, by hand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    pub(super) make: fn(&Path) -> io::Result<()>,
    pub(super) remove: fn(&Path) -> io::Result<()>,
}

impl Kernel {
    pub(super) const REAL: Self =
        Self { make: |path| fs::create_dir(path), remove: |path| fs::remove_dir(path) };
}

/// A place in which each VM gets a cgroup.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    vms: PathBuf,
    kernel: Kernel,
}

/// The mount point of cgroup v2 and the part of the hierarchy that is mounted there, from `/proc/self/mountinfo` (proc(5)).
pub(super) fn mount(text: &str) -> Option<(PathBuf, PathBuf)> {
    text.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (after.split(' ').next() == Some("cgroup2"))
            .then(|| (unescaped(point).into(), unescaped(root).into()))
    })
}

/// Blanks and backslashes are written as three octal digits.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// The directory of this process's cgroup, from `/proc/self/cgroup` and where the hierarchy is mounted.
fn own(cgroup: &str, point: &Path, root: &Path) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(root).ok()?;
    // Outside of the namespace's root the kernel says `/../..`.
    let inside = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    inside.then(|| point.join(below))
}

/// The cgroup in which this process is.
fn of_this_process() -> Result<PathBuf, NoCgroups> {
    let text = |path: &str| fs::read_to_string(path).map_err(NoCgroups::Unknown);
    let (point, root) = mount(&text("/proc/self/mountinfo")?).ok_or(NoCgroups::NoV2)?;
    own(&text("/proc/self/cgroup")?, &point, &root).ok_or(NoCgroups::Outside)
}

/// `laird` may be in its own leaf already.
fn delegated(own: PathBuf) -> PathBuf {
    match own.parent() {
        Some(parent) if own.file_name().is_some_and(|name| name == SUPERVISOR) => parent.to_owned(),
        _ => own,
    }
}

/// The controllers that cgroups can have, if those are among them that limits need. Changes nothing: for `vmctl doctor`, whose own cgroup
/// is another than that of `laird`, so it looks at the topmost one.
pub fn available() -> Result<Vec<String>, NoCgroups> {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(NoCgroups::Unknown)?;
    let (point, _) = mount(&text).ok_or(NoCgroups::NoV2)?;
    has(&point, true)
}

/// The controllers of `dir`, if it has those that are needed.
fn has(dir: &Path, io: bool) -> Result<Vec<String>, NoCgroups> {
    let there = file::read(&dir.join("cgroup.controllers"))?;
    let there: Vec<_> = there.split_ascii_whitespace().collect();
    let missing: Vec<_> = wanted(io).into_iter().filter(|name| !there.contains(name)).collect();
    if missing.is_empty() {
        return Ok(there.into_iter().map(Into::into).collect());
    }
    // With both versions mounted, a controller belongs to one of them.
    let hybrid = Path::new("/sys/fs/cgroup/unified").exists();
    let hybrid = if hybrid { HYBRID } else { "" };
    Err(NoCgroups::Controllers { dir: dir.into(), missing: missing.join(", "), hybrid })
}

fn wanted(io: bool) -> Vec<&'static str> {
    NEEDED.into_iter().chain(io.then_some(IO)).collect()
}

impl Hierarchy {
    /// Prepares the cgroup of this process for those of VMs; `io` says whether disks are to be limited.
    pub fn find(io: bool) -> Result<Self, NoCgroups> {
        Self::prepare(delegated(of_this_process()?), std::process::id(), io, Kernel::REAL)
    }

    /// The same below `delegated`, where the process `supervisor` is.
    pub(super) fn prepare(
        delegated: PathBuf,
        supervisor: u32,
        io: bool,
        kernel: Kernel,
    ) -> Result<Self, NoCgroups> {
        // Also where no VM needs it yet: an apply may bring one that does.
        let io = has(&delegated, io)?.iter().any(|name| name == IO);
        let leaf = delegated.join(SUPERVISOR);
        make(&leaf, kernel).map_err(|error| not_delegated(&leaf, error))?;
        let processes = leaf.join("cgroup.procs");
        file::write(&processes, &supervisor.to_string()).map_err(|error| not_delegated(&processes, error))?;
        let left = file::parsed(&delegated.join("cgroup.procs"), super::parse::processes)?.len();
        // Only the topmost cgroup may have both processes and controllers for others; it alone has no `cgroup.type`.
        if left > 0 && delegated.join("cgroup.type").exists() {
            return Err(NoCgroups::Occupied { dir: delegated, count: left });
        }
        let lair = delegated.join("lair");
        let vms = lair.join("vms");
        enable(&delegated, io)?;
        for inner in [&lair, &vms] {
            make(inner, kernel).map_err(|error| not_delegated(inner, error))?;
            enable(inner, io)?;
        }
        Ok(Self { vms, kernel })
    }

    /// The cgroup of the VM `name`, which may not be there.
    pub fn vm(&self, name: &str) -> VmCgroup {
        VmCgroup::new(self.vms.join(name), name.into(), self.kernel)
    }

    /// Where the cgroups of VMs are.
    pub fn dir(&self) -> &Path {
        &self.vms
    }

    /// The VMs that have a cgroup, those of an earlier `laird` included.
    pub fn names(&self) -> Result<Vec<String>, CgroupError> {
        let entries = fs::read_dir(&self.vms).map_err(|error| CgroupError::Read(self.vms.clone(), error))?;
        let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut names: Vec<_> =
            directories.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }
}

/// Makes a cgroup, if it is missing.
pub(super) fn make(path: &Path, kernel: Kernel) -> Result<(), CgroupError> {
    match (kernel.make)(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Make(path.into(), error))
        }
        _ => Ok(()),
    }
}

/// Lets cgroups in `dir` use the controllers, and makes sure that they can.
fn enable(dir: &Path, io: bool) -> Result<(), NoCgroups> {
    let path = dir.join("cgroup.subtree_control");
    let wanted = wanted(io);
    let value: Vec<_> = wanted.iter().map(|name| format!("+{name}")).collect();
    file::write(&path, &value.join(" ")).map_err(|error| not_delegated(&path, error))?;
    let found = file::read(&path)?;
    // A directory that only keeps what was written to it has it with the sign; the kernel does not.
    let on: Vec<_> = found.split_ascii_whitespace().map(|name| name.trim_start_matches('+')).collect();
    if wanted.iter().all(|name| on.contains(name)) {
        return Ok(());
    }
    Err(CgroupError::Altered { path, value: value.join(" "), found: found.trim_end().into() }.into())
}

/// Errors of rights are told as such.
fn not_delegated(path: &Path, error: CgroupError) -> NoCgroups {
    let (CgroupError::Make(_, source) | CgroupError::Write { source, .. }) = &error else {
        return error.into();
    };
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => {
            NoCgroups::NotDelegated { path: path.into(), reason: source.to_string() }
        }
        Some(Errno::EBUSY) => {
            let dir = path.parent().unwrap_or(path).to_owned();
            let count =
                file::parsed(&dir.join("cgroup.procs"), super::parse::processes).map_or(0, |ids| ids.len());
            NoCgroups::Occupied { dir, count }
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::fake::Fake;

    const UNIFIED: &str = "22 1 0:21 / /proc rw - proc proc rw\n\
                           30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn cg1_the_hierarchy_is_found_where_it_is_mounted() {
        let found = |mounts: &str, cgroup: &str| {
            let (point, root) = mount(mounts)?;
            own(cgroup, &point, &root).map(delegated)
        };
        let service = Some(PathBuf::from("/sys/fs/cgroup/system.slice/lair.service"));
        assert_eq!(found(UNIFIED, "0::/system.slice/lair.service\n"), service);
        assert_eq!(found(UNIFIED, "0::/system.slice/lair.service/supervisor\n"), service);
        assert_eq!(found(UNIFIED, "0::/\n"), Some("/sys/fs/cgroup".into()));
        // The first line of a hybrid host is of version 1.
        assert_eq!(found(UNIFIED, "4:memory:/x\n0::/a\n"), Some("/sys/fs/cgroup/a".into()));
        let part = UNIFIED.replace(" / /sys/fs/cgroup ", " /a\\040b /sys/fs/cgroup ");
        assert_eq!(found(&part, "0::/a b/c\n"), Some("/sys/fs/cgroup/c".into()));
        assert_eq!(found(&part, "0::/other\n"), None);
        assert_eq!(found(UNIFIED, "0::/../..\n"), None);
        assert_eq!(found(UNIFIED, "4:memory:/x\n"), None);
        assert_eq!(
            mount("30 22 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\nnonsense\n"),
            None
        );
    }

    fn prepared(fake: &Fake) -> Result<Hierarchy, NoCgroups> {
        Hierarchy::prepare(fake.root().into(), 4242, true, Fake::KERNEL)
    }

    #[test]
    fn laird_is_in_a_leaf_and_the_controllers_are_on_down_to_the_vms() {
        let fake = Fake::new();
        let hierarchy = prepared(&fake).unwrap();
        assert_eq!(fake.read("supervisor/cgroup.procs"), "4242");
        for inner in [".", "lair", "lair/vms"] {
            assert_eq!(
                fake.read(&format!("{inner}/cgroup.subtree_control")),
                "cpu memory pids io",
                "{inner}"
            );
            assert_eq!(fake.read(&format!("{inner}/cgroup.procs")), "", "{inner}");
        }
        assert_eq!(hierarchy.names().unwrap(), Vec::<String>::new());
        // The next laird finds it as it is.
        prepared(&fake).unwrap();
    }

    #[test]
    fn cg1_no_usable_controllers_is_an_error_with_a_hint() {
        let told = |fake: &Fake| {
            let error = prepared(fake).unwrap_err();
            assert!(!fake.root().join("lair").exists(), "something was made");
            crate::error::chain(&error).replace(&fake.root().display().to_string(), "DIR").replace(HYBRID, "")
        };
        let mut all = Vec::new();
        let fake = Fake::new();
        fake.write("cgroup.controllers", "cpuset memory\n");
        all.push(told(&fake));
        let fake = Fake::new();
        fake.write("cgroup.controllers", "");
        all.push(told(&fake));
        let fake = Fake::new();
        fake.write("cgroup.procs", "1\n2\n");
        all.push(told(&fake));
        all.push(NoCgroups::NoV2.to_string());
        let denied = CgroupError::Make("DIR/lair".into(), Errno::EACCES.into());
        all.push(not_delegated(Path::new("DIR/lair"), denied).to_string());
        insta::assert_snapshot!(all.join("\n\n"));
    }

    #[test]
    fn cg9_a_controller_that_is_not_on_after_it_was_asked_for_is_an_error() {
        let fake = Fake::new();
        std::fs::remove_file(fake.root().join("cgroup.subtree_control")).unwrap();
        std::os::unix::fs::symlink("/dev/null", fake.root().join("cgroup.subtree_control")).unwrap();
        let error = prepared(&fake).unwrap_err();
        assert!(matches!(error, NoCgroups::Cgroup(CgroupError::Altered { .. })), "{error}");
    }
}
