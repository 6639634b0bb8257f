//! The end of the host told apart from the end of `laird`, and the order in which VMs end with the host.

use crate::fleet::schema::{Fleet, Target};
use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};
use tokio::{process::Command, time::timeout};

/// How long systemd may take to say what it does.
const ANSWER: Duration = Duration::from_secs(5);

/// How long all VMs together may take to end with the host: less than the 90 s that systemd gives a service by default.
pub const LIMIT: Duration = Duration::from_secs(75);

/// Whether the host shuts down or reboots, as `systemctl` (that program, looked for in PATH unless it has a directory) tells. Without
/// systemd, or if it does not answer, it does not: VMs that run on are lost with the host at worst, but VMs that are ended for nothing
/// are builds lost for nothing.
pub async fn host_stops(systemctl: &Path) -> bool {
    let mut command = Command::new(systemctl);
    command.arg("is-system-running").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    // Its exit status is an error for any state but "running".
    match timeout(ANSWER, command.output()).await {
        Ok(Ok(output)) => output.stdout.trim_ascii() == b"stopping",
        Ok(Err(_)) | Err(_) => false,
    }
}

/// The VMs in the order in which they end: each after all that have a link to it. Those that reach each other in a circle end together.
pub(super) fn waves(fleet: &Fleet, mut left: BTreeSet<String>) -> Vec<BTreeSet<String>> {
    let mut waves = Vec::new();
    while !left.is_empty() {
        let needed = |name: &str| {
            fleet.links.values().any(|link| {
                let from_another = link.from.iter().any(|from| from != name && left.contains(from));
                matches!(&link.to, Target::Vm(target) if target.vm == name) && from_another
            })
        };
        let free: BTreeSet<_> = left.iter().filter(|name| !needed(name)).cloned().collect();
        let wave = if free.is_empty() { left.clone() } else { free };
        left = &left - &wave;
        waves.push(wave);
    }
    waves
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn fleet(links: &[(&str, &str)]) -> Fleet {
        let links: serde_json::Map<_, _> = links
            .iter()
            .enumerate()
            .map(|(index, (from, to))| {
                (format!("l{index}"), serde_json::json!({ "from": [from], "to": { "vm": to, "port": 5 } }))
            })
            .collect();
        let fleet = serde_json::json!({ "schema": 1, "store": { "sources": [] }, "links": links });
        serde_json::from_value(fleet).unwrap()
    }

    fn order(links: &[(&str, &str)], vms: &[&str]) -> Vec<String> {
        let waves = waves(&fleet(links), vms.iter().map(ToString::to_string).collect());
        waves.into_iter().map(|wave| wave.into_iter().collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn sv12_a_vm_ends_after_those_that_reach_it() {
        let links = [("b1", "hydra"), ("b2", "hydra"), ("hydra", "cache"), ("host", "cache"), ("b1", "b1")];
        assert_eq!(
            order(&links, &["b1", "b2", "cache", "hydra", "other"]),
            ["b1 b2 other", "hydra", "cache"]
        );
        assert_eq!(order(&[("a", "b"), ("b", "a"), ("c", "a")], &["a", "b", "c"]), ["c", "a b"]);
        assert_eq!(order(&links, &[]), Vec::<String>::new());
    }

    #[tokio::test]
    async fn sv12_only_systemds_word_means_that_the_host_stops() {
        let directory = tempfile::tempdir().unwrap();
        let systemctl = directory.path().join("systemctl");
        assert!(!host_stops(&systemctl).await, "there is none");
        for (says, stops) in [
            ("echo stopping; exit 1", true),
            ("echo running", false),
            ("echo degraded; exit 1", false),
            ("echo stopping soon", false),
            ("exit 1", false),
        ] {
            fs::write(&systemctl, format!("#!/bin/sh\n[ \"$1\" = is-system-running ] || exit 9\n{says}\n"))
                .unwrap();
            fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
            assert_eq!(host_stops(&systemctl).await, stops, "{says}");
        }
    }
}
