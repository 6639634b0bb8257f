//! Store paths: `/nix/store/HASH-NAME`.

use std::fmt;
use thiserror::Error;

/// The logical store directory. Closures of other store directories cannot be mixed with these.
pub const STORE_DIR: &str = "/nix/store";

/// Characters of the hash part.
const HASH_LEN: usize = 32;

/// Nix's base 32: digits and letters without e, o, t and u.
static BASE32: Set = set(b"0123456789abcdfghijklmnpqrsvwxyz");

/// What may be in a name.
static NAME: Set = set(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-._?=");

/// Which bytes are in a set. A table, since a view has thousands of paths, and a backend reads one before its first answer.
type Set = [bool; 256];

#[allow(clippy::indexing_slicing)] // When compiled, and any byte is below 256.
const fn set(mut members: &[u8]) -> Set {
    let mut set = [false; 256];
    while let [first, rest @ ..] = members {
        set[*first as usize] = true;
        members = rest;
    }
    set
}

/// Whether a text has no others than these.
fn all_in(set: &Set, text: &str) -> bool {
    text.bytes().all(|byte| set.get(usize::from(byte)) == Some(&true))
}

/// The most characters that Nix allows in the name part.
const NAME_MAX: usize = 211;

/// A valid store path, kept as its last component (`HASH-NAME`); shown as the whole logical path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath(Box<str>);

/// Why a string is not a store path.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StorePathError {
    /// Not directly below `/nix/store`.
    #[error("{0:?} is not a path directly below {STORE_DIR}")]
    Directory(String),
    /// The hash part is wrong.
    #[error("{0:?} does not begin with {HASH_LEN} characters of Nix's base 32 and a hyphen")]
    Hash(String),
    /// The name part is empty or too long.
    #[error("The name in {0:?} has {1} characters; 1 to {NAME_MAX} are allowed")]
    NameLength(String, usize),
    /// The name part has a character that Nix does not allow.
    #[error("The name in {0:?} has other characters than letters, digits and +-._?=")]
    NameCharacter(String),
    /// The name part is a dot, two dots, or one of them and a hyphen.
    #[error("The name in {0:?} begins with a path component of dots")]
    NameDots(String),
}

impl StorePath {
    /// Parses a whole logical path. Files below a store path are refused.
    pub fn parse(path: &str) -> Result<Self, StorePathError> {
        path.strip_prefix(STORE_DIR)
            .and_then(|rest| rest.strip_prefix('/'))
            .filter(|base| !base.contains('/'))
            .ok_or_else(|| StorePathError::Directory(shortened(path)))
            .and_then(Self::from_base_name)
    }

    /// Parses `HASH-NAME`.
    pub fn from_base_name(base: &str) -> Result<Self, StorePathError> {
        let (hash, name) = base
            .split_at_checked(HASH_LEN)
            .filter(|(hash, _)| all_in(&BASE32, hash))
            .and_then(|(hash, rest)| Some((hash, rest.strip_prefix('-')?)))
            .ok_or_else(|| StorePathError::Hash(shortened(base)))?;
        debug_assert_eq!(hash.len(), HASH_LEN);
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(StorePathError::NameLength(shortened(base), name.len()));
        }
        if !all_in(&NAME, name) {
            return Err(StorePathError::NameCharacter(shortened(base)));
        }
        if matches!(name.as_bytes(), b"." | b".." | [b'.', b'-', ..] | [b'.', b'.', b'-', ..]) {
            return Err(StorePathError::NameDots(shortened(base)));
        }
        Ok(Self(base.into()))
    }

    /// `HASH-NAME`.
    pub fn base_name(&self) -> &str {
        &self.0
    }
}

/// Enough of a hostile string to recognise it by.
fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE_DIR}/{}", self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "0123456789abcdfghijklmnpqrsvwxyz";

    #[test]
    fn accepts_what_nix_makes() {
        for name in ["hello-2.12", "a", ".hidden", "..a", "x?y=z+1_2", &"n".repeat(211)] {
            let text = format!("/nix/store/{HASH}-{name}");
            let path = StorePath::parse(&text).unwrap();
            assert_eq!(path.to_string(), text);
            assert_eq!(path.base_name(), &text[11..]);
        }
    }

    #[test]
    fn refuses_everything_else() {
        use StorePathError as E;
        type Is = fn(&E) -> bool;
        let directory: Is = |e| matches!(e, E::Directory(_));
        let hash: Is = |e| matches!(e, E::Hash(_));
        let length: Is = |e| matches!(e, E::NameLength(..));
        let character: Is = |e| matches!(e, E::NameCharacter(_));
        let dots: Is = |e| matches!(e, E::NameDots(_));
        for (text, is) in [
            (String::new(), directory),
            ("/nix/store".into(), directory),
            (format!("/nix/store/{HASH}-a/b"), directory),
            (format!("/nix/store/../store/{HASH}-a"), directory),
            (format!("/gnu/store/{HASH}-a"), directory),
            (format!("{HASH}-a"), directory),
            ("/nix/store/".into(), hash),
            ("/nix/store/.links".into(), hash),
            (format!("/nix/store/{HASH}"), hash),
            (format!("/nix/store/{HASH}a-b"), hash),
            (format!("/nix/store/{}-b", HASH.replace('0', "e")), hash),
            (format!("/nix/store/{}-b", HASH.replace('0', "A")), hash),
            (format!("/nix/store/{}é-b", &HASH[..31]), hash),
            (format!("/nix/store/{HASH}-"), length),
            (format!("/nix/store/{HASH}-{}", "n".repeat(212)), length),
            (format!("/nix/store/{HASH}-a b"), character),
            (format!("/nix/store/{HASH}-a\n"), character),
            (format!("/nix/store/{HASH}-é"), character),
            (format!("/nix/store/{HASH}-."), dots),
            (format!("/nix/store/{HASH}-.."), dots),
            (format!("/nix/store/{HASH}-..-a"), dots),
        ] {
            let error = StorePath::parse(&text).expect_err(&text);
            assert!(is(&error), "{text:?}: {error}");
        }
    }
}
