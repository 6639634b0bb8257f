//! Who may do what: a peer's role, from the lists of the fleet file.
//!
//! Names become numbers when a fleet becomes the fleet, so that no request waits for a directory service. A name that does not exist
//! gives nobody anything; it is asked for again after a while, as it may come with a directory service that starts later.

use super::peer::Peer;
use crate::{
    fleet::{self, schema::Fleet},
    host::thread,
};
use nix::unistd::{Group, User, geteuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// What a caller may do. Each role may do all that the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Look.
    View,
    /// Start and stop VMs, and get into them.
    Operate,
    /// Change the fleet, and see who did what.
    Administer,
}

impl Role {
    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Operate => "operate",
            Self::Administer => "administer",
        }
    }
}

/// Users and groups.
#[derive(Debug, Default)]
struct Ids {
    uids: Vec<u32>,
    gids: Vec<u32>,
    /// Names that the host does not have, or could not be asked for.
    unknown: usize,
}

impl Ids {
    fn has(&self, peer: &Peer) -> bool {
        self.uids.contains(&peer.uid) || self.gids.iter().any(|gid| peer.is_in(*gid))
    }

    /// The names that exist, as numbers.
    fn resolve(names: &[String], tell: bool) -> Self {
        let mut ids = Self::default();
        for name in names {
            let known = match name.strip_prefix('@') {
                Some(group) => group_id(group).map(|gid| ids.gids.push(gid)),
                None => user_id(name).map(|uid| ids.uids.push(uid)),
            };
            if known.is_some() {
                continue;
            }
            ids.unknown = ids.unknown.saturating_add(1);
            if tell && !fleet::schema::Access::default().operate.contains(name) {
                tracing::warn!(name, "the fleet file gives access to a name that this host does not have");
            }
        }
        ids
    }
}

fn user_id(name: &str) -> Option<u32> {
    let number = name.parse().ok();
    number.or_else(|| Some(User::from_name(name).ok()??.uid.as_raw()))
}

fn group_id(name: &str) -> Option<u32> {
    let number = name.parse().ok();
    number.or_else(|| Some(Group::from_name(name).ok()??.gid.as_raw()))
}

/// Whether a user could do with `laird` whatever it likes, whatever the fleet file says: root, and who runs it.
pub fn owns(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// The roles of one fleet.
#[derive(Debug)]
pub struct Access {
    view: Ids,
    operate: Ids,
    administer: Ids,
}

impl Access {
    /// The roles that a fleet file gives. It asks the host for names, which may take a while. `tell`: names that the host does not have
    /// are news.
    pub fn resolve(access: &fleet::schema::Access, tell: bool) -> Self {
        Self {
            view: Ids::resolve(&access.view, tell),
            operate: Ids::resolve(&access.operate, tell),
            administer: Ids::resolve(&access.administer, tell),
        }
    }

    /// Whether the host has all names.
    fn is_whole(&self) -> bool {
        [&self.view, &self.operate, &self.administer].iter().all(|ids| ids.unknown == 0)
    }

    /// The highest role that a peer has, if any.
    pub fn role(&self, peer: &Peer) -> Option<Role> {
        if owns(peer.uid) || self.administer.has(peer) {
            Some(Role::Administer)
        } else if self.operate.has(peer) {
            Some(Role::Operate)
        } else {
            self.view.has(peer).then_some(Role::View)
        }
    }
}

/// The host did not say in time who is in which group.
#[derive(Debug, thiserror::Error)]
#[error(
    "The host does not tell its users and groups, such as those of a directory service; only root is served meanwhile"
)]
pub struct NoNames;

/// How long names are taken for missing that the host did not have. They may come with a directory service that starts later.
const MISSING: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
struct Known {
    fleet: Weak<Fleet>,
    access: Arc<Access>,
    /// When names are asked for again, if some are missing.
    until: Option<Instant>,
}

impl Known {
    fn is_of(&self, fleet: &Arc<Fleet>) -> bool {
        std::ptr::eq(self.fleet.as_ptr(), Arc::as_ptr(fleet))
    }
}

/// The roles of the fleet that is the fleet.
#[derive(Debug, Default)]
pub struct CurrentAccess {
    known: Mutex<Option<Known>>,
    /// Held while names are asked for: a directory service that hangs takes one thread, not one for each request.
    resolving: Arc<tokio::sync::Mutex<()>>,
}

impl CurrentAccess {
    /// The role of a peer in `fleet`. Who owns `laird` does not wait for names; others do, for as long as `patience` says.
    pub async fn role(
        self: &Arc<Self>,
        fleet: &Arc<Fleet>,
        peer: &Peer,
        patience: Duration,
    ) -> Result<Option<Role>, NoNames> {
        if owns(peer.uid) {
            return Ok(Some(Role::Administer));
        }
        let access = timeout(patience, self.of(fleet)).await.ok().flatten().ok_or(NoNames)?;
        Ok(access.role(peer))
    }

