//! Where a path of a fleet file is on the host's disk.
//!
//! A path below `/nix/store` is logical: it is looked up in the sources in their order, and so is every symbolic link on the way. Any other
//! path is itself. Nothing is opened, so neither a FIFO nor a device can do anything.

use super::{file, schema::Source};
use nix::unistd::{AccessFlags, access};
use std::{
    collections::VecDeque,
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

const STORE: &str = "/nix/store";

/// As many symbolic links as the kernel follows.
const LINKS_MAX: usize = 40;

/// Why a path leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// It is not absolute.
    #[error("{0} is not an absolute path")]
    Relative(PathBuf),
    /// No source has it.
    #[error("{path} is in none of the sources: {stores}")]
    NotInSources {
        /// What was looked for.
        path: PathBuf,
        /// The store directories that do not have it.
        stores: String,
    },
    /// Something on the way cannot be looked at.
    #[error("{path} cannot be found{}", because(.path, .at))]
    Io {
        /// What was looked for.
        path: PathBuf,
        /// The part of the way, on the host's disk.
        at: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Symbolic links lead round and round.
    #[error("{0} leads through more than {LINKS_MAX} symbolic links")]
    Loop(PathBuf),
    /// A link in a store leads out of it: whoever built that path would choose among the host's files.
    #[error("{path} leads out of the store, to {to}; name that file itself if it is meant")]
    LeavesStore {
        /// What was looked for.
        path: PathBuf,
        /// Where it leads.
        to: PathBuf,
    },
    /// It is something else than is needed.
    #[error("{path} is {found}, not {wanted}")]
    Kind {
        /// What was looked for.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
}

fn because(path: &Path, at: &Path) -> String {
    if path == at { String::new() } else { format!(", because of {}", at.display()) }
}

impl ResolveError {
    /// What the kernel said, if it was the kernel.
    pub(super) fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

/// The regular file that `path` is.
pub fn file(path: &Path, sources: &[Source]) -> Result<PathBuf, ResolveError> {
    of_kind(path, sources, file::REGULAR)
}

/// The directory that `path` is.
pub fn directory(path: &Path, sources: &[Source]) -> Result<PathBuf, ResolveError> {
    of_kind(path, sources, file::DIRECTORY)
}

fn of_kind(path: &Path, sources: &[Source], wanted: &'static str) -> Result<PathBuf, ResolveError> {
    let physical = follow(path, sources)?;
    let found = match fs::symlink_metadata(&physical) {
        Ok(metadata) => file::kind(metadata.mode()),
        Err(source) => return Err(ResolveError::Io { path: path.into(), at: physical, source }),
    };
    if found == wanted { Ok(physical) } else { Err(ResolveError::Kind { path: path.into(), found, wanted }) }
}

/// Whether a source has a database that can be opened without a wait, as a FIFO in its place could not.
pub fn database(source: &Source) -> Result<(), ResolveError> {
    let path = source.database_dir().join("db.sqlite");
    of_host(&path, file::REGULAR)?;
    access(&path, AccessFlags::R_OK).map_err(|errno| ResolveError::Io {
        path: path.clone(),
        at: path.clone(),
        source: errno.into(),
    })
}

/// Whether the host's own `path`, links followed, is what is wanted.
pub(super) fn of_host(path: &Path, wanted: &'static str) -> Result<(), ResolveError> {
    let metadata = fs::metadata(path).map_err(|source| ResolveError::Io {
        path: path.into(),
        at: path.into(),
        source,
    })?;
    let found = file::kind(metadata.mode());
    if found == wanted { Ok(()) } else { Err(ResolveError::Kind { path: path.into(), found, wanted }) }
}

fn in_store(path: &Path) -> bool {
    path != Path::new(STORE) && path.starts_with(STORE)
}

/// Goes along `path` step by step, following links as a process would for which the sources are `/nix/store`.
fn follow(path: &Path, sources: &[Source]) -> Result<PathBuf, ResolveError> {
    if !path.is_absolute() {
        return Err(ResolveError::Relative(path.into()));
    }
    let mut ahead: VecDeque<OsString> = steps(path);
    let mut logical = PathBuf::from("/");
    let mut physical = logical.clone();
    let mut links = 0_usize;
    while let Some(step) = ahead.pop_front() {
        let before = logical.clone();
        if step == ".." {
            logical.pop();
        } else {
            logical.push(step);
        }
        // These two need not exist on the host: the sources stand for them.
        if Path::new(STORE).starts_with(&logical) {
            physical = logical.clone();
            continue;
        }
        physical = locate(&logical, path, sources)?;
        let failed = |source| ResolveError::Io { path: path.into(), at: physical.clone(), source };
        if !fs::symlink_metadata(&physical).map_err(failed)?.is_symlink() {
            continue;
        }
        links = links.saturating_add(1);
        if links > LINKS_MAX {
            return Err(ResolveError::Loop(path.into()));
        }
        let target = fs::read_link(&physical).map_err(failed)?;
        logical = if target.is_absolute() { "/".into() } else { before };
        let mut steps = steps(&target);
        steps.append(&mut ahead);
        ahead = steps;
    }
    if in_store(path) && !in_store(&logical) {
        return Err(ResolveError::LeavesStore { path: path.into(), to: logical });
    }
    Ok(physical)
}

fn steps(path: &Path) -> VecDeque<OsString> {
    let step = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(step).collect()
}

fn locate(logical: &Path, path: &Path, sources: &[Source]) -> Result<PathBuf, ResolveError> {
    let Ok(inside) = logical.strip_prefix(STORE) else { return Ok(logical.into()) };
    let Some(name) = inside.components().next() else { return Ok(logical.into()) };
    let has = |store: &&PathBuf| fs::symlink_metadata(store.join(name)).is_ok();
    let stores: Vec<PathBuf> = sources.iter().map(Source::store_dir).collect();
    if let Some(store) = stores.iter().find(has) {
        return Ok(store.join(inside));
    }
    let stores: Vec<String> = stores.iter().map(|store| store.display().to_string()).collect();
    Err(ResolveError::NotInSources { path: path.into(), stores: stores.join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::schema::RootSource;
    use std::os::unix::fs::symlink;

    const A: &str = "0123456789abcdfghijklmnpqrsvwxyz-a";
    const B: &str = "1123456789abcdfghijklmnpqrsvwxyz-b";

    /// Two chroot stores: `A` in the first, `B` in the second, with links of all sorts.
    fn stores(directory: &Path) -> Vec<Source> {
        let store = |name: &str| directory.join(name).join("nix/store");
        fs::create_dir_all(store("one").join(A).join("boot/deep")).unwrap();
        fs::create_dir_all(store("two").join(B)).unwrap();
        let (a, b) = (store("one").join(A), store("two").join(B));
        fs::write(a.join("boot/real"), "kernel").unwrap();
        fs::write(b.join("kernel"), "kernel").unwrap();
        fs::write(directory.join("host-kernel"), "kernel").unwrap();
        symlink("boot/deep/../real", a.join("relative")).unwrap();
        symlink(format!("/nix/store/{B}/kernel"), a.join("absolute")).unwrap();
        symlink(format!("../{B}/kernel"), a.join("across")).unwrap();
        symlink("../../../../../../../../etc/passwd", a.join("up-and-out")).unwrap();
        symlink("/etc/passwd", a.join("out")).unwrap();
        symlink("loop", a.join("loop")).unwrap();
        symlink("nothing", a.join("dangling")).unwrap();
        symlink(".", a.join("self")).unwrap();
        nix::unistd::mkfifo(&a.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        symlink("/nix/store", directory.join("to-store")).unwrap();
        ["one", "two"].map(|name| Source::Root(RootSource { root: directory.join(name) })).into()
    }

    #[test]
    fn cf6_store_paths_are_looked_up_in_the_sources() {
        let directory = tempfile::tempdir().unwrap();
        let sources = stores(directory.path());
        let (a, b) =
            (directory.path().join("one/nix/store").join(A), directory.path().join("two/nix/store").join(B));
        let host = directory.path().join("host-kernel");
        for (path, expected) in [
            (format!("/nix/store/{A}/boot/real"), a.join("boot/real")),
            (format!("/nix/store/{A}/relative"), a.join("boot/real")),
            (format!("/nix/store/{A}/self/self/relative"), a.join("boot/real")),
            (format!("/nix/store/{B}/kernel"), b.join("kernel")),
            (format!("/nix/store/{A}/absolute"), b.join("kernel")),
            (format!("/nix/store/{A}/across"), b.join("kernel")),
            (
                directory.path().join("to-store").join(B).join("kernel").display().to_string(),
                b.join("kernel"),
            ),
            (host.display().to_string(), host.clone()),
        ] {
            assert_eq!(file(Path::new(&path), &sources).unwrap(), expected, "{path}");
        }
        assert_eq!(
            self::directory(Path::new(&format!("/nix/store/{A}/boot")), &sources).unwrap(),
            a.join("boot")
        );
    }

    #[test]
    fn cf6_paths_that_lead_nowhere_good_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let sources = stores(directory.path());
        let said = |path: &str| {
            let error = file(Path::new(&path.replace("A/", &format!("{A}/"))), &sources).unwrap_err();
            let cause =
                std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}").replace(&directory.path().display().to_string(), "DIR").replace(A, "A")
        };
        let paths = [
            "relative/path",
            "/nix/store/A/loop",
            "/nix/store/A/dangling",
            "/nix/store/A/absent",
            "/nix/store/A/boot/real/below-a-file",
            "/nix/store/A/boot",
            "/nix/store/A/fifo",
            "/nix/store/A/out",
            "/nix/store/A/up-and-out",
            "/nix/store/0000-absent/kernel",
            "/dev/null",
        ];
        let said: Vec<String> = paths.into_iter().map(said).collect();
        insta::assert_snapshot!(said.join("\n"), @r"
        relative/path is not an absolute path
        /nix/store/A/loop leads through more than 40 symbolic links
        /nix/store/A/dangling cannot be found, because of DIR/one/nix/store/A/nothing: No such file or directory (os error 2)
        /nix/store/A/absent cannot be found, because of DIR/one/nix/store/A/absent: No such file or directory (os error 2)
        /nix/store/A/boot/real/below-a-file cannot be found, because of DIR/one/nix/store/A/boot/real/below-a-file: Not a directory (os error 20)
        /nix/store/A/boot is a directory, not a regular file
        /nix/store/A/fifo is a FIFO, not a regular file
        /nix/store/A/out leads out of the store, to /etc/passwd; name that file itself if it is meant
        /nix/store/A/up-and-out leads out of the store, to /etc/passwd; name that file itself if it is meant
        /nix/store/0000-absent/kernel is in none of the sources: DIR/one/nix/store, DIR/two/nix/store
        /dev/null is a device, not a regular file
        ");
    }
}
