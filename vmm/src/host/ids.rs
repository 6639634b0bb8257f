//! Users and groups of VMs' processes: numbers of the host that belong to nobody else, a user for each process and a group for each
//! VM, the same at each start.

use crate::{
    fleet::schema::IdRange,
    state::file::{self, WriteError},
    vm::machine::Part,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// How many numbers a VM takes: its group and first user is the first of them, one user for each process, and some to spare.
pub const PER_VM: u32 = 8;

/// What root takes if the fleet file names no range: room for 8192 VMs where nobody else is by default. systemd gives out numbers up to
/// 1879048191 to containers and from 2147352576 on to images; `/etc/subuid` goes up to 600100000, Incus up to 1001000000, Nix's own
/// up to 880803839, and directory services (SSSD) up to 2000200000. As a signed number of 32 bits it is still positive.
pub const DEFAULT: IdRange = IdRange { first: 2_100_000_000, count: 65_536 };

/// The version of the file's format.
const SCHEMA: u32 = 1;

/// The longest file that is read, in bytes: 8192 VMs with the longest names fit.
const LENGTH_MAX: u64 = 1 << 20;

/// The numbers of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmIds {
    first: u32,
}

impl VmIds {
    /// Its group.
    pub fn gid(self) -> u32 {
        self.first
    }

    /// The user of one of its processes.
    pub fn uid(self, part: Part) -> u32 {
        let offset = match part {
            Part::Hypervisor => 0,
            Part::StoreBackend => 1,
            Part::VsockDevice => 2,
            Part::Shim => 3,
        };
        self.first.saturating_add(offset)
    }
}

/// Why there are no numbers.
#[derive(Debug, thiserror::Error)]
pub enum IdsError {
    /// All are taken.
    #[error(
        "No users are left for VM {vm}: host.ids has {} from {} on, each VM takes {PER_VM}, and {taken} VMs have theirs; give more, or \
         remove directories of VMs that are gone from {}", .range.count, .range.first, .vms.display()
    )]
    Full {
        /// The VM.
        vm: String,
        /// The range.
        range: IdRange,
        /// How many VMs have numbers.
        taken: usize,
        /// Where the directories of VMs are.
        vms: PathBuf,
    },
    /// The user namespace does not have them.
    #[error(
        "host.ids, {} numbers from {} on, is not in /proc/self/{map}: this is a container that has other numbers; name some of them",
        .range.count, .range.first
    )]
    Unmapped {
        /// The range.
        range: IdRange,
        /// The file.
        map: &'static str,
    },
    /// What was given out cannot be read.
    #[error("Cannot read {0}, which says which users VMs have")]
    Read(PathBuf, #[source] io::Error),
    /// What was given out cannot be understood, and must not be given out again.
    #[error(
        "{path}, which says which users VMs have, is damaged: {reason}; where no VM runs it can be removed"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What is given out cannot be written down.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Fails where this process's user namespace does not have all numbers of `range`, so that nothing could be given to them.
pub fn mapped(range: IdRange) -> Result<(), IdsError> {
    for map in ["uid_map", "gid_map"] {
        // Without the file there are no such namespaces.
        let text = std::fs::read_to_string(Path::new("/proc/self").join(map)).unwrap_or_default();
        if !text.is_empty() && !maps(&text, range) {
            return Err(IdsError::Unmapped { range, map });
        }
    }
    Ok(())
}

/// Whether one line of a map (user_namespaces(7): first inside, first outside, how many) has all of `range`.
fn maps(text: &str, range: IdRange) -> bool {
    let end = u64::from(range.first).saturating_add(range.count.into());
    text.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        let (first, _, count) = (numbers.next().unwrap_or(0), numbers.next(), numbers.next().unwrap_or(0));
        first <= range.first.into() && end <= first.saturating_add(count)
    })
}

/// What is on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    schema: u32,
    /// The first number of each VM.
    vms: BTreeMap<String, u32>,
}

/// Who has which numbers.
#[derive(Debug)]
pub struct Ids {
    path: PathBuf,
    /// Where the directories of VMs are, each of which holds its VM's numbers.
    vms: PathBuf,
    range: IdRange,
    table: Mutex<Table>,
}

impl Ids {
    /// Reads who has which numbers of `range` from `path`. A VM keeps its numbers as long as `named` has it or it has a directory
    /// in `vms`: its files must not become another's.
    pub fn open(
        path: &Path,
        vms: &Path,
        range: IdRange,
        named: impl Fn(&str) -> bool,
    ) -> Result<Self, IdsError> {
        let mut table = read(path)?;
        table.vms.retain(|vm, _| named(vm) || vms.join(vm).exists());
        Ok(Self { path: path.into(), vms: vms.into(), range, table: Mutex::new(table) })
    }

