//! The guests' contents that `tests/prepare` made: kernel, closures, a Nix for the host.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

/// What `tests/prepare` wrote down.
#[derive(Debug, Clone, Deserialize)]
pub struct Testbed {
    /// The root of a chroot store.
    pub store_root: PathBuf,
    /// The directory of a Nix that runs on the host.
    pub nix: PathBuf,
    /// The kernel image, a logical store path.
    pub kernel: String,
    /// The directory of its modules, a logical store path.
    pub modules: String,
    /// Logical store paths by name.
    pub paths: BTreeMap<String, String>,
}

impl Testbed {
    /// The test bed that `LAIR_TESTBED` names; `None`, with the reason on stderr, if there is none.
    pub fn find() -> Result<Option<Self>> {
        let Some(file) = std::env::var_os("LAIR_TESTBED") else {
            eprintln!("SKIPPED: LAIR_TESTBED is not set; tests/run prepares the guests and sets it");
            return Ok(None);
        };
        Self::read(Path::new(&file)).map(Some)
    }

    /// Reads `testbed.json`.
    pub fn read(file: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("Cannot read {}", file.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not what tests/prepare writes", file.display()))
    }

    /// The logical store path of `name`.
    pub fn path(&self, name: &str) -> Result<&str> {
        let path = self.paths.get(name).with_context(|| format!("The test bed has no path called {name}"))?;
        Ok(path)
    }

    /// Where a logical store path is on the host.
    pub fn physical(&self, logical: &str) -> PathBuf {
        self.store_root.join(logical.trim_start_matches('/'))
    }

    /// Runs a program of the test bed's Nix on the test bed's store; returns its standard output.
    pub fn nix(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new(self.nix.join(program))
            .arg("--store")
            .arg(&self.store_root)
            .args(arguments)
            .env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command\nsubstituters =\nbuild-hook =\nsandbox-paths =\n")
            .output()
            .with_context(|| format!("Cannot run {program} of the test bed"))?;
        if !output.status.success() {
            bail!("{program} {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
