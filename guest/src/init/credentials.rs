//! Credentials: named secrets that come over the control channel, because no disk and no initramfs should hold them.
//!
//! Init listens on the agent's port, takes the first greeting that has all it needs, and closes; the agent then
//! opens the port again. Only the host is heard (CID 2). What comes is checked like any peer's input.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::mounts::{self, DATA, MountError};
use crate::{
    handshake::{self, PATIENCE},
    paths::{CREDENTIALS, SYSTEMD_CREDENTIALS},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use lair_guest::wire::{
    AGENT_PORT,
    frame::{self, FrameError},
    message::{ExecEvent, Hello, HelloReply, HostOpen, Phase},
};
use nix::mount::MsFlags;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialError {
    #[error("The credentials {names} did not come within {} seconds", WAIT.as_secs())]
    TooLate { names: String },
    #[error("Credential `{0}` is not a file name of at most 255 bytes")]
    BadName(String),
    #[error("Credential `{name}` is not base64")]
    NotBase64 {
        name: String,
        #[source]
        source: base64::DecodeError,
    },
    #[error("Could not listen on vsock port {AGENT_PORT}")]
    Listen(#[source] io::Error),
    #[error("Could not read the boot id")]
    BootId(#[source] io::Error),
    #[error("Could not write `{path}`")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// How long the host may take to bring them.
const WAIT: Duration = Duration::from_secs(60);

/// Waits for the credentials `names` and puts them where programs, and the system's own init, look for them.
pub(super) fn take(names: &[String], own_init: bool) -> Result<(), CredentialError> {
    if names.is_empty() {
        return Ok(());
    }
    if let Some(bad) = names.iter().find(|name| !is_file_name(name)) {
        return Err(CredentialError::BadName(bad.clone()));
    }
    let boot_id = handshake::boot_id().map_err(CredentialError::BootId)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let hello = runtime.map_err(CredentialError::Listen)?.block_on(wait_for(names, &boot_id))?;
    handshake::set_clock(hello.unix_ms);
    let secrets = decode(names, &hello)?;

    // Not the file system that a guest with swap could write out.
    mounts::fs("ramfs", "credentials", CREDENTIALS, DATA | MsFlags::MS_NOEXEC, "mode=0700")?;
    write_all(Path::new(CREDENTIALS), &secrets)?;
    if own_init {
        write_all(Path::new(SYSTEMD_CREDENTIALS), &secrets)?;
    }
    Ok(())
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && !name.contains(['/', '\0']) && name != "." && name != ".."
}

async fn wait_for(names: &[String], boot_id: &str) -> Result<Hello, CredentialError> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT));
    let listener = listener.map_err(CredentialError::Listen)?;
    let mut absent = names.to_vec();
    let arrival = async {
        loop {
            let Ok((stream, peer)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            if peer.cid() != VMADDR_CID_HOST {
                continue;
            }
            // One at a time: there is one host.
            if let Ok(Ok(Some(hello))) = tokio::time::timeout(PATIENCE, greet(stream, boot_id)).await {
                absent =
                    names.iter().filter(|name| !hello.credentials.contains_key(*name)).cloned().collect();
                if absent.is_empty() {
                    return hello;
                }
            }
        }
    };
    match tokio::time::timeout(WAIT, arrival).await {
        Ok(hello) => Ok(hello),
        Err(_) => {
            let names: Vec<_> = absent.iter().map(|name| format!("`{name}`")).collect();
            Err(CredentialError::TooLate { names: names.join(", ") })
        }
    }
}

/// Answers one connection. `None` where it brought no greeting of ours.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    boot_id: &str,
) -> Result<Option<Hello>, FrameError> {
    match frame::read_message(&mut stream).await? {
        HostOpen::Control(hello) => {
            let reply = handshake::answer(&hello, boot_id, Phase::Init);
            frame::write_message(&mut stream, &reply).await?;
            Ok(matches!(reply, HelloReply::Welcome { .. }).then_some(hello))
        }
        HostOpen::Exec(_) => {
            let reason = "The guest is still starting: it waits for its credentials".to_string();
            frame::write_message(&mut stream, &ExecEvent::Failed { reason }).await?;
            Ok(None)
        }
    }
}

fn decode<'a>(names: &'a [String], hello: &Hello) -> Result<BTreeMap<&'a str, Vec<u8>>, CredentialError> {
    let mut secrets = BTreeMap::new();
    for name in names {
        let text = hello.credentials.get(name).map_or("", String::as_str);
        let secret = BASE64_STANDARD.decode(text);
        let secret = secret.map_err(|source| CredentialError::NotBase64 { name: name.clone(), source })?;
        secrets.insert(name.as_str(), secret);
    }
    Ok(secrets)
}