    fn known(&self) -> Option<Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn current(&self, fleet: &Arc<Fleet>) -> Option<Arc<Access>> {
        let now = Instant::now();
        let known =
            self.known().filter(|known| known.is_of(fleet) && known.until.is_none_or(|until| now < until));
        known.map(|known| known.access)
    }

    /// The roles of `fleet`. The host is asked for its names only once, unless it does not have them all.
    async fn of(self: &Arc<Self>, fleet: &Arc<Fleet>) -> Option<Arc<Access>> {
        if let Some(access) = self.current(fleet) {
            return Some(access);
        }
        let alone = Arc::clone(&self.resolving).lock_owned().await;
        if let Some(access) = self.current(fleet) {
            return Some(access);
        }
        let tell = !self.known().is_some_and(|known| known.is_of(fleet));
        let (current, fleet) = (Arc::clone(self), Arc::clone(fleet));
        // It goes on, alone, also where nobody waits for it any longer.
        let resolved = tokio::spawn(async move {
            let lists = fleet.access.clone();
            let resolve = move || Access::resolve(&lists, tell);
            let access = Arc::new(thread::run(resolve).await.ok()?);
            let until = if access.is_whole() { None } else { Instant::now().checked_add(MISSING) };
            let entry = Known { fleet: Arc::downgrade(&fleet), access: Arc::clone(&access), until };
            *current.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(entry);
            drop(alone);
            Some(access)
        });
        resolved.await.ok()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gid: u32, groups: &[u32]) -> Peer {
        Peer { uid, gid, groups: groups.into() }
    }

    fn access(view: &[&str], operate: &[&str], administer: &[&str]) -> Access {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Access::resolve(
            &fleet::schema::Access { view: list(view), operate: list(operate), administer: list(administer) },
            true,
        )
    }

    #[test]
    fn cl3_a_role_comes_from_the_uid_and_all_groups() {
        let access = access(&["@4001", "4100"], &["@4002", "4101"], &["@4003", "4102"]);
        for (peer, role) in [
            (peer(4000, 4000, &[]), None),
            (peer(4000, 4001, &[]), Some(Role::View)),
            (peer(4000, 4000, &[7, 4001]), Some(Role::View)),
            (peer(4100, 4000, &[]), Some(Role::View)),
            (peer(4000, 4001, &[4002]), Some(Role::Operate)),
            (peer(4101, 4000, &[4001]), Some(Role::Operate)),
            (peer(4000, 4000, &[4001, 4002, 4003]), Some(Role::Administer)),
            (peer(4102, 4000, &[]), Some(Role::Administer)),
            // A user is not a group of the same number.
            (peer(4001, 4000, &[]), None),
            (peer(4000, 4100, &[]), None),
            (peer(0, 4000, &[]), Some(Role::Administer)),
        ] {
            assert_eq!(access.role(&peer), role, "{peer:?}");
        }
        assert_eq!(access.role(&peer(geteuid().as_raw(), 4000, &[])), Some(Role::Administer));
    }

    #[test]
    fn cl3_a_name_that_does_not_exist_gives_nobody_anything() {
        let access = access(&["nobody-of-that-name", "@no-such-group"], &[], &["root", "@root"]);
        assert_eq!(access.role(&peer(u32::MAX, u32::MAX, &[])), None);
        assert_eq!(access.role(&peer(4000, 0, &[])), Some(Role::Administer));
    }

    #[test]
    fn only_names_that_are_missing_are_asked_for_again() {
        assert!(access(&["4001", "@4002"], &["root"], &["@root"]).is_whole());
        assert!(!access(&["no-such-user"], &[], &[]).is_whole());
        assert!(!access(&[], &[], &["@no-such-group"]).is_whole());
    }

    #[tokio::test]
    async fn another_fleet_gives_other_roles_at_once() {
        let fleet = |operate: &str| {
            let text = format!(
                "schema = 1\nstore.sources = [{{ root = \"/s\" }}]\naccess.operate = [\"{operate}\"]"
            );
            let host = fleet::limits::HostFacts { cpus: 1, memory: fleet::units::Size(1 << 30) };
            Arc::new(fleet::load("fleet.toml", text.as_bytes(), &host).unwrap().fleet)
        };
        let (current, one, two) = (Arc::new(CurrentAccess::default()), fleet("4001"), fleet("4002"));
        let role = async |fleet, uid| {
            let patience = Duration::from_secs(60);
            current.role(fleet, &peer(uid, 4000, &[]), patience).await.map_err(|error| error.to_string())
        };
        assert_eq!(role(&one, 4001).await, Ok(Some(Role::Operate)));
        assert_eq!(role(&two, 4001).await, Ok(None));
        assert_eq!(role(&two, 4002).await, Ok(Some(Role::Operate)));

        // A directory service that hangs, for a third one.
        let _hangs = current.resolving.lock().await;
        let three = fleet("4001");
        let now =
            async |uid| current.role(&three, &peer(uid, 4000, &[]), Duration::from_millis(10)).await.ok();
        assert_eq!((now(4001).await, now(0).await), (None, Some(Some(Role::Administer))));
    }
}
