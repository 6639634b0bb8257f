//! Credentials: at boot, when they change, when they are revoked.

use crate::support::*;
use lair_guest::wire::{
    frame,
    message::{Answer, Ask, Credentials, Phase, Request},
};
use lair_vmm::{
    fleet::schema::{Credential, RotatedCredential},
    shim::{config::ShimConfig, protocol::AgentState},
};
use std::path::Path;

/// `key` restarts nginx, `token` nothing.
fn with_credentials(host: &Host) -> ShimConfig {
    let mut config = host.config("hydra");
    std::fs::write(host.path("key"), b"\x00secret\xff").unwrap();
    std::fs::write(host.path("token"), "t0ken").unwrap();
    let rotated = RotatedCredential { file: host.path("key"), restart: vec!["nginx.service".into()] };
    config.credentials.insert("key".into(), Credential::Rotated(rotated));
    config.credentials.insert("token".into(), host.path("token").into());
    config
}

/// The delivery to the first half of `lair-guest`; its channel ends with the answer.
async fn take(guest: &mut Guest, boot_id: &str, answer: Answer) -> Credentials {
    guest.welcome(boot_id, Phase::Init).await;
    let Request { id, ask: Ask::Credentials(delivery) } = guest.asked().await else {
        panic!("No credentials")
    };
    guest.answer(id, answer).await;
    assert_closed(guest.control.as_mut().unwrap()).await;
    delivery
}

fn given(delivery: &Credentials) -> Vec<(&str, &str)> {
    delivery.keep.iter().map(|(name, sent)| (name.as_str(), sent.value.0.as_str())).collect()
}

/// A new file in the place of another.
fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(beside, path).unwrap();
}

