//! Where things are: one directory for state that lasts, one for what ends with this boot.

use std::{
    env, fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// The longest path of a unix socket in bytes: `sun_path` less its final NUL.
pub const SOCKET_PATH_MAX: usize = 107;

/// The longest name of a socket below [`VmDirs::run`], with the `/` before it.
const LONGEST_SOCKET: usize = "/device/vsock_4294967295".len();

/// `laird`'s two directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Volumes, generations, logs.
    pub state: PathBuf,
    /// Sockets and runtime state.
    pub run: PathBuf,
}

/// One VM's directories.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDirs {
    /// Volumes and logs.
    pub state: PathBuf,
    /// Sockets and runtime state.
    pub run: PathBuf,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirsError {
    /// It could not be made, or belongs to somebody else.
    #[error("Cannot use the directory {0}")]
    Io(PathBuf, #[source] io::Error),
    /// It could not be named to the programs that need it.
    #[error("The directory {0:?} has a control character in its name, or is not UTF-8; choose another")]
    Name(PathBuf),
    /// A unix socket below it would have too long a path.
    #[error(
        "The run directory {run} is too long for the sockets of VM {vm}: {length} bytes, at most {SOCKET_PATH_MAX}; choose a shorter --run-dir"
    )]
    TooLong {
        /// The run directory.
        run: PathBuf,
        /// The VM.
        vm: String,
        /// How long the longest path would be.
        length: usize,
    },
}

fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

fn home() -> PathBuf {
    variable("HOME").unwrap_or_else(|| "/".into())
}

/// Whether this process is root, and so uses the host's own directories.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

impl Dirs {
    /// The host's own for root, those of the XDG specification for anybody else.
    pub fn default_state() -> PathBuf {
        if is_root() {
            return "/var/lib/lair".into();
        }
        variable("XDG_STATE_HOME").unwrap_or_else(|| home().join(".local/state")).join("lair")
    }

    /// Like [`Self::default_state`], for what ends with this boot.
    pub fn default_run() -> PathBuf {
        if is_root() {
            return "/run/lair".into();
        }
        let run = variable("XDG_RUNTIME_DIR").map(|directory| directory.join("lair"));
        run.unwrap_or_else(|| format!("/tmp/lair-{}", nix::unistd::geteuid()).into())
    }

    /// The fleet file that `laird` reads unless told otherwise.
    pub fn default_fleet() -> PathBuf {
        if is_root() {
            return "/etc/lair/fleet.json".into();
        }
        variable("XDG_CONFIG_HOME").unwrap_or_else(|| home().join(".config")).join("lair/fleet.json")
    }

    /// The socket of `laird`'s API.
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("laird.sock")
    }

    /// Where views are kept.
    pub fn generations(&self) -> PathBuf {
        self.state.join("generations")
    }

    /// The metadata of store paths, which all store backends share.
    pub fn index(&self) -> PathBuf {
        self.state.join("index")
    }

    /// Where `laird` records who asked for what.
    pub fn audit_log(&self) -> PathBuf {
        self.state.join("audit.jsonl")
    }

    /// The directories of one VM.
    pub fn vm(&self, name: &str) -> Result<VmDirs, DirsError> {
        let run = self.run.join("vms").join(name);
        let length = run.as_os_str().len().saturating_add(LONGEST_SOCKET);
        if length > SOCKET_PATH_MAX {
            return Err(DirsError::TooLong { run: self.run.clone(), vm: name.into(), length });
        }
        Ok(VmDirs { state: self.state.join("vms").join(name), run })
    }

    /// Makes both, for this user only but for the way to the API socket.
    pub fn create(&self) -> Result<(), DirsError> {
        for directory in [&self.state, &self.run] {
            if directory.to_str().is_none_or(|name| name.contains(char::is_control)) {
                return Err(DirsError::Name(directory.clone()));
            }
        }
        create(&self.state, 0o750)?;
        create(&self.run, 0o755)?;
        create(&self.run.join("vms"), 0o755)
    }
}

