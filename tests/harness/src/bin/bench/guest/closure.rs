//! The closure that the guest mounts: a directory that holds nothing else, a view of it, and an image of it.

use crate::backends::Files;
use anyhow::{Context, Result, bail, ensure};
use lair_harness::testbed::Testbed;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What it is the closure of, in the test bed: programs with many libraries, and some thousand small files.
const ROOTS: [&str; 2] = ["profile-builder", "big"];

/// Left out, with what refers to it: mkfs.erofs 1.5 fails on a name of 255 bytes.
const LEFT_OUT: [&str; 2] = ["-odd", "-big"];

/// A closure on the host.
pub(super) struct Closure {
    /// A store directory with these store paths and no other.
    pub(super) files: Files,
    /// An EROFS image of the store directory, not compressed.
    pub(super) image: PathBuf,
    pub(super) store_paths: usize,
}

impl Closure {
    /// Makes it below `cache`, unless it is there already.
    pub(super) fn make(testbed: &Testbed, cache: &Path) -> Result<Self> {
        let roots = ROOTS.iter().map(|name| testbed.path(name)).collect::<Result<Vec<_>>>()?;
        let listed = testbed.nix("nix-store", &[&["--query", "--requisites"], roots.as_slice()].concat())?;
        let left_out = |path: &&str| LEFT_OUT.iter().any(|ending| path.ends_with(ending));
        let mut paths: Vec<_> = listed.lines().filter(|path| !left_out(path)).collect();
        paths.sort_unstable();
        ensure!(paths.len() > 10, "The closure of {roots:?} has {} store paths", paths.len());
        let closure = Self {
            files: Files {
                store: cache.join("closure"),
                view: cache.join("closure.view"),
                index: cache.join("closure.index"),
            },
            image: cache.join("closure.erofs"),
            store_paths: paths.len(),
        };
        let text: String = paths.iter().map(|path| format!("{path}\n")).collect();
        if fs::read_to_string(&closure.files.view).is_ok_and(|there| there == text) {
            return Ok(closure);
        }
        for old in [&closure.files.view, &closure.image] {
            match fs::remove_file(old) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("Cannot remove the old {}", old.display()));
                }
                _ => {}
            }
        }
        if closure.files.store.exists() {
            // Directories of a store are read only.
            run(Command::new("chmod").args(["-R", "u+w"]).arg(&closure.files.store))?;
            fs::remove_dir_all(&closure.files.store)?;
        }
        fs::create_dir_all(&closure.files.store)?;
        let physical = paths.iter().map(|path| testbed.physical(path));
        run(Command::new("cp").args(["--archive", "--"]).args(physical).arg(&closure.files.store))?;
        run(Command::new("mkfs.erofs")
            .args(["--all-root", "-T1"])
            .arg(&closure.image)
            .arg(&closure.files.store))?;
        // Last, as what says that the others are whole.
        fs::write(&closure.files.view, text)?;
        Ok(closure)
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.env("PATH", path()).output();
    let output = output.with_context(|| format!("Cannot run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        let name = command.get_program().to_string_lossy();
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Also where the programs that only root has in PATH are.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