fn assert_secret(shim: &Shim) {
    for text in [shim.stderr(), std::fs::read_to_string(&shim.config.audit_log).unwrap_or_default()] {
        for secret in ["secret", "AHNlY3JldP8=", "t0ken", "dDBrZW4="] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

#[tokio::test]
async fn vs11_credentials_are_given_once_in_a_boot() {
    let host = Host::new();
    let config = with_credentials(&host);
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    let delivery = take(&mut guest, "boot-1", Answer::Done).await;
    assert_eq!(given(&delivery), [("key", "AHNlY3JldP8="), ("token", "dDBrZW4=")]);
    assert_eq!(delivery.keep["key"].restart, ["nginx.service"]);
    assert!(delivery.keep["token"].restart.is_empty() && delivery.remove.is_empty());
    assert_eq!(shim.status().await.agent, AgentState::Absent);

    // Whoever it is that asks again gets nothing.
    guest.welcome("boot-1", Phase::Init).await;
    assert_closed(guest.control.as_mut().unwrap()).await;
    let records = shim.audit(2).await;
    let told: Vec<_> = records.iter().map(|r| (&r["kind"], &r["verdict"], &r["to"], &r["given"])).collect();
    let names = serde_json::json!(["key", "token"]);
    let kind = "credentials".into();
    assert_eq!(told[0], (&kind, &"allowed".into(), &"hydra".into(), &names));
    assert_eq!(told[1], (&kind, &"refused".into(), &"hydra".into(), &names));

    // The agent has no use for what has not changed, however often it comes.
    for _ in 0..2 {
        guest.welcome("boot-1", Phase::Agent).await;
        let Request { id, ask: Ask::Statistics } = guest.asked().await else { panic!("Not the figures") };
        guest.answer(id, Answer::Done).await;
        assert_eq!(guest.asked().await.ask, Ask::Statistics);
        guest.control = None;
    }
    // Another boot is another guest.
    let again = take(&mut guest, "boot-2", Answer::Done).await;
    assert_eq!(given(&again), given(&delivery));
    assert_eq!(shim.audit(3).await[2]["verdict"], "allowed");
    assert_secret(&shim);
}

#[tokio::test]
async fn a_guest_waits_for_a_credential_that_is_not_there_yet() {
    let host = Host::new();
    let config = with_credentials(&host);
    std::fs::remove_file(host.path("token")).unwrap();
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    for _ in 0..3 {
        guest.welcome("boot-1", Phase::Init).await;
        assert_closed(guest.control.as_mut().unwrap()).await;
    }
    until(async || shim.stderr().contains("waits for credentials: token").then_some(())).await;
    std::fs::write(host.path("token"), "t0ken").unwrap();
    // What is not acknowledged was not given.
    for answer in [Answer::Failed("no \u{1b}room".into()), Answer::Done] {
        assert_eq!(given(&take(&mut guest, "boot-1", answer).await).len(), 2);
    }
    assert_eq!(shim.audit(1).await.len(), 1);
    assert_secret(&shim);
}

#[tokio::test]
async fn a_rotation_reaches_the_agent() {
    let host = Host::new();
    let config = with_credentials(&host);
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    take(&mut guest, "boot-1", Answer::Done).await;
    guest.welcome("boot-1", Phase::Agent).await;
    replace(&host.path("key"), "new");
    // Nothing of the other one, whose file was only touched.
    replace(&host.path("token"), "t0ken");
    let Request { id, ask: Ask::Credentials(sent) } = guest.asked_more().await else { panic!("No rotation") };
    assert_eq!(given(&sent), [("key", "bmV3")]);
    assert_eq!(sent.keep["key"].restart, ["nginx.service"]);
    guest.answer(id, Answer::Failed("no such unit".into())).await;
    let records = shim.audit(2).await;
    assert_eq!(
        (&records[1]["given"], &records[1]["reason"]),
        (&serde_json::json!(["key"]), &"no such unit".into())
    );
    // It is tried again, and no more once it was taken.
    let Request { id, ask: Ask::Credentials(again) } = guest.asked_more().await else { panic!("No retry") };
    assert_eq!(again, sent);
    guest.answer(id, Answer::Done).await;
    let records = shim.audit(3).await;
    assert_eq!((&records[2]["given"], records[2].get("reason")), (&serde_json::json!(["key"]), None));
    replace(&host.path("key"), "newer");
    let Request { ask: Ask::Credentials(sent), .. } = guest.asked_more().await else { panic!("No rotation") };
    assert_eq!(given(&sent), [("key", "bmV3ZXI=")]);
    assert_secret(&shim);
}

#[tokio::test]
async fn vs11_a_revoked_credential_is_taken_back_and_given_no_more() {
    let host = Host::new();
    let mut config = with_credentials(&host);
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config.clone()).await;
    take(&mut guest, "boot-1", Answer::Done).await;
    guest.welcome("boot-1", Phase::Agent).await;
    shim.until_agent(|agent| *agent != AgentState::Absent).await;
    config.credentials.remove("key");
    shim.reload(&host, &config).await.unwrap();
    guest.welcome("boot-1", Phase::Agent).await;
    let Request { id, ask: Ask::Credentials(sent) } = guest.asked_more().await else { panic!("Not revoked") };
    assert!(sent.keep.is_empty() && sent.remove == ["key"], "{sent:?}");
    guest.answer(id, Answer::Done).await;
    let records = shim.audit(2).await;
    assert_eq!(records[1]["revoked"], serde_json::json!(["key"]));
    // Its file may change as it likes; the next boot does not get it either.
    replace(&host.path("key"), "new");
    guest.control = None;
    let delivery = take(&mut guest, "boot-2", Answer::Done).await;
    assert_eq!(given(&delivery), [("token", "dDBrZW4=")]);
    assert_secret(&shim);
}

/// A shim that was started anew does not know what the guest has: it says all of it once, and the agent knows what is new to it.
#[tokio::test]
async fn a_shim_in_the_place_of_another_brings_the_agent_up_to_date() {
    let host = Host::new();
    let config = with_credentials(&host);
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    guest.welcome("boot-1", Phase::Agent).await;
    let Request { id, ask: Ask::Credentials(sent) } = guest.asked_more().await else {
        panic!("No credentials")
    };
    assert_eq!(given(&sent).len(), 2);
    guest.answer(id, Answer::Done).await;
    shim.audit(1).await;
    let Request { ask: Ask::Statistics, .. } = guest.asked().await else { panic!("Said twice") };
}

#[tokio::test]
async fn vs4_answers_that_are_none_deliver_nothing() {
    let host = Host::new();
    let config = with_credentials(&host);
    let mut guest = Guest::new(&config);
    guest.start_agent();
    let shim = host.start(config).await;
    for nonsense in [&b"\0\xff\xff\xff\xff"[..], b"\0\x01\0\0\0{", b"\x01\0\0\0\0"] {
        guest.welcome("boot-1", Phase::Init).await;
        let Request { ask: Ask::Credentials(_), .. } = guest.asked().await else { panic!("No credentials") };
        tokio::io::AsyncWriteExt::write_all(guest.control.as_mut().unwrap(), nonsense).await.unwrap();
        let mut rest = Vec::new();
        while let Ok(Some(_)) = within(frame::read(guest.control.as_mut().unwrap(), &mut rest)).await {}
    }
    assert_eq!(given(&take(&mut guest, "boot-1", Answer::Done).await).len(), 2);
    assert_eq!(shim.audit(1).await.len(), 1);
}
