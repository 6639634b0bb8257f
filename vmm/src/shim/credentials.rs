//! Credentials: read from their files, given to the guest once in a boot, and again when they have changed.
//!
//! A change is seen by looking at the files with each sign of life, and at once after a reload. That is a system call for each on a wake-up
//! that is there anyway, and it sees every way of replacing a file: in place, by rename, by a symbolic link of a directory above it.
//! inotify would have to follow each of those. A file counts once two looks in a row agree: it is not read while it is being
//! written.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::{
    agent::{ChannelError, ask},
    audit::{Attempt, Outcome, Subject},
    files, limits,
    links::HOST,
    message,
    note::{chain, foreign},
    state::{Asked, Shim},
};
use crate::fleet::schema::Credential;
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use lair_guest::wire::{
    frame::FrameError,
    message::{Answer, Ask, Credential as Sent, Credentials, Event, Request, Secret},
};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};
use tokio::{net::UnixStream, sync::mpsc, time::timeout};

/// The configured credentials, by name.
type Configured = BTreeMap<String, Credential>;

/// What tells a file from the one that it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Some(Self { device: metadata.dev(), inode: metadata.ino(), size: metadata.size(), changed })
    }
}

/// What the guest has acknowledged. No secret stays here.
struct Acknowledged {
    digest: [u8; 32],
    stamp: Option<Stamp>,
}

/// What the guest did not take, or not in whole.
struct Refused {
    /// Of its file; `None` for what was to be taken back.
    stamp: Option<Stamp>,
    /// When the same is sent again, and how long that is from when it was sent last.
    again: Instant,
    pause: Duration,
}

/// What was given in this boot.
#[derive(Default)]
pub(super) struct Given {
    boot_id: String,
    /// Whether the first half of `lair-guest` has had its delivery.
    delivered: bool,
    acknowledged: BTreeMap<String, Acknowledged>,
    /// None of these is acknowledged: the guest may have the old one, or the new one, or none.
    refused: BTreeMap<String, Refused>,
    /// The files at the last look.
    seen: BTreeMap<String, Stamp>,
}

impl Given {
    /// Begins anew, if it is another boot.
    fn boot(&mut self, boot_id: &str) {
        if self.boot_id != boot_id {
            *self = Self { boot_id: boot_id.into(), ..Self::default() };
        }
    }

    /// The files that are to be read, by what a look has shown: those that are not as the guest has them, have come to rest, and were not
    /// refused a moment ago.
    fn due(&mut self, look: BTreeMap<String, Stamp>, at_once: bool, now: Instant) -> BTreeSet<String> {
        let known = |name: &str| self.acknowledged.get(name).and_then(|known| known.stamp);
        let due = look
            .iter()
            .filter(|(name, stamp)| known(name) != Some(**stamp))
            .filter(|(name, stamp)| at_once || self.seen.get(*name) == Some(stamp))
            .filter(|(name, stamp)| !self.waits(name, Some(**stamp), now))
            .map(|(name, _)| name.clone())
            .collect();
        self.seen = look;
        due
    }

    /// Those of the guest's that it may not have any longer.
    fn revoked(&self, configured: &Configured, now: Instant) -> Vec<String> {
        let names: BTreeSet<_> = self.acknowledged.keys().chain(self.refused.keys()).collect();
        let revoked = names.into_iter().filter(|name| !configured.contains_key(*name));
        revoked.filter(|name| !self.waits(name, None, now)).cloned().collect()
    }

    /// Whether just this was refused, not long ago.
    fn waits(&self, name: &str, stamp: Option<Stamp>, now: Instant) -> bool {
        self.refused.get(name).is_some_and(|refused| refused.stamp == stamp && now < refused.again)
    }

    fn acknowledge(&mut self, read: &BTreeMap<String, Read>) {
        for (name, read) in read {
            let known = Acknowledged { digest: read.digest, stamp: read.stamp };
            self.acknowledged.insert(name.clone(), known);
            self.refused.remove(name);
        }
    }

    /// The guest has it no more.
    fn forget(&mut self, name: &str) {
        self.acknowledged.remove(name);
        self.refused.remove(name);
    }

