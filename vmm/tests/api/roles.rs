//! Who may do what. Only root can be somebody else.

use crate::support::*;
use nix::unistd::{Gid, geteuid, setgid, setgroups, setuid};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Output};
use tokio::time::timeout;

/// Roles for groups of these numbers, whoever has them.
const ACCESS: &str =
    "[access]\nview = [\"@64001\"]\noperate = [\"@64002\", \"64102\"]\nadminister = [\"@64003\"]\n";

/// Lets everybody reach the socket, and run `vmctl`.
fn open_to_all(host: &Host, socket_mode: u32) {
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(&host.path(""), 0o755);
    mode(&host.dirs().run, 0o755);
    mode(&host.dirs().api_socket(), socket_mode);
    fs::copy(env!("CARGO_BIN_EXE_vmctl"), host.path("vmctl")).unwrap();
    mode(&host.path("vmctl"), 0o755);
}

/// Runs `vmctl` as another user. Without other groups: the standard library gives them up with the uid.
async fn as_user(host: &Host, uid: u32, gid: u32, arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(host.path("vmctl"));
    command.arg("--socket").arg(host.dirs().api_socket()).args(arguments).uid(uid).gid(gid).current_dir("/");
    timeout(LIMIT, command.output()).await.expect("vmctl does not end").unwrap()
}

#[tokio::test]
async fn cl3_each_verb_needs_its_role_and_every_refusal_is_recorded() {
    if !geteuid().is_root() {
        return eprintln!("SKIPPED: roles, because only root can be another user");
    }
    let host = Host::new().with_source().without(lair_vmm::host::tools::QEMU);
    let fleet = asked_for(&host.fleet(&[("a", 64)])) + ACCESS;
    let client = host.serve(&fleet).await;
    open_to_all(&host, 0o666);
    let status = client.status().await.unwrap();
    // The exit status of each verb for nobody, view, operate, administer: 3 is not permitted. A start is permitted, and refused for want
    // of QEMU.
    let verbs: [(&[&str], [i32; 4]); 14] = [
        (&["status"], [3, 0, 0, 0]),
        (&["status", "a"], [3, 0, 0, 0]),
        (&["logs", "a"], [3, 0, 0, 0]),
        (&["events"], [3, 0, 0, 0]),
        (&["metrics"], [3, 0, 0, 0]),
        (&["gpu", "list"], [3, 0, 0, 0]),
        (&["gpu", "show", "0000:01:00.0"], [3, 4, 4, 4]),
        (&["start", "a"], [3, 3, 1, 1]),
        (&["stop", "a"], [3, 3, 1, 1]),
        (&["restart", "a"], [3, 3, 1, 1]),
        (&["kill", "a"], [3, 3, 1, 1]),
        (&["connect", "a:22"], [3, 3, 1, 1]),
        (&["audit"], [3, 3, 3, 0]),
        (&["apply", "--dry-run"], [3, 3, 3, 0]),
    ];
    for (verb, statuses) in verbs {
        for (gid, expected) in (64000..).zip(statuses) {
            let before = host.audit().len();
            // Of one user, so many refusals in a second would share a record.
            let uid = gid + 200;
            let output = as_user(&host, uid, gid, verb).await;
            assert_eq!(output.status.code(), Some(expected), "{verb:?} of group {gid}: {output:?}");
            if expected == 3 {
                let recorded = host.audit();
                assert_eq!(recorded.len(), before + 1, "{verb:?} of group {gid}");
                let attempt = recorded.last().unwrap();
                assert_eq!((&attempt["uid"], &attempt["gid"]), (&uid.into(), &gid.into()));
                assert_eq!(
                    (&attempt["verb"], &attempt["verdict"]),
                    (&verb[0].replace("connect", "session").into(), &"refused".into())
                );
                let role = ["", "view", "operate"][usize::try_from(gid - 64000).unwrap()];
                assert_eq!(attempt["role"].as_str().unwrap_or_default(), role);
            }
        }
    }
    assert_eq!(client.status().await.unwrap(), status);
    // A user by its own number, and root whatever its groups.
    assert_eq!(as_user(&host, 64102, 64000, &["start", "a"]).await.status.code(), Some(1));
    assert_eq!(as_user(&host, 0, 64000, &["audit"]).await.status.code(), Some(0));
    let text = String::from_utf8(as_user(&host, 64000, 64001, &["start", "a"]).await.stderr).unwrap();
    insta::assert_snapshot!(text);
    let text = String::from_utf8(as_user(&host, 64000, 64000, &["--json", "status"]).await.stderr).unwrap();
    insta::assert_snapshot!(text);

    // Another fleet gives other roles, at once.
    fs::write(host.path("fleet.toml"), fleet.replace("@64001", "@64009")).unwrap();
    assert_eq!(host.vmctl(&["apply"]).await.status.code(), Some(0));
    assert_eq!(as_user(&host, 64000, 64001, &["status"]).await.status.code(), Some(3));
    assert_eq!(as_user(&host, 64000, 64009, &["status"]).await.status.code(), Some(0));
}

