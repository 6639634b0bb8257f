//! Hands over to the system's own init, with the agent as units of a systemd that knows nothing of Lair.

use crate::paths::PROGRAM;
use std::{
    convert::Infallible,
    ffi::OsString,
    fs, io,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

/// Why the system's init does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum SystemError {
    #[error("Could not write `{path}`")]
    Unit {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Could not start the system's init `{path}`")]
    Exec {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Units made for one boot; a system without systemd does not look here.
const UNITS: &str = "/run/systemd/system";

/// The agent comes early and depends on nothing, so that a system that hangs half-way can be looked into.
fn agent_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Lair agent\n\
         DefaultDependencies=no\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         Type=exec\n\
         ExecStart={PROGRAM} agent\n\
         Restart=always\n\
         RestartSec=1\n\
         OOMScoreAdjust=-900\n"
    )
}

/// Says once, after everything that the system starts by default, that the guest is up.
fn ready_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Tell the host that this guest is up\n\
         DefaultDependencies=no\n\
         After=default.target lair-agent.service\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart={PROGRAM} ready\n"
    )
}

/// Never returns if it succeeds.
pub(super) fn become_init(init: &str, arguments: &[OsString]) -> Result<Infallible, SystemError> {
    write_units(Path::new(UNITS))?;
    let source = Command::new(init).args(arguments).exec();
    Err(SystemError::Exec { path: init.to_string(), source })
}

fn write_units(folder: &Path) -> Result<(), SystemError> {
    for (name, target, text) in [
        ("lair-agent.service", "sysinit.target", agent_unit()),
        ("lair-ready.service", "default.target", ready_unit()),
    ] {
        let unit = folder.join(name);
        let wants = folder.join(format!("{target}.wants"));
        fs::create_dir_all(&wants)
            .and_then(|()| fs::write(&unit, text))
            .and_then(|()| symlink(Path::new("..").join(name), wants.join(name)))
            .map_err(|source| SystemError::Unit { path: unit, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_wanted_by_the_targets_that_start_them() {
        let dir = tempfile::tempdir().unwrap();
        write_units(dir.path()).unwrap();
        let ready = fs::read_to_string(dir.path().join("default.target.wants/lair-ready.service")).unwrap();
        assert!(ready.contains("ExecStart=/run/lair/lair-guest ready\n"));
        let agent = fs::read_to_string(dir.path().join("sysinit.target.wants/lair-agent.service")).unwrap();
        assert!(agent.contains("ExecStart=/run/lair/lair-guest agent\n"));
    }

    #[test]
    fn a_missing_init_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let init = dir.path().join("none").to_string_lossy().into_owned();
        let source = Command::new(&init).exec();
        let error = SystemError::Exec { path: init.clone(), source };
        assert_eq!(error.to_string(), format!("Could not start the system's init `{init}`"));
    }
}