    /// The guest did not take it: the same is sent again, after longer and longer pauses.
    fn refuse(&mut self, name: &str, stamp: Option<Stamp>, now: Instant) {
        let (shortest, longest) = limits::CREDENTIAL_RETRY;
        let before = self.refused.get(name).filter(|refused| refused.stamp == stamp);
        let pause = before.map_or(shortest, |before| before.pause.saturating_mul(2).min(longest));
        let again = now.checked_add(pause).unwrap_or(now);
        self.acknowledged.remove(name);
        self.refused.insert(name.into(), Refused { stamp, again, pause });
    }
}

/// A credential as its file is now.
struct Read {
    digest: [u8; 32],
    stamp: Option<Stamp>,
    sent: Sent,
}

/// Reads credentials, and says why others are not among them.
fn read(configured: &Configured) -> (BTreeMap<String, Read>, Vec<String>) {
    let mut left = limits::CREDENTIAL_BYTES;
    let (mut found, mut missing) = (BTreeMap::new(), Vec::new());
    for (name, credential) in configured {
        // Before the contents: what is written in between is seen at the next look.
        let stamp = Stamp::of(credential.file());
        match files::read(credential.file(), left) {
            Ok(bytes) => {
                left = left.saturating_sub(bytes.len());
                let sent =
                    Sent { value: Secret(BASE64.encode(&bytes)), restart: credential.restart().to_vec() };
                found.insert(name.clone(), Read { digest: Sha256::digest(&bytes).into(), stamp, sent });
            }
            Err(error) => missing.push(format!("{name}: {}", chain(&error))),
        }
    }
    (found, missing)
}

async fn read_apart(configured: Configured) -> (BTreeMap<String, Read>, Vec<String>) {
    // A disk may hang.
    tokio::task::spawn_blocking(move || read(&configured)).await.unwrap_or_default()
}

/// Gives the first half of `lair-guest` all credentials, once in a boot. Where one cannot be read nothing is given: the guest waits, and
/// is dialled again.
pub(super) async fn deliver(shim: &Shim, stream: &mut UnixStream, boot_id: &str) -> ChannelError {
    {
        let mut given = shim.given();
        given.boot(boot_id);
        if given.delivered {
            drop(given);
            let names = shim.credentials().into_keys().collect();
            shim.audit.refused(attempt(shim, names, vec![]), "They were given in this boot already".into());
            return ChannelError::Twice;
        }
    }
    let (found, missing) = read_apart(shim.credentials()).await;
    if !missing.is_empty() {
        shim.notes.say(&format!("The guest waits for credentials: {}", missing.join("; ")));
        return ChannelError::Closed;
    }
    let keep = found.iter().map(|(name, read)| (name.clone(), read.sent.clone())).collect();
    let ask = Request { id: 1, ask: Ask::Credentials(Credentials { keep, remove: vec![] }) };
    let answered = async {
        message::send(stream, &ask).await?;
        loop {
            match message::next(stream, limits::EVENT_BYTES).await? {
                Some(Event::Reply { id: 1, answer }) => return Ok(answer),
                Some(_) => {}
                None => return Err(ChannelError::Frame(FrameError::Closed)),
            }
        }
    };
    match timeout(limits::ASK, answered).await {
        Err(_) => return ChannelError::Silent,
        Ok(Err(error)) => return error,
        Ok(Ok(Answer::Failed(reason))) => {
            shim.notes.say(&format!("The guest did not take its credentials: {}", foreign(&reason)));
            return ChannelError::Closed;
        }
        Ok(Ok(Answer::Done | Answer::Statistics(_))) => {}
    }
    let mut given = shim.given();
    given.delivered = true;
    given.acknowledge(&found);
    drop(given);
    shim.audit.ended(attempt(shim, found.into_keys().collect(), vec![]), Outcome::default());
    ChannelError::Closed
}

