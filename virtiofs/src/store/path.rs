//! Store paths: `/nix/store/HASH-NAME`.

use std::{fmt, str::FromStr};

/// The logical store directory. Where a store's files really are is its source's business.
pub const STORE_DIR: &str = "/nix/store";

/// The characters of Nix's base 32: digits and letters without e, o, t, u.
const BASE32: &[u8] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Characters of the hash.
const HASH_LENGTH: usize = 32;

/// The longest name behind the hash, in bytes.
const NAME_MAX: usize = 211;

/// A store path that has the form of one; whether it is valid, a database knows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath(String);

/// Why a text is no store path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It is not directly below the store.
    #[error("{0:?} is not directly below {STORE_DIR}")]
    Outside(String),
    /// It does not begin with a hash.
    #[error("{0:?} does not begin with {HASH_LENGTH} characters of Nix's base 32 and a hyphen")]
    Hash(String),
    /// The name behind the hash is not legal.
    #[error(
        "{0:?} has no legal name behind its hash: 1 to {NAME_MAX} letters, digits and +-._?=, not beginning with a dot"
    )]
    Name(String),
}

impl StorePath {
    /// The last component: `HASH-NAME`.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Reads the last component.
    pub fn from_name(name: &str) -> Result<Self, PathError> {
        let wrong_hash = || PathError::Hash(name.into());
        let (hash, rest) = name.split_at_checked(HASH_LENGTH).ok_or_else(wrong_hash)?;
        let rest = rest.strip_prefix('-').ok_or_else(wrong_hash)?;
        if !hash.bytes().all(|byte| BASE32.contains(&byte)) {
            return Err(wrong_hash());
        }
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
        if rest.is_empty() || rest.len() > NAME_MAX || rest.starts_with('.') || !rest.bytes().all(legal) {
            return Err(PathError::Name(name.into()));
        }
        Ok(Self(name.into()))
    }
}

impl FromStr for StorePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        let outside = || PathError::Outside(text.into());
        let name =
            text.strip_prefix(STORE_DIR).and_then(|rest| rest.strip_prefix('/')).ok_or_else(outside)?;
        if name.contains('/') {
            return Err(outside());
        }
        Self::from_name(name)
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE_DIR}/{}", self.0)
    }
}

/// The store path that a path is or is below, such as that of `/nix/store/…-linux/bzImage`.
pub fn containing(path: &str) -> Result<StorePath, PathError> {
    let outside = || PathError::Outside(path.into());
    let rest = path.strip_prefix(STORE_DIR).and_then(|rest| rest.strip_prefix('/')).ok_or_else(outside)?;
    StorePath::from_name(rest.split('/').next().unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "8dcjj3nb5fpma8n2wbrqghgdsjyx1ya4";

    #[test]
    fn a_store_path_round_trips() {
        let text = format!("/nix/store/{HASH}-busybox-1.37.0+b9");
        let path: StorePath = text.parse().unwrap();
        assert_eq!(path.to_string(), text);
        assert_eq!(containing(&format!("{text}/bin/sh")).unwrap(), path);
    }

    #[test]
    fn what_is_no_store_path_is_refused() {
        for name in [
            "",
            "x",
            "busybox",
            HASH,
            &format!("{HASH}-"),
            &format!("{HASH}-.hidden"),
            &format!("{HASH}-a b"),
            &format!("{HASH}-a/b"),
            &format!("{HASH}-a\n"),
            &format!("{}-a", HASH.replace('8', "e")),
            &format!("{HASH}-{}", "n".repeat(212)),
            &format!("{}é-a", &HASH[..31]),
            "..",
            &format!("{HASH}-\0"),
        ] {
            assert!(format!("/nix/store/{name}").parse::<StorePath>().is_err(), "{name:?}");
        }
        for text in [format!("/nix/storage/{HASH}-a"), format!("{HASH}-a"), format!("/nix/store//{HASH}-a")] {
            assert!(text.parse::<StorePath>().is_err(), "{text}");
        }
    }
}
