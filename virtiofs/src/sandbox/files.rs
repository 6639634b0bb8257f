//! Landlock: which files may be opened, and no connections anywhere.

use super::SandboxError;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use std::os::fd::BorrowedFd;

/// What every kernel with Landlock can deny. Without it, nothing is served.
const NEEDED: ABI = ABI::V1;

/// The newest that is known. What a kernel cannot deny of it, seccomp does.
const NEWEST: ABI = ABI::V10;

/// A ruleset that denies all that Landlock can deny, but for reading files and directories beneath these.
pub(super) fn only_beneath<'a>(
    directories: impl IntoIterator<Item = BorrowedFd<'a>>,
) -> Result<RulesetCreated, SandboxError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(NEEDED))
        .map_err(|_| SandboxError::NoLandlock)?
        .set_compatibility(CompatLevel::BestEffort);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let with_rules = || -> Result<RulesetCreated, RulesetError> {
        ruleset
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .add_rules(directories.into_iter().map(|fd| Ok::<_, RulesetError>(PathBeneath::new(fd, read))))
    };
    with_rules().map_err(SandboxError::Landlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use landlock::LandlockStatus;
    use nix::{
        errno::Errno,
        sys::{
            signal::kill,
            socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
        },
        unistd::getppid,
    };
    use std::{
        fs::{self, File},
        io,
        net::{TcpListener, TcpStream},
        os::{
            fd::{AsFd, AsRawFd},
            linux::net::SocketAddrExt,
            unix::{
                fs::PermissionsExt,
                net::{SocketAddr, UnixListener},
            },
        },
        path::Path,
        thread,
    };

    fn errno<T>(result: io::Result<T>) -> Option<Errno> {
        result.err().and_then(|error| error.raw_os_error()).map(Errno::from_raw)
    }

    /// What a thread confined to `inside` can do, each as an errno or none. The thread's limits end with it.
    fn try_all(inside: &Path, outside: &Path) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("lair-sandbox-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let connect_abstract = || {
            let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).err()
        };
        let connect_tcp = || errno(TcpStream::connect(port.local_addr().unwrap()));
        assert_eq!((connect_abstract(), connect_tcp(), kill(getppid(), None)), (None, None, Ok(())));

        let directory = File::open(inside).unwrap();
        let status = only_beneath([directory.as_fd()]).unwrap().restrict_self().unwrap();

        assert_eq!(fs::read(inside.join("sub/file")).unwrap(), b"text");
        assert_eq!(fs::read_dir(inside.join("sub")).unwrap().count(), 1);
        let denied = Some(Errno::EACCES);
        assert_eq!(errno(File::open("/etc/passwd")), denied);
        assert_eq!(errno(fs::read(outside.join("file"))), denied);
        assert_eq!(errno(fs::read_dir(outside)), denied);
        assert_eq!(errno(File::options().write(true).open(inside.join("sub/file"))), denied);
        assert_eq!(errno(File::options().write(true).create_new(true).open(inside.join("new"))), denied);
        assert_eq!(errno(fs::create_dir(inside.join("new"))), denied);
        assert_eq!(errno(fs::remove_file(inside.join("sub/file"))), denied);
        assert_eq!(errno(fs::rename(inside.join("sub/file"), inside.join("sub/other"))), denied);
        assert_eq!(errno(std::os::unix::fs::symlink("x", inside.join("new"))), denied);
        assert_eq!(errno(std::process::Command::new("/bin/true").status()), denied);
        assert!(!inside.join("new").exists());

        let LandlockStatus::Available { effective_abi, .. } = status.landlock else { panic!("{status:?}") };
        if effective_abi >= ABI::V4 {
            assert_eq!(connect_tcp(), denied);
            assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), denied);
        } else {
            println!("SKIPPED: TCP, which this kernel's Landlock does not know");
        }
        if effective_abi >= ABI::V6 {
            assert_eq!(connect_abstract(), Some(Errno::EPERM));
            assert_eq!(kill(getppid(), None), Err(Errno::EPERM));
        } else {
            println!("SKIPPED: abstract sockets and signals, which this kernel's Landlock does not know");
        }
    }

    #[test]
    fn files_beneath_are_read_and_all_else_is_denied() {
        let temp = tempfile::tempdir().unwrap();
        let (inside, outside) = (temp.path().join("inside"), temp.path().join("outside"));
        fs::create_dir_all(inside.join("sub")).unwrap();
        fs::create_dir(&outside).unwrap();
        // Open to all, so that only Landlock denies.
        for dir in [&inside, &inside.join("sub"), &outside] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        }
        for file in [inside.join("sub/file"), outside.join("file")] {
            fs::write(&file, "text").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        }
        thread::scope(|scope| scope.spawn(|| try_all(&inside, &outside)).join().unwrap());
    }
}
