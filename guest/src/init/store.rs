//! `/nix/store`: the host's view, read-only, or covered by an overlay that takes writes; and Nix's record of it.

use super::mounts::{self, DATA, MountError};
use crate::paths::{STORE_LOWER, STORE_WRITES};
use lair_guest::boot::{Overlay, STORE_TAG, Volume};
use nix::mount::MsFlags;
use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Why the store is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("The overlay's volume `{0}` is none of the VM's volumes")]
    NoSuchVolume(String),
    #[error("Could not create `{path}`")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Could not run `{program}`")]
    Run {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{program} --load-db` did not accept the view's registration ({status}): {stderr}")]
    Register { program: PathBuf, status: ExitStatus, stderr: String },
    #[error(transparent)]
    Mount(#[from] MountError),
}

const STORE: &str = "/nix/store";
const NIX_VAR: &str = "/nix/var";

/// How far the kernel reads ahead in the view, in KiB: its 128 would make large files cost a round trip each.
const READ_AHEAD_KIB: &str = "1024";

/// Pages in a request, since Linux 6.13; its 256 would halve and quarter what is read ahead. The queue has room for no more.
const MAX_PAGES: &str = "1020";

/// Mounts the store.
pub(super) fn mount(overlay: Option<&Overlay>, volumes: &[Volume]) -> Result<(), StoreError> {
    let Some(overlay) = overlay else {
        return Ok(mount_view(STORE)?);
    };
    mount_view(STORE_LOWER)?;
    let upper = create(STORE_WRITES, "")?;
    match overlay {
        Overlay::Tmpfs { bytes } => {
            mounts::fs("tmpfs", "store-writes", &upper, DATA, &format!("mode=0755,size={bytes}"))?;
        }
        Overlay::Volume { name } => {
            let volume = volumes.iter().find(|volume| volume.name == *name);
            let volume = volume.ok_or_else(|| StoreError::NoSuchVolume(name.clone()))?;
            // Bound to a fixed name, so that no mount point has to be quoted in the overlay's options.
            mounts::rebind(&volume.mount, &upper, MsFlags::MS_BIND)?;
            // Nix's database describes what is in the upper layer: they persist together.
            mounts::rebind(&create(STORE_WRITES, "nix-var")?, NIX_VAR, MsFlags::MS_BIND)?;
        }
    }
    let upper = create(STORE_WRITES, "store-upper")?;
    let work = create(STORE_WRITES, "store-work")?;
    let layers = format!("lowerdir={STORE_LOWER},upperdir={upper},workdir={work}");
    Ok(mounts::fs("overlay", "store", STORE, DATA | MsFlags::MS_NOATIME, &layers)?)
}

fn create(folder: &str, name: &str) -> Result<String, StoreError> {
    let path = Path::new(folder).join(name);
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path.to_string_lossy().into_owned()),
        Err(source) => Err(StoreError::Create { path, source }),
    }
}

/// Mounts the host's view at `at`.
fn mount_view(at: &str) -> Result<(), MountError> {
    // Speed only, and read when the file system is mounted: a kernel without this limit serves as well.
    let _ = fs::write("/proc/sys/fs/fuse/max_pages_limit", MAX_PAGES);
    let flags = DATA | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
    // The device may still be on its way, and then there is no such tag.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match mounts::fs("virtiofs", STORE_TAG, at, flags, "") {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            other => break other?,
        }
    }
    if let Ok(metadata) = fs::metadata(at) {
        let device = metadata.dev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        // Speed only: a kernel without this file serves as well.
        let _ = fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB);
    }
    Ok(())
}

/// Tells the guest's Nix, if it has one, what the view holds. Only a writable store has a database to tell: Nix
/// makes folders of its own in the store that it records.
pub(super) fn register(registration: File, profile: &str) -> Result<(), StoreError> {
    let program = Path::new(profile).join("bin/nix-store");
    if !program.exists() {
        return Ok(());
    }
    let output = Command::new(&program)
        .arg("--load-db")
        .env_clear()
        .env("PATH", Path::new(profile).join("bin"))
        .env("HOME", "/root")
        .stdin(registration)
        .stdout(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_string();
            Err(StoreError::Register { program, status: output.status, stderr })
        }
        Err(source) => Err(StoreError::Run { program, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A profile whose `nix-store` is this script.
    fn profile(script: &str) -> tempfile::TempDir {
        let profile = tempfile::tempdir().unwrap();
        fs::create_dir(profile.path().join("bin")).unwrap();
        let program = profile.path().join("bin/nix-store");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        profile
    }

    fn registration(folder: &Path) -> File {
        let path = folder.join("registration");
        fs::write(&path, "/nix/store/x\n").unwrap();
        File::open(path).unwrap()
    }

    #[test]
    fn the_registration_is_what_nix_store_reads() {
        let profile = profile(r#"/bin/cat >"$0.got"; echo "$*" >"$0.args""#);
        register(registration(profile.path()), profile.path().to_str().unwrap()).unwrap();
        let program = profile.path().join("bin/nix-store");
        assert_eq!(fs::read_to_string(program.with_extension("got")).unwrap(), "/nix/store/x\n");
        assert_eq!(fs::read_to_string(program.with_extension("args")).unwrap(), "--load-db\n");
    }

    #[test]
    fn a_refused_registration_says_why() {
        let profile = profile("echo 'error: database is broken' >&2; exit 1");
        let error = register(registration(profile.path()), profile.path().to_str().unwrap()).unwrap_err();
        assert!(error.to_string().ends_with("(exit status: 1): error: database is broken"), "{error}");
    }

    #[test]
    fn a_guest_without_nix_needs_no_registration() {
        let empty = tempfile::tempdir().unwrap();
        register(registration(empty.path()), empty.path().to_str().unwrap()).unwrap();
    }
}
