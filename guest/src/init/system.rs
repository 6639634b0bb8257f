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

/// Targets that every system passes on its way up, for the boot trace; the default one is told by [`ready_unit`].
const TARGETS: [&str; 3] = ["sysinit", "basic", "multi-user"];

/// Notes that systemd has reached the target which the instance names. Without default dependencies it is ordered after the target
/// and holds up nothing.
fn reached_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Note that %i.target is reached\n\
         DefaultDependencies=no\n\
         After=%i.target\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart={PROGRAM} reached %i\n"
    )
}

/// Never returns if it succeeds.
pub(super) fn become_init(init: &str, arguments: &[OsString]) -> Result<Infallible, SystemError> {
    write_units(Path::new(UNITS))?;
    let source = Command::new(init).args(arguments).exec();
    Err(SystemError::Exec { path: init.to_string(), source })
}

fn write_units(folder: &Path) -> Result<(), SystemError> {
    write_unit(folder, "lair-agent.service", agent_unit(), &[("lair-agent.service", "sysinit.target")])?;
    write_unit(folder, "lair-ready.service", ready_unit(), &[("lair-ready.service", "default.target")])?;
    let instances = TARGETS.map(|name| (format!("lair-reached@{name}.service"), format!("{name}.target")));
    let instances = instances.each_ref().map(|(instance, target)| (instance.as_str(), target.as_str()));
    write_unit(folder, "lair-reached@.service", reached_unit(), &instances)
}

/// Writes a unit, and has targets start it, or instances of it.
fn write_unit(folder: &Path, name: &str, text: String, wanted: &[(&str, &str)]) -> Result<(), SystemError> {
    let unit = folder.join(name);
    let write = || {
        fs::create_dir_all(folder)?;
        fs::write(&unit, text)?;
        for (instance, target) in wanted {
            let wants = folder.join(format!("{target}.wants"));
            fs::create_dir_all(&wants)?;
            symlink(Path::new("..").join(name), wants.join(instance))?;
        }
        Ok(())
    };
    write().map_err(|source| SystemError::Unit { path: unit.clone(), source })
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
        for target in TARGETS {
            let reached = format!("{target}.target.wants/lair-reached@{target}.service");
            let reached = fs::read_to_string(dir.path().join(reached)).unwrap();
            assert!(reached.contains("After=%i.target\n"));
            assert!(reached.contains("ExecStart=/run/lair/lair-guest reached %i\n"));
        }
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
