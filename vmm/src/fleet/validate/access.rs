//! The lists of users and groups.

use super::{Path, Unique, Verdict};
use crate::fleet::{
    names,
    problem::{Finding, Spot},
    schema::Access,
};

/// The most names of one list.
const NAMES_MAX: usize = 256;

pub(super) fn check(access: &Access, path: &Path, verdict: &mut Verdict) {
    for (key, list) in
        [("view", &access.view), ("operate", &access.operate), ("administer", &access.administer)]
    {
        let path = path.key(key);
        if list.len() > NAMES_MAX {
            let message = format!("has {} names; at most {NAMES_MAX} are allowed", list.len());
            verdict.error(Finding::at(&path, message));
        }
        let mut seen = Unique::new();
        for (index, name) in list.iter().enumerate().take(NAMES_MAX) {
            let path = path.index(index);
            verdict.value(&path, names::user(name.strip_prefix('@').unwrap_or(name)));
            if let Some(first) = seen.insert(name, &path) {
                verdict.error(Finding::at(&path, "is given twice").other(Spot::Value(first)));
            }
        }
    }
}
