//! Keys made for one run and thrown away with it.

use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// An ssh key pair in files.
#[derive(Debug, Clone)]
pub struct SshKey {
    /// The private key's file; the public key's has `.pub` appended.
    pub private: PathBuf,
    /// The public key: type and base64.
    pub public: String,
}

impl SshKey {
    /// Makes a key pair `NAME` in `directory`.
    pub fn make(directory: &Path, name: &str) -> Result<Self> {
        let private = directory.join(name);
        let status = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&private)
            .stdin(Stdio::null())
            .status()
            .context("Cannot run ssh-keygen (Debian: openssh-client)")?;
        if !status.success() {
            bail!("ssh-keygen failed: {status}");
        }
        let line = fs::read_to_string(private.with_extension("pub"))?;
        let public = line.split_ascii_whitespace().take(2).collect::<Vec<_>>().join(" ");
        Ok(Self { private, public })
    }
}

/// Writes a file that only its owner reads.
pub fn secret(path: &Path, contents: &str) -> Result<PathBuf> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(contents.as_bytes())?;
    Ok(path.to_owned())
}
