//! What the root gets from the guest's profile: `/etc`, `/bin/sh`, `/usr/bin/env`.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Why the root could not be filled.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProfileError {
    #[error("Could not copy `{from}` to `{to}`")]
    Copy {
        from: PathBuf,
        to: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Could not write `{path}`")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{0}` of the profile is deeper than {MAX_DEPTH} folders: does it link to itself?")]
    TooDeep(PathBuf),
}

/// How deep a profile's `etc` may be: links in it are followed, and may go round in circles.
const MAX_DEPTH: u32 = 12;

/// Written where the profile has no such file, so that programs find a root user and `localhost`.
const DEFAULTS: [(&str, &str); 3] = [
    ("passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/var/empty:/bin/false\n"),
    ("group", "root:x:0:\nnogroup:x:65534:\n"),
    ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];

/// Fills the root from `profile`. Volumes are mounted by now, so that the modes here are those that count.
pub(super) fn populate(hostname: &str, profile: Option<&str>) -> Result<(), ProfileError> {
    populate_in(Path::new("/"), hostname, profile.map(Path::new))
}

fn populate_in(root: &Path, hostname: &str, profile: Option<&Path>) -> Result<(), ProfileError> {
    let etc = root.join("etc");
    if let Some(profile) = profile {
        if profile.join("etc").is_dir() {
            copy(&profile.join("etc"), &etc, 0)?;
        }
        for (program, name) in [("bin/sh", "bin/sh"), ("bin/env", "usr/bin/env")] {
            let (target, path) = (profile.join(program), root.join(name));
            if target.exists() && path.symlink_metadata().is_err() {
                symlink(target, &path).map_err(|source| ProfileError::Write { path, source })?;
            }
        }
    }
    let hostname_line = format!("{hostname}\n");
    for (name, content) in DEFAULTS.into_iter().chain([("hostname", hostname_line.as_str())]) {
        let path = etc.join(name);
        if !path.exists() {
            fs::write(&path, content).map_err(|source| ProfileError::Write { path, source })?;
        }
    }
    // A volume may be mounted here, and a new file system is open to root alone.
    let (tmp, open) = (root.join("tmp"), fs::Permissions::from_mode(0o1777));
    fs::set_permissions(&tmp, open).map_err(|source| ProfileError::Write { path: tmp, source })
}

/// Copies files and folders, not links: what is in `/etc` is there to be changed. Links that leave the store
/// (`/etc/mtab`) are kept as they are.
fn copy(from: &Path, to: &Path, depth: u32) -> Result<(), ProfileError> {
    let failed = |source| ProfileError::Copy { from: from.to_path_buf(), to: to.to_path_buf(), source };
    if depth > MAX_DEPTH {
        return Err(ProfileError::TooDeep(from.to_path_buf()));
    }
    let link = fs::symlink_metadata(from).map_err(failed)?.is_symlink();
    let metadata = fs::metadata(from);
    match metadata {
        Ok(metadata) if metadata.is_dir() => {
            fs::create_dir_all(to).map_err(failed)?;
            for entry in fs::read_dir(from).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                copy(&entry.path(), &to.join(entry.file_name()), depth + 1)?;
            }
            Ok(())
        }
        Ok(metadata) if metadata.is_file() && !is_of_the_kernel(from) => {
            let executable = metadata.permissions().mode() & 0o111 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            fs::copy(from, to).map_err(failed)?;
            fs::set_permissions(to, fs::Permissions::from_mode(mode)).map_err(failed)
        }
        _ if link => symlink(fs::read_link(from).map_err(failed)?, to).map_err(failed),
        Err(source) => Err(failed(source)),
        // Devices, sockets and pipes are not part of a store.
        Ok(_) => Ok(()),
    }
}

/// Whether the file is one of the kernel's, whose content is another at each reading.
fn is_of_the_kernel(path: &Path) -> bool {
    fs::canonicalize(path).is_ok_and(|path| path.starts_with("/proc") || path.starts_with("/sys"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn etc_is_copied_not_linked() {
        let dir = tempfile::tempdir().unwrap();
        let (root, profile, other) = (dir.path().join("root"), dir.path().join("p"), dir.path().join("o"));
        for folder in [root.join("etc"), root.join("bin"), root.join("usr/bin"), root.join("tmp")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::create_dir_all(profile.join("etc/nix")).unwrap();
        fs::create_dir_all(profile.join("bin")).unwrap();
        fs::write(profile.join("bin/sh"), "").unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("nix.conf"), "sandbox = true").unwrap();
        fs::set_permissions(other.join("nix.conf"), fs::Permissions::from_mode(0o444)).unwrap();
        symlink(other.join("nix.conf"), profile.join("etc/nix/nix.conf")).unwrap();
        symlink("/proc/self/mounts", profile.join("etc/mtab")).unwrap();
        symlink("/gone", profile.join("etc/dangling")).unwrap();
        fs::write(profile.join("etc/hook"), "#!/bin/sh").unwrap();
        fs::set_permissions(profile.join("etc/hook"), fs::Permissions::from_mode(0o555)).unwrap();
        fs::write(profile.join("etc/passwd"), "mine").unwrap();

        populate_in(&root, "builder", Some(&profile)).unwrap();

        let conf = root.join("etc/nix/nix.conf");
        assert!(!conf.is_symlink());
        assert_eq!((fs::read_to_string(&conf).unwrap().as_str(), mode(&conf)), ("sandbox = true", 0o644));
        assert_eq!(mode(&root.join("etc/hook")), 0o755);
        assert_eq!(fs::read_link(root.join("etc/mtab")).unwrap(), Path::new("/proc/self/mounts"));
        assert_eq!(fs::read_link(root.join("etc/dangling")).unwrap(), Path::new("/gone"));
        assert_eq!(fs::read_to_string(root.join("etc/passwd")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(root.join("etc/hostname")).unwrap(), "builder\n");
        assert!(fs::read_to_string(root.join("etc/group")).unwrap().starts_with("root:x:0:"));
        assert_eq!(fs::read_link(root.join("bin/sh")).unwrap(), profile.join("bin/sh"));
        assert!(!root.join("usr/bin/env").exists());
        assert_eq!(mode(&root.join("tmp")), 0o1777);
    }

    #[test]
    fn a_profile_that_links_to_itself_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        fs::create_dir(&etc).unwrap();
        symlink(&etc, etc.join("again")).unwrap();
        let error = copy(&etc, &dir.path().join("to"), 0).unwrap_err();
        assert!(matches!(error, ProfileError::TooDeep(_)), "{error}");
    }
}