/// Gives the agent what has changed since it was given, with `at_once` also what may just be being written; and again what it did not
/// take.
pub(super) async fn renew(
    shim: &Shim,
    requests: &mpsc::Sender<Asked>,
    boot_id: &str,
    at_once: bool,
) -> Result<(), ChannelError> {
    let mut configured = shim.credentials();
    let now = Instant::now();
    let revoked = {
        let mut given = shim.given();
        given.boot(boot_id);
        given.revoked(&configured, now)
    };
    if configured.is_empty() && revoked.is_empty() {
        return Ok(());
    }
    let looked_at = configured.clone();
    let look = tokio::task::spawn_blocking(move || {
        let stamps =
            looked_at.iter().filter_map(|(name, given)| Some((name.clone(), Stamp::of(given.file())?)));
        stamps.collect()
    });
    let look = look.await.unwrap_or_default();
    let due = shim.given().due(look, at_once, now);
    configured.retain(|name, _| due.contains(name));
    let (mut read, missing) = if due.is_empty() { Default::default() } else { read_apart(configured).await };
    if !missing.is_empty() {
        shim.notes.say(&format!("Credentials are left as they were: {}", missing.join("; ")));
    }
    {
        let mut given = shim.given();
        // A file that was only touched.
        let same: Vec<_> = read
            .extract_if(.., |name, read| {
                given.acknowledged.get(name).is_some_and(|known| known.digest == read.digest)
            })
            .collect();
        given.acknowledge(&same.into_iter().collect());
    }
    if read.is_empty() && revoked.is_empty() {
        return Ok(());
    }
    let keep = read.iter().map(|(name, read)| (name.clone(), read.sent.clone())).collect();
    let sent = Ask::Credentials(Credentials { keep, remove: revoked.clone() });
    let reason = match ask(requests, sent, limits::PING).await? {
        Answer::Failed(reason) => Some(foreign(&reason)),
        Answer::Done | Answer::Statistics(_) => None,
    };
    let mut given = shim.given();
    match &reason {
        None => {
            given.acknowledge(&read);
            revoked.iter().for_each(|name| given.forget(name));
        }
        Some(reason) => {
            shim.notes.say(&format!("The guest did not take all new credentials: {reason}"));
            let now = Instant::now();
            read.iter().for_each(|(name, read)| given.refuse(name, read.stamp, now));
            revoked.iter().for_each(|name| given.refuse(name, None, now));
        }
    }
    drop(given);
    let outcome = Outcome { reason, ..Outcome::default() };
    shim.audit.ended(attempt(shim, read.into_keys().collect(), revoked), outcome);
    Ok(())
}

