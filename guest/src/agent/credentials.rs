//! Credentials that changed on the host while the guest runs: the files are replaced, then what uses them is restarted.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{Agent, report};
use crate::credentials::{self, CredentialError};
use lair_guest::wire::message::{Answer, Credentials};
use std::{collections::BTreeSet, process::Stdio, time::Duration};
use tokio::process::Command;

/// How long systemd may take to queue the restarts.
const QUEUED: Duration = Duration::from_secs(5);

/// Keeps what the host has sent.
pub(super) async fn take(agent: &Agent, sent: Credentials) -> Answer {
    let restart = match keep(agent, &sent) {
        Ok(restart) => restart,
        Err(error) => {
            let reason = report::chain(&error);
            agent.log.say(&format!("credentials: {reason}"));
            return Answer::Failed(reason);
        }
    };
    match restart_all(agent, &restart).await {
        Ok(()) => Answer::Done,
        Err(reason) => {
            agent.log.say(&format!("credentials: {reason}"));
            Answer::Failed(reason)
        }
    }
}

/// Replaces and removes files; what is to be restarted because of it. Nothing is touched if anything is not as it must be.
fn keep(agent: &Agent, sent: &Credentials) -> Result<BTreeSet<String>, CredentialError> {
    let credentials = credentials::decode(&sent.keep)?;
    let mut restart = BTreeSet::new();
    for (name, credential) in credentials {
        if agent.credentials.keep(&name, &credential)? {
            agent.log.say(&format!("credential `{name}` was replaced"));
            restart.extend(credential.restart);
        }
    }
    for name in &sent.remove {
        if agent.credentials.remove(name)? {
            agent.log.say(&format!("credential `{name}` was removed"));
        }
    }
    Ok(restart)
}

async fn restart_all(agent: &Agent, names: &BTreeSet<String>) -> Result<(), String> {
    if names.is_empty() {
        return Ok(());
    }
    if agent.own_init {
        return restart_units(agent, "systemctl", names).await;
    }
    let unknown: Vec<_> = names.iter().filter(|name| !agent.restart(name)).map(String::as_str).collect();
    if unknown.is_empty() { Ok(()) } else { Err(format!("there is no service {}", unknown.join(", "))) }
}

/// Has systemd restart those units that run; the others read the new secret when they start.
async fn restart_units(agent: &Agent, systemctl: &str, units: &BTreeSet<String>) -> Result<(), String> {
    let mut command = Command::new(systemctl);
    command
        .args(["--no-block", "try-restart", "--"])
        .args(units)
        .env_clear()
        .envs(agent.environment.iter().cloned())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    match tokio::time::timeout(QUEUED, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "systemd did not restart the units: {}",
                said.trim_end().chars().take(500).collect::<String>()
            ))
        }
        Ok(Err(error)) => Err(format!("could not run `{systemctl}`: {error}")),
        Err(_) => Err(format!("`{systemctl}` did not end within {} s", QUEUED.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agent;
    use super::*;
    use crate::credentials::Store;
    use lair_guest::wire::message::{Credential, Secret};
    use std::{fs, os::unix::fs::PermissionsExt};

    fn sent(name: &str, value: &str, restart: &[&str]) -> Credentials {
        let restart = restart.iter().map(|unit| unit.to_string()).collect();
        let credential = Credential { value: Secret(value.into()), restart };
        Credentials { keep: [(name.to_string(), credential)].into(), remove: vec![] }
    }

    #[tokio::test]
    async fn a_change_restarts_what_is_named_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(false);
        agent.credentials = Store::below(dir.path(), false);
        let (web, mut asked) = tokio::sync::watch::channel(0);
        agent.restarts.insert("web".into(), web);
        assert_eq!(take(&agent, sent("key", "b25l", &["web"])).await, Answer::Done);
        assert!(asked.has_changed().unwrap());
        asked.mark_unchanged();
        assert_eq!(take(&agent, sent("key", "b25l", &["web"])).await, Answer::Done);
        assert!(!asked.has_changed().unwrap(), "The secret is as it was");
        assert_eq!(
            take(&agent, sent("key", "dHdv", &["gone"])).await,
            Answer::Failed("there is no service gone".into())
        );
        assert_eq!(fs::read(dir.path().join("lair/key")).unwrap(), b"two");
        assert!(!asked.has_changed().unwrap());
        let remove = Credentials { remove: vec!["key".into(), "none".into()], ..Credentials::default() };
        assert_eq!(take(&agent, remove).await, Answer::Done);
        assert_eq!(fs::read_dir(dir.path().join("lair")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn vs4_credentials_that_are_none_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(false);
        agent.credentials = Store::below(dir.path(), false);
        for bad in [sent("../etc/passwd", "b25l", &[]), sent("key", "no base64", &[])] {
            let Answer::Failed(reason) = take(&agent, bad).await else { panic!("taken") };
            assert!(!reason.contains("no base64"), "{reason}");
        }
        let escape = Credentials { remove: vec!["../x".into()], ..Credentials::default() };
        assert!(matches!(take(&agent, escape).await, Answer::Failed(_)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn units_are_restarted_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let systemctl = dir.path().join("systemctl");
        fs::write(&systemctl, "#!/bin/sh\necho \"$*\" >>\"$0.said\"; echo no such unit >&2; exit 5\n")
            .unwrap();
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
        let units = BTreeSet::from(["-x.service".to_string(), "nginx.service".into()]);
        let failed = restart_units(&agent(true), systemctl.to_str().unwrap(), &units).await.unwrap_err();
        assert_eq!(failed, "systemd did not restart the units: no such unit");
        let said = fs::read_to_string(dir.path().join("systemctl.said")).unwrap();
        assert_eq!(said, "--no-block try-restart -- -x.service nginx.service\n");
        let missing = restart_units(&agent(true), "/nonexistent/systemctl", &units).await.unwrap_err();
        assert!(missing.contains("could not run"), "{missing}");
    }
}
