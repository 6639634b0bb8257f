//! Credentials at boot: named secrets that come over the control channel, because no disk and no initramfs should hold them.
//!
//! Init listens on the agent's port, takes the first delivery that has all it needs, and closes; the agent then
//! opens the port again. Only the host is heard (CID 2). What comes is checked like any peer's input.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::{
    clock,
    credentials::{self, CredentialError, Store},
    handshake::{self, PATIENCE},
    paths::SYSTEMD_CREDENTIALS,
};
use lair_guest::wire::{
    AGENT_PORT,
    frame::{self, FrameError},
    message::{Answer, Ask, Credentials, Event, ExecEvent, HelloReply, HostOpen, Phase, Request},
    relay,
};
use std::{io, path::Path, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error("The credentials {names} did not come within {} seconds", WAIT.as_secs())]
    TooLate { names: String },
    #[error("Could not listen on vsock port {AGENT_PORT}")]
    Listen(#[source] io::Error),
    #[error("Could not read the boot id")]
    BootId(#[source] io::Error),
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

/// How long the host may take to bring them.
const WAIT: Duration = Duration::from_secs(60);

/// How long the host may take to close after its delivery.
const CLOSE: Duration = Duration::from_secs(1);

/// Waits for the credentials `names` and puts them where programs, and the system's own init, look for them.
pub(super) fn take(names: &[String], own_init: bool) -> Result<(), TakeError> {
    for name in names {
        credentials::check_name(name)?;
    }
    let boot_id = handshake::boot_id().map_err(TakeError::BootId)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let mut delivery = runtime.map_err(TakeError::Listen)?.block_on(wait_for(names, &boot_id))?;
    delivery.keep.retain(|name, _| names.contains(name));
    let credentials = credentials::decode(&delivery.keep)?;
    let store = Store::of_guest(own_init);
    for (name, credential) in &credentials {
        store.keep(name, credential)?;
    }
    if own_init {
        credentials::for_systemd(Path::new(SYSTEMD_CREDENTIALS), &credentials)?;
    }
    Ok(())
}

async fn wait_for(names: &[String], boot_id: &str) -> Result<Credentials, TakeError> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT));
    let listener = listener.map_err(TakeError::Listen)?;
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
            if let Ok(Ok(Some(delivery))) =
                tokio::time::timeout(PATIENCE, greet(stream, boot_id, names)).await
            {
                absent = missing(names, &delivery);
                if absent.is_empty() {
                    return delivery;
                }
            }
        }
    };
    match tokio::time::timeout(WAIT, arrival).await {
        Ok(delivery) => Ok(delivery),
        Err(_) => Err(TakeError::TooLate { names: listed(&absent) }),
    }
}

fn missing(names: &[String], delivery: &Credentials) -> Vec<String> {
    names.iter().filter(|name| !delivery.keep.contains_key(*name)).cloned().collect()
}