/// Runs `vmctl` as a user with these other groups.
#[allow(unsafe_code)]
async fn in_groups(host: &Host, groups: &[u32], arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(host.path("vmctl"));
    command.arg("--socket").arg(host.dirs().api_socket()).args(arguments).current_dir("/");
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    let become_it = move || {
        setgroups(&groups)?;
        setgid(64000.into())?;
        Ok(setuid(64000.into())?)
    };
    // SAFETY: these are system calls, and allocate nothing.
    unsafe { command.pre_exec(become_it) };
    timeout(LIMIT, command.output()).await.expect("vmctl does not end").unwrap()
}

#[tokio::test]
async fn cl3_a_role_may_come_from_any_of_many_groups() {
    if !geteuid().is_root() {
        return eprintln!("SKIPPED: groups, because only root can be in others");
    }
    let host = Host::new();
    host.serve(&(host.fleet(&[]) + ACCESS)).await;
    open_to_all(&host, 0o666);
    // More than are asked for at first.
    let mut groups: Vec<u32> = (65000..65100).collect();
    assert_eq!(in_groups(&host, &groups, &["status"]).await.status.code(), Some(3));
    groups.insert(70, 64001);
    assert_eq!(in_groups(&host, &groups, &["status"]).await.status.code(), Some(0));
    assert_eq!(in_groups(&host, &[64003], &["audit"]).await.status.code(), Some(0));
}

#[tokio::test]
async fn cl3_who_is_not_in_the_group_of_the_socket_is_refused_by_the_kernel() {
    if !geteuid().is_root() {
        return eprintln!("SKIPPED: access to the socket, because only root can be another user");
    }
    let host = Host::new();
    host.serve(&(host.fleet(&[]) + ACCESS)).await;
    open_to_all(&host, 0o660);
    nix::unistd::chown(&host.dirs().api_socket(), None, Some(64001.into())).unwrap();
    let output = as_user(&host, 64000, 64000, &["status"]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text.starts_with("vmctl: No access to ") && text.contains("join the group"), "{text}");
    assert!(host.audit().is_empty());
    assert_eq!(as_user(&host, 64000, 64001, &["status"]).await.status.code(), Some(0));
}

#[tokio::test]
async fn cl2_a_laird_that_is_down_is_told_with_what_to_do() {
    let host = Host::new();
    let socket = host.dirs().api_socket();
    let output = host.vmctl(&["status"]).await;
    assert_eq!(output.status.code(), Some(1));
    let missing = String::from_utf8(output.stderr).unwrap();
    // A socket that a killed `laird` left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let stale = String::from_utf8(host.vmctl(&["status"]).await.stderr).unwrap();
    assert_eq!(missing, stale);
    insta::assert_snapshot!(missing.replace(&host.path("").display().to_string(), "DIR/"));
    let output = host.vmctl(&["--json", "start", "a"]).await;
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((&error["kind"], output.stdout.len()), (&"daemon_down".into(), 0));
    assert!(error["hint"].as_str().unwrap().contains("systemctl start lair"));
    // No socket at all.
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "").unwrap();
    let text = String::from_utf8(host.vmctl(&["status"]).await.stderr).unwrap();
    assert!(text.starts_with("vmctl: laird is not running"), "{text}");
}

#[tokio::test]
async fn cl9_what_there_is_not_is_status_4() {
    let host = Host::new();
    let client = host.serve(&asked_for(&host.fleet(&[("builder", 64)]))).await;
    let status = client.status().await.unwrap();
    for verb in ["start", "stop", "restart", "kill", "status", "logs"] {
        let output = host.vmctl(&[verb, "bulider"]).await;
        assert_eq!(output.status.code(), Some(4), "{verb}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text, "vmctl: There is no VM bulider; did you mean builder?\n", "{verb}");
    }
    assert_eq!(client.status().await.unwrap(), status);
}