    /// The numbers of `vm`, which are written down before they are used. They are those that it had before, if they are in the range.
    pub fn allot(&self, vm: &str) -> Result<VmIds, IdsError> {
        let mut table = self.table();
        if let Some(first) = table.vms.get(vm)
            && inside(self.range, *first)
        {
            return Ok(VmIds { first: *first });
        }
        let first =
            free(self.range, table.vms.iter().filter(|(name, _)| *name != vm).map(|(_, first)| *first));
        let first = first.ok_or_else(|| IdsError::Full {
            vm: vm.into(),
            range: self.range,
            taken: table.vms.len(),
            vms: self.vms.clone(),
        })?;
        let mut changed = table.clone();
        changed.vms.insert(vm.into(), first);
        self.write(&changed)?;
        *table = changed;
        Ok(VmIds { first })
    }

    /// The numbers that `vm` has.
    pub fn of(&self, vm: &str) -> Option<VmIds> {
        self.table().vms.get(vm).map(|first| VmIds { first: *first })
    }

    /// Gives the numbers of a VM back that has stopped and is in no fleet file any more; not while it has a directory.
    pub fn release(&self, vm: &str) -> Result<(), IdsError> {
        let mut table = self.table();
        if self.vms.join(vm).exists() || !table.vms.contains_key(vm) {
            return Ok(());
        }
        let mut changed = table.clone();
        changed.vms.remove(vm);
        self.write(&changed)?;
        *table = changed;
        Ok(())
    }

    fn write(&self, table: &Table) -> Result<(), IdsError> {
        let text = serde_json::to_vec_pretty(table).map_err(|error| WriteError {
            path: self.path.clone(),
            step: "encoding",
            source: error.into(),
        })?;
        Ok(file::replace(&self.path, &text, 0o600)?)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> Result<Table, IdsError> {
    let failed = |error| IdsError::Read(path.into(), error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Table { schema: SCHEMA, vms: BTreeMap::new() });
        }
        Err(error) => return Err(failed(error)),
    };
    let mut text = Vec::new();
    file.take(LENGTH_MAX.saturating_add(1)).read_to_end(&mut text).map_err(failed)?;
    parse(&text).map_err(|reason| IdsError::Damaged { path: path.into(), reason })
}

fn parse(text: &[u8]) -> Result<Table, String> {
    if text.len() as u64 > LENGTH_MAX {
        return Err(format!("it has more than {LENGTH_MAX} bytes"));
    }
    let table: Table = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if table.schema != SCHEMA {
        return Err(format!("it has schema {}, this laird reads {SCHEMA}", table.schema));
    }
    let mut firsts: Vec<_> = table.vms.values().copied().collect();
    firsts.sort_unstable();
    if firsts.first().is_some_and(|first| *first < 1000)
        || firsts.last().is_some_and(|last| last.checked_add(PER_VM).is_none())
    {
        return Err("it has numbers of the system".into());
    }
    if firsts.windows(2).any(|pair| matches!(pair, [a, b] if b - a < PER_VM)) {
        return Err("two VMs have the same numbers in it".into());
    }
    Ok(table)
}

/// Whether a VM's numbers are in a range.
fn inside(range: IdRange, first: u32) -> bool {
    let end = u64::from(range.first) + u64::from(range.count);
    first >= range.first && u64::from(first) + u64::from(PER_VM) <= end
}