fn listed(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Answers one connection. `None` where it brought no credentials.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    boot_id: &str,
    names: &[String],
) -> Result<Option<Credentials>, FrameError> {
    let starting = "The guest is still starting: it waits for its credentials";
    match frame::read_message(&mut stream).await? {
        HostOpen::Control(hello) => {
            let reply = handshake::answer(&hello, boot_id, Phase::Init);
            frame::write_message(&mut stream, &reply).await?;
            if matches!(reply, HelloReply::Refused { .. }) {
                return Ok(None);
            }
            // The system starts with the right time where it can; a clock that stays wrong is not worth a boot.
            let _ = clock::follow(hello.unix_ms);
        }
        HostOpen::Exec(_) => {
            frame::write_message(&mut stream, &ExecEvent::Failed { reason: starting.into() }).await?;
            return Ok(None);
        }
    }
    while let Some(Request { id, ask }) = frame::read_message_or_end(&mut stream).await? {
        let Ask::Credentials(delivery) = ask else {
            let answer = Answer::Failed(starting.into());
            frame::write_message(&mut stream, &Event::Reply { id, answer }).await?;
            continue;
        };
        let absent = missing(names, &delivery);
        let answer = if absent.is_empty() {
            Answer::Done
        } else {
            Answer::Failed(format!("The guest waits for {} as well", listed(&absent)))
        };
        frame::write_message(&mut stream, &Event::Reply { id, answer }).await?;
        relay::wait_for_close(&mut stream, CLOSE).await;
        return Ok(Some(delivery));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_guest::wire::{
        VERSION,
        message::{Credential, Exec, Features, Hello, Secret},
    };
    use std::collections::BTreeMap;
    use tokio::io::AsyncWriteExt;

    fn hello(version: u32) -> HostOpen {
        HostOpen::Control(Hello {
            version,
            ticket: String::new(),
            links_out: vec![],
            links_in: vec![],
            credentials: BTreeMap::new(),
            unix_ms: 0,
            features: Features::OURS,
        })
    }

    fn delivery(names: &[&str]) -> Ask {
        let credential = || Credential { value: Secret("c2VjcmV0".into()), restart: vec![] };
        let keep = names.iter().map(|name| (name.to_string(), credential())).collect();
        Ask::Credentials(Credentials { keep, remove: vec![] })
    }

    /// What init makes of a connection, and its answers.
    async fn conversation(open: &HostOpen, asks: Vec<Ask>) -> (Option<Credentials>, Vec<String>) {
        let (mut host, guest) = tokio::io::duplex(1 << 16);
        frame::write_message(&mut host, open).await.unwrap();
        for (id, ask) in (1..).zip(asks) {
            frame::write_message(&mut host, &Request { id, ask }).await.unwrap();
        }
        host.shutdown().await.unwrap();
        let got = greet(guest, "boot", &["key".to_string()]).await.unwrap();
        let (mut replies, mut reply) = (Vec::new(), Vec::new());
        while frame::read(&mut host, &mut reply).await.unwrap().is_some() {
            replies.push(String::from_utf8(reply.clone()).unwrap());
        }
        (got, replies)
    }

    #[tokio::test]
    async fn a_delivery_is_taken_and_acknowledged() {
        let (got, replies) = conversation(&hello(VERSION), vec![Ask::Ping, delivery(&["key", "more"])]).await;
        let got = credentials::decode(&got.unwrap().keep).unwrap();
        assert_eq!(got["key"].secret, b"secret");
        assert_eq!(
            replies,
            [
                r#"{"hello":"welcome","version":1,"boot_id":"boot","phase":"init","features":{"set_clock":true,"credentials":true,"journal":true,"devices":true}}"#,
                r#"{"event":"reply","id":1,"answer":{"failed":"The guest is still starting: it waits for its credentials"}}"#,
                r#"{"event":"reply","id":2,"answer":"done"}"#,
            ]
        );
    }

    #[tokio::test]
    async fn a_delivery_in_which_something_is_missing_is_not_acknowledged() {
        let (got, replies) = conversation(&hello(VERSION), vec![delivery(&["other"])]).await;
        assert_eq!(missing(&["key".to_string()], &got.unwrap()), ["key"]);
        assert!(replies[1].contains("The guest waits for `key` as well"), "{replies:?}");
    }

    #[tokio::test]
    async fn vs7_another_version_and_a_command_bring_nothing() {
        let (got, replies) = conversation(&hello(9), vec![delivery(&["key"])]).await;
        assert!(got.is_none());
        assert!(replies[0].contains("version 9") && replies.len() == 1);
        let exec =
            HostOpen::Exec(Exec { command: vec!["id".into()], environment: BTreeMap::new(), terminal: None });
        let (got, replies) = conversation(&exec, vec![]).await;
        assert!(got.is_none());
        assert!(replies[0].contains("still starting"));
        assert!(conversation(&hello(VERSION), vec![]).await.0.is_none());
    }

    #[tokio::test]
    async fn vs4_nonsense_ends_the_connection_only() {
        for nonsense in
            [&b"\0\xff\xff\xff\xff"[..], b"\0\x02\0\0\0\xff\xfe", b"\x09\0\0\0\0", b"\0\x05\0\0\0[[", b""]
        {
            let (mut host, guest) = tokio::io::duplex(64);
            host.write_all(nonsense).await.unwrap();
            drop(host);
            assert!(greet(guest, "boot", &[]).await.is_err(), "{nonsense:?}");
        }
    }
}
