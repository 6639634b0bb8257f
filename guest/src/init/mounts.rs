//! The kernel's file systems, and the one way in which init mounts.

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
};
use std::{fs, os::unix::fs::symlink, path::Path};

/// A mount that did not come about.
#[derive(Debug, thiserror::Error)]
#[error("Could not mount {kind} `{from}` at `{at}`")]
pub(super) struct MountError {
    kind: String,
    from: String,
    at: String,
    #[source]
    source: Errno,
}

/// Nothing on a data file system is a device or raises privileges.
pub(super) const DATA: MsFlags = MsFlags::MS_NODEV.union(MsFlags::MS_NOSUID);

/// Mounts `from`, a file system of type `kind`, at `at`, which is made if it is missing.
pub(super) fn fs(kind: &str, from: &str, at: &str, flags: MsFlags, options: &str) -> Result<(), MountError> {
    let failed = |source| MountError { kind: kind.into(), from: from.into(), at: at.into(), source };
    if !Path::new(at).is_dir() {
        fs::create_dir_all(at).map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
    }
    mount(Some(from), at, Some(kind), flags, Some(options)).map_err(failed)
}

/// Makes what is at `from` visible at `to` as well, or moves a mount there.
pub(super) fn rebind(from: &str, to: &str, how: MsFlags) -> Result<(), MountError> {
    mount(Some(from), to, None::<&str>, how, None::<&str>).map_err(|source| MountError {
        kind: "folder".into(),
        from: from.into(),
        at: to.into(),
        source,
    })
}

/// What every program expects: `/proc`, `/sys`, `/dev` and `/run`.
pub(super) fn early() -> Result<(), MountError> {
    let closed = DATA | MsFlags::MS_NOEXEC;
    fs("proc", "proc", "/proc", closed, "")?;
    fs("sysfs", "sysfs", "/sys", closed, "")?;
    match fs("devtmpfs", "devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755") {
        // The kernel has mounted it by itself.
        Err(MountError { source: Errno::EBUSY, .. }) => {}
        other => other?,
    }
    fs(
        "devpts",
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "mode=0620,ptmxmode=0666,gid=5",
    )?;
    fs("tmpfs", "tmpfs", "/dev/shm", DATA, "mode=1777")?;
    fs("tmpfs", "tmpfs", "/run", DATA, "mode=0755")?;
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        // They may be there already, and nothing of ours needs them.
        let _ = symlink(format!("/proc/self/fd{target}"), format!("/dev/{name}"));
    }
    Ok(())
}
