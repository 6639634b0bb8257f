//! Credentials that changed on the host while the guest runs: the files are replaced, then what uses them is restarted.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{Agent, report};
use crate::credentials::{self, CredentialError};
use lair_guest::wire::message::{Answer, Credentials};
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::process::Command;

/// How long systemd may take to queue all restarts.
const QUEUED: Duration = Duration::from_secs(5);

/// What is to be restarted because of a credential, by the credential's name.
pub(super) type Restarts = BTreeMap<String, BTreeSet<String>>;

/// Keeps what the host has sent. After a failure the host sends the same again: what is done by then is not done twice.
pub(super) async fn take(agent: &Agent, sent: Credentials) -> Answer {
    let mut undone = agent.undone_restarts.lock().await;
    let kept = keep(agent, &sent, &mut undone);
    // Also where not all was kept: what was replaced is not replaced again.
    let due: BTreeSet<_> = sent.keep.keys().filter_map(|name| undone.get(name)).flatten().cloned().collect();
    let (failed, restarted) = restart_all(agent, &due).await;
    undone.retain(|_, names| {
        names.retain(|name| failed.contains(name) || !due.contains(name));
        !names.is_empty()
    });
    let failures = [kept.map_err(|error| report::chain(&error)), restarted];
    let failures: Vec<_> = failures.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() {
        return Answer::Done;
    }
    let reason = failures.join("; ");
    agent.log.say(&format!("credentials: {reason}"));
    Answer::Failed(reason)
}

/// Replaces and removes files, as many as can be, and notes what is to be restarted; the first failure. Nothing is touched if anything
/// of what was sent is not as it must be.
fn keep(agent: &Agent, sent: &Credentials, undone: &mut Restarts) -> Result<(), CredentialError> {
    sent.remove.iter().try_for_each(|name| credentials::check_name(name))?;
    let decoded = credentials::decode(&sent.keep)?;
    let mut result = Ok(());
    for (name, credential) in decoded {
        match agent.credentials.keep(&name, &credential) {
            Ok(changed) => {
                if changed {
                    agent.log.say(&format!("credential `{name}` was replaced"));
                }
                let before = undone.remove(&name).unwrap_or_default();
                let due = credential.restart.into_iter().filter(|unit| changed || before.contains(unit));
                undone.insert(name, due.collect());
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    for name in &sent.remove {
        undone.remove(name);
        match agent.credentials.remove(name) {
            Ok(true) => agent.log.say(&format!("credential `{name}` was removed")),
            Ok(false) => {}
            Err(error) => result = result.and(Err(error)),
        }
    }
    result
}

/// Restarts what is named; what could not be, and why the first of them.
async fn restart_all(agent: &Agent, names: &BTreeSet<String>) -> (BTreeSet<String>, Result<(), String>) {
    if agent.own_init {
        return restart_units(agent, "systemctl", names).await;
    }
    let unknown: BTreeSet<_> = names.iter().filter(|name| !agent.restart(name)).cloned().collect();
    let all = unknown.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let result = if unknown.is_empty() { Ok(()) } else { Err(format!("there is no service {all}")) };
    (unknown, result)
}

/// Has systemd restart those units that run; the others read the new secret when they start. One by one: it says only of all together
/// that one has failed.
async fn restart_units(
    agent: &Agent,
    systemctl: &str,
    units: &BTreeSet<String>,
) -> (BTreeSet<String>, Result<(), String>) {
    let (mut failed, mut result) = (BTreeSet::new(), Ok(()));
    let begun = Instant::now();
    for unit in units {
        let left = QUEUED.saturating_sub(begun.elapsed());
        if let Err(reason) = restart_unit(agent, systemctl, unit, left).await {
            failed.insert(unit.clone());
            result = result.and(Err(reason));
        }
    }
    (failed, result)
}

async fn restart_unit(agent: &Agent, systemctl: &str, unit: &str, limit: Duration) -> Result<(), String> {
    let mut command = Command::new(systemctl);
    command
        .args(["--no-block", "try-restart", "--", unit])
        .env_clear()
        .envs(agent.environment.iter().cloned())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "systemd did not restart {unit}: {}",
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
        // The same again: what could not be restarted, and nothing that was.
        assert!(matches!(take(&agent, sent("key", "dHdv", &["gone", "web"])).await, Answer::Failed(_)));
        assert!(!asked.has_changed().unwrap());
        assert_eq!(
            take(&agent, sent("key", "dHdv", &["web"])).await,
            Answer::Done,
            "It is not named any more"
        );
        let remove = Credentials { remove: vec!["key".into(), "none".into()], ..Credentials::default() };
        assert_eq!(take(&agent, remove).await, Answer::Done);
        assert_eq!(fs::read_dir(dir.path().join("lair")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_changed_is_restarted_where_not_all_could_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(false);
        agent.credentials = Store::below(dir.path(), false);
        let (web, mut asked) = tokio::sync::watch::channel(0);
        agent.restarts.insert("web".into(), web);
        // In the way of a file, and of a removal.
        let (blocked, old) = (dir.path().join("lair/blocked"), dir.path().join("lair/old"));
        fs::create_dir_all(&blocked).unwrap();
        fs::create_dir_all(&old).unwrap();
        fs::write(dir.path().join("lair/older"), "o").unwrap();
        let mut all = sent("key", "b25l", &["web"]);
        all.keep.extend(sent("blocked", "b25l", &["gone"]).keep);
        all.remove = vec!["old".into(), "older".into()];
        let Answer::Failed(reason) = take(&agent, all.clone()).await else { panic!("done") };
        assert!(reason.contains("lair/blocked") && !reason.contains("gone"), "{reason}");
        assert!(asked.has_changed().unwrap());
        assert!(!dir.path().join("lair/older").exists());
        // Once it can be kept: the one that was missing, and no other.
        asked.mark_unchanged();
        fs::remove_dir(&blocked).unwrap();
        fs::remove_dir(&old).unwrap();
        all.keep.get_mut("blocked").unwrap().restart = vec![];
        assert_eq!(take(&agent, all).await, Answer::Done);
        assert!(blocked.is_file() && !asked.has_changed().unwrap());
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
        let script = "#!/bin/sh\necho \"$*\" >>\"$0.said\"; [ $4 != -x.service ] || { echo no such unit >&2; exit 5; }\n";
        fs::write(&systemctl, script).unwrap();
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
        let units = BTreeSet::from(["-x.service".to_string(), "nginx.service".into()]);
        let (failed, result) = restart_units(&agent(true), systemctl.to_str().unwrap(), &units).await;
        assert_eq!(failed, ["-x.service".to_string()].into());
        assert_eq!(result.unwrap_err(), "systemd did not restart -x.service: no such unit");
        let said = fs::read_to_string(dir.path().join("systemctl.said")).unwrap();
        assert_eq!(said, "--no-block try-restart -- -x.service\n--no-block try-restart -- nginx.service\n");
        let (failed, result) = restart_units(&agent(true), "/nonexistent/systemctl", &units).await;
        let missing = result.unwrap_err();
        assert!(failed == units && missing.contains("could not run"), "{missing}");
    }
}