fn write_all(folder: &Path, secrets: &BTreeMap<&str, Vec<u8>>) -> Result<(), CredentialError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| CredentialError::Write { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed(folder))?;
    for (name, secret) in secrets {
        let path = folder.join(name);
        let file = File::options().write(true).create_new(true).mode(0o400).open(&path);
        file.and_then(|mut file| file.write_all(secret)).map_err(failed(&path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::{VERSION, message::Exec};
    use tokio::io::AsyncWriteExt;

    fn hello(version: u32, credentials: &[(&str, &str)]) -> Hello {
        let credentials = credentials.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Hello { version, ticket: String::new(), links_out: vec![], links_in: vec![], credentials, unix_ms: 0 }
    }

    async fn conversation(open: &HostOpen) -> (Option<Hello>, Vec<u8>) {
        let (mut host, guest) = tokio::io::duplex(1 << 16);
        frame::write_message(&mut host, open).await.unwrap();
        let got = greet(guest, "boot").await.unwrap();
        let mut reply = Vec::new();
        frame::read(&mut host, &mut reply).await.unwrap();
        (got, reply)
    }

    #[tokio::test]
    async fn a_greeting_is_answered_by_init() {
        let (got, reply) = conversation(&HostOpen::Control(hello(VERSION, &[("key", "c2VjcmV0")]))).await;
        let names = ["key".to_string()];
        let secrets = decode(&names, &got.unwrap()).unwrap();
        assert_eq!(secrets["key"], b"secret");
        let reply = String::from_utf8(reply).unwrap();
        assert_eq!(reply, r#"{"hello":"welcome","version":1,"boot_id":"boot","phase":"init"}"#);
    }

    #[tokio::test]
    async fn vs7_another_version_and_a_command_bring_nothing() {
        let (got, reply) = conversation(&HostOpen::Control(hello(9, &[("key", "c2VjcmV0")]))).await;
        assert!(got.is_none());
        assert!(String::from_utf8(reply).unwrap().contains("version 9"));
        let (got, reply) = conversation(&HostOpen::Exec(Exec {
            command: vec!["id".into()],
            environment: BTreeMap::new(),
            terminal: None,
        }))
        .await;
        assert!(got.is_none());
        assert!(String::from_utf8(reply).unwrap().contains("still starting"));
    }

    #[tokio::test]
    async fn vs4_nonsense_ends_the_connection_only() {
        for nonsense in
            [&b"\0\xff\xff\xff\xff"[..], b"\0\x02\0\0\0\xff\xfe", b"\x09\0\0\0\0", b"\0\x05\0\0\0[[", b""]
        {
            let (mut host, guest) = tokio::io::duplex(64);
            host.write_all(nonsense).await.unwrap();
            drop(host);
            assert!(greet(guest, "boot").await.is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn secrets_are_files_that_only_root_reads() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("lair");
        let secrets = BTreeMap::from([("key", b"secret".to_vec())]);
        write_all(&folder, &secrets).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&folder), mode(&folder.join("key"))), (0o700, 0o400));
        assert_eq!(fs::read(folder.join("key")).unwrap(), b"secret");
        assert!(write_all(&folder, &secrets).is_err(), "a credential was written twice");
    }

    #[test]
    fn names_are_file_names() {
        assert!(is_file_name("signing-key"));
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
        assert!(!is_file_name(&"x".repeat(256)));
        let error = decode(&["key".to_string()], &hello(VERSION, &[("key", "not base64")])).unwrap_err();
        assert_eq!(error.to_string(), "Credential `key` is not base64");
    }
}