fn attempt(shim: &Shim, given: Vec<String>, revoked: Vec<String>) -> Attempt {
    let subject = Subject::Credentials { given, revoked };
    Attempt { subject, from: HOST.into(), to: shim.vm.clone(), uid: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::schema::RotatedCredential;
    use std::path::PathBuf;

    fn configured(folder: &Path, names: &[&str]) -> Configured {
        names.iter().map(|name| (name.to_string(), folder.join(name).into())).collect()
    }

    fn look(configured: &Configured) -> BTreeMap<String, Stamp> {
        configured.iter().filter_map(|(name, given)| Some((name.clone(), Stamp::of(given.file())?))).collect()
    }

    #[test]
    fn a_file_is_read_once_it_has_come_to_rest() {
        let dir = tempfile::tempdir().unwrap();
        let files = configured(dir.path(), &["a", "b"]);
        fs::write(dir.path().join("a"), "one").unwrap();
        let mut given = Given::default();
        given.boot("boot");
        assert!(given.due(look(&files), false, Instant::now()).is_empty(), "Seen for the first time");
        assert_eq!(given.due(look(&files), false, Instant::now()), ["a".to_string()].into());
        let (found, missing) = read(&files);
        given.acknowledge(&found);
        assert_eq!(missing.len(), 1);
        assert!(given.due(look(&files), true, Instant::now()).is_empty(), "The guest has it");
        // Replaced by rename, as editors and secret managers do.
        fs::write(dir.path().join("new"), "two").unwrap();
        fs::rename(dir.path().join("new"), dir.path().join("a")).unwrap();
        assert!(given.due(look(&files), false, Instant::now()).is_empty());
        assert_eq!(given.due(look(&files), false, Instant::now()), ["a".to_string()].into());
        given.boot("boot");
        assert_eq!(given.acknowledged.len(), 1);
        given.boot("another");
        assert_eq!(given.due(look(&files), true, Instant::now()), ["a".to_string()].into());
    }

    #[test]
    fn a_directory_that_is_exchanged_by_a_link_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("secrets");
        for generation in ["1", "2"] {
            fs::create_dir(dir.path().join(generation)).unwrap();
            fs::write(dir.path().join(generation).join("key"), generation).unwrap();
        }
        std::os::unix::fs::symlink("1", &current).unwrap();
        let files = configured(&current, &["key"]);
        let mut given = Given::default();
        given.acknowledge(&read(&files).0);
        assert!(given.due(look(&files), true, Instant::now()).is_empty());
        fs::remove_file(&current).unwrap();
        std::os::unix::fs::symlink("2", &current).unwrap();
        assert_eq!(given.due(look(&files), true, Instant::now()).len(), 1);
        fs::remove_file(&current).unwrap();
        assert!(given.due(look(&files), true, Instant::now()).is_empty(), "What is gone is left as it was");
    }

    #[test]
    fn what_is_configured_no_more_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let files = configured(dir.path(), &["a", "b"]);
        fs::write(dir.path().join("a"), "one").unwrap();
        fs::write(dir.path().join("b"), "two").unwrap();
        let mut given = Given::default();
        given.acknowledge(&read(&files).0);
        assert!(given.revoked(&files, Instant::now()).is_empty());
        assert_eq!(given.revoked(&configured(dir.path(), &["b", "c"]), Instant::now()), ["a"]);
    }

    #[test]
    fn what_was_refused_is_sent_again_after_longer_and_longer_pauses() {
        let dir = tempfile::tempdir().unwrap();
        let files = configured(dir.path(), &["a"]);
        fs::write(dir.path().join("a"), "one").unwrap();
        let mut given = Given::default();
        let mut now = Instant::now();
        given.acknowledge(&read(&files).0);
        fs::write(dir.path().join("a"), "two, which is longer").unwrap();
        let two = look(&files);
        given.due(two.clone(), false, now);
        let (shortest, longest) = limits::CREDENTIAL_RETRY;
        let mut pause = shortest;
        for _ in 0..20 {
            assert_eq!(given.due(two.clone(), false, now).len(), 1);
            given.refuse("a", Some(two["a"]), now);
            assert!(given.due(two.clone(), false, now + pause - Duration::from_millis(1)).is_empty());
            assert!(given.due(two.clone(), true, now).is_empty(), "However new the channel is");
            now += pause;
            pause = (pause * 2).min(longest);
        }
        // The guest may have it in part: neither does the old one count as known, nor is it left there.
        assert!(given.acknowledged.is_empty());
        assert_eq!(given.revoked(&configured(dir.path(), &[]), now), ["a"]);
        given.refuse("a", None, now);
        assert!(given.revoked(&configured(dir.path(), &[]), now).is_empty());
        assert_eq!(given.revoked(&configured(dir.path(), &[]), now + shortest), ["a"]);
        // Configured again, or changed: that was not refused.
        assert_eq!(given.due(two, false, now).len(), 1);
        given.forget("a");
        assert!(given.revoked(&configured(dir.path(), &[]), Instant::now()).is_empty());
    }

    #[test]
    fn all_together_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let half = vec![0; limits::CREDENTIAL_BYTES / 2 + 1];
        fs::write(dir.path().join("a"), &half).unwrap();
        fs::write(dir.path().join("b"), &half).unwrap();
        let rotated = RotatedCredential { file: dir.path().join("a"), restart: vec!["x.service".into()] };
        let mut files = configured(dir.path(), &["b"]);
        files.insert("a".into(), Credential::Rotated(rotated));
        files.insert("d".into(), PathBuf::from("/dev/zero").into());
        let (found, missing) = read(&files);
        assert_eq!(found["a"].sent.restart, ["x.service"]);
        assert_eq!(found.len(), 1);
        assert!(missing[0].contains("more than") && missing[1].contains("not a regular file"), "{missing:?}");
    }
}