impl VmDirs {
    /// Makes all of them.
    pub fn create(&self) -> Result<(), DirsError> {
        create(&self.state, 0o750)?;
        create(&self.run, 0o755)?;
        [self.hypervisor(), self.device()].iter().try_for_each(|path| make(path, 0o750))
    }

    /// The runtime state: what runs, in this boot.
    pub fn record(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// What is wanted of it and what it has been through, which lasts.
    pub fn lasting(&self) -> PathBuf {
        self.state.join("life.json")
    }

    /// A log in the lasting directory.
    pub fn log(&self, name: &str) -> PathBuf {
        self.state.join(format!("{name}.log"))
    }

    /// The image of a volume.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.state.join(format!("{name}.img"))
    }

    /// Where the hypervisor makes its sockets. Nobody else of the VM may enter: who speaks to it rules the VM.
    pub fn hypervisor(&self) -> PathBuf {
        self.run.join("hypervisor")
    }

    /// Where the vsock device makes its sockets, and the shim the one that the device connects to.
    pub fn device(&self) -> PathBuf {
        self.run.join("device")
    }

    /// A socket.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }
}

/// Makes a directory, which may be somebody else's, in one of ours.
fn make(path: &Path, mode: u32) -> Result<(), DirsError> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(DirsError::Io(path.to_owned(), error))
        }
        _ => Ok(()),
    }
}

/// Gives a directory or a file that is no link a user, a group and rights.
pub fn give(path: &Path, uid: u32, gid: u32, mode: u32) -> Result<(), DirsError> {
    let failed = |e| DirsError::Io(path.to_owned(), e);
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(failed)?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)
}

/// Makes a directory and those above it, if they are missing, and checks that nobody else can write to it.
pub fn create(path: &Path, mode: u32) -> Result<(), DirsError> {
    let failed = |e| DirsError::Io(path.to_owned(), e);
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
    // Through a descriptor that follows no link, so that what is checked is what is used.
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let ours = std::os::unix::fs::MetadataExt::uid(&metadata) == nix::unistd::geteuid().as_raw();
    if !metadata.is_dir() || !ours || metadata.permissions().mode() & 0o002 != 0 {
        let reason = "it is not a directory of this user's that only it can write to";
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, reason)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_directory_is_refused_with_its_length() {
        let dirs = Dirs { state: "/s".into(), run: format!("/{}", "r".repeat(80)).into() };
        assert_eq!(
            dirs.vm("builder").unwrap_err().to_string().split("VM").nth(1).unwrap(),
            " builder: 117 bytes, at most 107; choose a shorter --run-dir"
        );
        let dirs = Dirs { state: "/s".into(), run: "/run/lair".into() };
        assert_eq!(dirs.vm("builder").unwrap().socket("vsock"), Path::new("/run/lair/vms/builder/vsock"));
    }

    #[test]
    fn cf12_a_directory_that_cannot_be_named_is_not_made() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
        let parent = tempfile::tempdir().unwrap();
        for name in [&b"a\nb"[..], b"a\x1bb", b"a\xffb"] {
            let odd = parent.path().join(OsStr::from_bytes(name));
            let even = parent.path().join("even");
            for dirs in [
                Dirs { state: odd.clone(), run: even.clone() },
                Dirs { state: even.clone(), run: odd.clone() },
            ] {
                assert!(matches!(dirs.create(), Err(DirsError::Name(_))), "{name:?}");
            }
        }
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        // All others are passed on whole.
        let name = parent.path().join("a,b=c d:%");
        Dirs { state: name.clone(), run: name }.create().unwrap();
    }

    #[test]
    fn sv3_a_directory_that_others_can_write_to_or_a_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = directory.path().join("open");
        create(&open, 0o755).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create(&open, 0o755).is_err());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert!(create(&link, 0o755).is_err());
    }
}
