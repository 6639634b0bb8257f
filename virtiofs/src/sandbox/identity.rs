//! Who the program is: a uid of its own, no groups besides its gid, no capabilities.

use caps::{CapSet, Capability, errors::CapsError};
use nix::{
    errno::Errno,
    unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid},
};
use thiserror::Error;

/// The uid and gid `nobody` of most systems, for a program that was started as root without being told what to become.
pub(super) const NOBODY: u32 = 65534;

/// Whom to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// These ids, which nothing else should have.
    Own {
        /// The user.
        uid: u32,
        /// Its only group.
        gid: u32,
    },
    /// 65534, which others may be too.
    Shared,
    /// The user who started the program, since only root can change that.
    Unchanged,
}

/// Why ids cannot be chosen or changed.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// Ids were given by one who is not root.
    #[error("Only root can give this program other ids; uid {0} cannot")]
    NotRoot(Uid),
    /// Root was given.
    #[error("uid {uid} with gid {gid} is not possible: 0 is root's; 1 and above are")]
    Root {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
    /// A system call failed.
    #[error("Cannot become uid {uid} with gid {gid}; in a user namespace, both must be mapped")]
    Change {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// Why.
        source: Errno,
    },
    /// Capabilities remain.
    #[error("Cannot give up all capabilities")]
    Capabilities(#[source] CapsError),
}

impl Identity {
    /// What becomes of a program for which these ids were asked, or none.
    pub fn choose(ids: Option<(u32, u32)>) -> Result<Self, IdentityError> {
        Self::of(geteuid(), ids)
    }

    fn of(user: Uid, ids: Option<(u32, u32)>) -> Result<Self, IdentityError> {
        match ids {
            None if user.is_root() => Ok(Self::Shared),
            None => Ok(Self::Unchanged),
            Some(_) if !user.is_root() => Err(IdentityError::NotRoot(user)),
            Some((uid, gid)) if uid == 0 || gid == 0 => Err(IdentityError::Root { uid, gid }),
            Some((uid, gid)) => Ok(Self::Own { uid, gid }),
        }
    }

    /// Becomes it, in this thread, and gives up all capabilities.
    pub(super) fn assume(self) -> Result<(), IdentityError> {
        // Takes a capability, which only root has. Without this, nothing could come of the set either, for want of new privileges.
        if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)
            .map_err(IdentityError::Capabilities)?
        {
            caps::clear(None, CapSet::Bounding).map_err(IdentityError::Capabilities)?;
        }
        match self {
            Self::Own { uid, gid } => change(uid, gid)?,
            Self::Shared => change(NOBODY, NOBODY)?,
            Self::Unchanged => {}
        }
        for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
            caps::clear(None, set).map_err(IdentityError::Capabilities)?;
        }
        Ok(())
    }
}

fn change(uid: u32, gid: u32) -> Result<(), IdentityError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|source| IdentityError::Change { uid, gid, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_chooses_and_never_root() {
        let (root, user) = (Uid::from_raw(0), Uid::from_raw(1000));
        assert_eq!(Identity::of(root, None).unwrap(), Identity::Shared);
        assert_eq!(Identity::of(root, Some((7, 8))).unwrap(), Identity::Own { uid: 7, gid: 8 });
        assert!(matches!(Identity::of(root, Some((0, 8))), Err(IdentityError::Root { .. })));
        assert!(matches!(Identity::of(root, Some((7, 0))), Err(IdentityError::Root { .. })));
        assert_eq!(Identity::of(user, None).unwrap(), Identity::Unchanged);
        assert!(matches!(Identity::of(user, Some((1000, 1000))), Err(IdentityError::NotRoot(_))));
    }
}