/// The first numbers of `range` that are apart from all that are taken. Those may be of another range, so they may begin anywhere.
fn free(range: IdRange, taken: impl Iterator<Item = u32>) -> Option<u32> {
    let mut taken: Vec<_> = taken.collect();
    taken.sort_unstable();
    let mut candidate = range.first;
    for first in taken {
        if first.saturating_add(PER_VM) <= candidate {
            continue;
        }
        if first >= candidate.saturating_add(PER_VM) {
            break;
        }
        candidate = first.checked_add(PER_VM)?;
    }
    inside(range, candidate).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    const RANGE: IdRange = IdRange { first: 70_000, count: 24 };

    fn open(directory: &Path, range: IdRange, named: &[&str]) -> Result<Ids, IdsError> {
        Ids::open(&directory.join("ids.json"), &directory.join("vms"), range, |vm| named.contains(&vm))
    }

    #[test]
    fn a_range_is_in_one_line_of_a_map_or_not_at_all() {
        let range = IdRange { first: 1000, count: 100 };
        assert!(maps("         0          0 4294967295\n", range));
        assert!(maps("0 100000 1\n1000 200000 100\n", range));
        for other in
            ["0 100000 1000", "0 100000 1099", "1001 100000 65536", "1000 200000 50\n1050 9 50", "x", ""]
        {
            assert!(!maps(other, range), "{other}");
        }
        mapped(IdRange { first: 0, count: 1 }).unwrap();
    }

    #[test]
    fn cf2_no_two_vms_have_a_user_or_group_in_common_and_each_keeps_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let ids = open(directory.path(), RANGE, &[]).unwrap();
        let (a, b) = (ids.allot("a").unwrap(), ids.allot("b").unwrap());
        assert_eq!((a.gid(), b.gid()), (70_000, 70_008));
        let parts = [Part::Hypervisor, Part::StoreBackend, Part::VsockDevice, Part::Shim];
        let mut all: Vec<_> = [a, b].iter().flat_map(|ids| parts.map(|part| ids.uid(part))).collect();
        all.dedup();
        assert_eq!(all, [70_000, 70_001, 70_002, 70_003, 70_008, 70_009, 70_010, 70_011]);
        ids.allot("c").unwrap();
        let full = ids.allot("d").unwrap_err().to_string();
        assert!(full.contains("has 24 from 70000 on") && full.contains("3 VMs have theirs"), "{full}");
        // The next laird.
        let ids = open(directory.path(), RANGE, &["a", "b", "c"]).unwrap();
        assert_eq!((ids.allot("b").unwrap(), ids.allot("a").unwrap()), (b, a));
        assert!(ids.allot("d").is_err());
    }

    #[test]
    fn cf2_numbers_are_free_only_when_the_vm_and_its_files_are_gone() {
        let directory = tempfile::tempdir().unwrap();
        let ids = open(directory.path(), RANGE, &[]).unwrap();
        let a = ids.allot("a").unwrap();
        fs::create_dir_all(directory.path().join("vms/a")).unwrap();
        ids.release("a").unwrap();
        assert_eq!(ids.of("a"), Some(a));
        assert_ne!(ids.allot("b").unwrap(), a);
        let ids = open(directory.path(), RANGE, &[]).unwrap();
        assert_eq!((ids.of("a"), ids.of("b")), (Some(a), None));
        fs::remove_dir(directory.path().join("vms/a")).unwrap();
        ids.release("a").unwrap();
        ids.release("never seen").unwrap();
        assert_eq!(ids.allot("c").unwrap(), a);
    }

    #[test]
    fn cf2_another_range_gives_new_numbers_apart_from_those_that_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        open(directory.path(), RANGE, &[]).unwrap().allot("a").unwrap();
        // It begins in the midst of what a has.
        let ids = open(directory.path(), IdRange { first: 70_003, count: 100 }, &["a"]).unwrap();
        assert_eq!(ids.allot("b").unwrap().gid(), 70_008);
        assert_eq!(ids.allot("a").unwrap().gid(), 70_016);
    }

    #[test]
    fn sv3_a_damaged_file_is_an_error_never_a_guess() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ids.json");
        let ids = open(directory.path(), RANGE, &[]).unwrap();
        ids.allot("a").unwrap();
        let text = fs::read(&path).unwrap();
        for length in 0..text.len() {
            fs::write(&path, &text[..length]).unwrap();
            assert!(
                matches!(open(directory.path(), RANGE, &[]), Err(IdsError::Damaged { .. })),
                "cut at {length}"
            );
        }
        for vms in [r#"{"a": 70000, "b": 70007}"#, r#"{"a": 0}"#, r#"{"a": 4294967295}"#] {
            fs::write(&path, format!(r#"{{"schema": 1, "vms": {vms}}}"#)).unwrap();
            assert!(matches!(open(directory.path(), RANGE, &[]), Err(IdsError::Damaged { .. })), "{vms}");
        }
        fs::write(&path, r#"{"schema": 2, "vms": {}}"#).unwrap();
        let error = open(directory.path(), RANGE, &[]).unwrap_err().to_string();
        assert!(error.contains("it has schema 2, this laird reads 1"), "{error}");
    }

    #[test]
    fn what_cannot_be_written_down_is_not_given_out() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let ids = open(&missing, RANGE, &[]).unwrap();
        assert!(matches!(ids.allot("a"), Err(IdsError::Write(_))));
        assert_eq!(ids.of("a"), None);
    }

    proptest! {
        #[test]
        fn cf2_free_numbers_are_in_the_range_and_apart_from_all_others(
            taken in proptest::collection::vec(69_900_u32..70_200, 0..30), first in 69_950_u32..70_100, count in 8_u32..200,
        ) {
            let range = IdRange { first, count };
            if let Some(found) = free(range, taken.iter().copied()) {
                prop_assert!(inside(range, found));
                prop_assert!(taken.iter().all(|other| found.abs_diff(*other) >= PER_VM));
            }
        }
    }
}
