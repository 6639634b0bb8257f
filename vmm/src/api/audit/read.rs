//! Reading the audit logs: `laird`'s own and those of all shims, as one, by time.

use super::limits;
use crate::{api::types::AuditRecord, state::dirs::Dirs};
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The file before the one at `path`.
pub(in crate::api) fn before(path: &Path) -> PathBuf {
    crate::api::log::rotated(path)
}

/// What to read.
#[derive(Debug, Clone, Default)]
pub(in crate::api) struct Wanted {
    /// Only records of this time and later.
    pub(in crate::api) since: Option<Timestamp>,
    /// Only records that are about this VM.
    pub(in crate::api) vm: Option<String>,
}

/// One log, and how far it has been read.
struct Source {
    vm: Option<String>,
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// A line whose end has not come.
    part: Vec<u8>,
}

/// All logs, and how far they have been read.
pub(in crate::api) struct Reader {
    dirs: Dirs,
    wanted: Wanted,
    sources: Vec<Source>,
    /// Tells records of the same time apart.
    number: u64,
}

/// Records by time.
type Sorted = BTreeMap<(Timestamp, u64), AuditRecord>;

impl Reader {
    /// A reader of all logs below `dirs`.
    pub(in crate::api) fn new(dirs: Dirs, wanted: Wanted) -> Self {
        Self { dirs, wanted, sources: Vec::new(), number: 0 }
    }

    /// The newest `most` records that were not read before, oldest first, and how many older ones were left out. It reads files; memory
    /// is bounded by `most`.
    pub(in crate::api) fn next(&mut self, most: usize) -> (Vec<AuditRecord>, u64) {
        self.look();
        let (mut sorted, mut omitted) = (Sorted::new(), 0_u64);
        for source in &mut self.sources {
            let vm = source.vm.clone();
            source.lines(|line| {
                let Some(record) = record(line, vm.as_deref()) else { return };
                if !self.wanted.wants(&record) {
                    return;
                }
                sorted.insert((record.time, self.number), record);
                self.number = self.number.wrapping_add(1);
                if sorted.len() > most {
                    sorted.pop_first();
                    omitted = omitted.saturating_add(1);
                }
            });
        }
        (sorted.into_values().collect(), omitted)
    }

    /// Finds the logs; those of VMs that the fleet no longer has as well.
    fn look(&mut self) {
        let mut found = vec![(None, self.dirs.audit_log())];
        let vms = fs::read_dir(self.dirs.state.join("vms")).into_iter().flatten().flatten();
        for entry in vms {
            if let Ok(name) = entry.file_name().into_string() {
                found.push((Some(name), entry.path().join("audit.jsonl")));
            }
        }
        for (vm, path) in found {
            if !self.sources.iter().any(|source| source.path == path) {
                self.sources.push(Source { vm, path, file: None, part: Vec::new() });
            }
        }
    }
}

impl Wanted {
    fn wants(&self, record: &AuditRecord) -> bool {
        let since = self.since.is_none_or(|since| record.time >= since);
        let about = |vm: &str| {
            let field = |key: &str| record.fields.get(key).and_then(Value::as_str) == Some(vm);
            ["vm", "from", "to"].into_iter().any(field)
        };
        since && self.vm.as_deref().is_none_or(about)
    }
}

impl Source {
    /// Tells every line that was not told before. A log that cannot be read has none.
    fn lines(&mut self, mut tell: impl FnMut(&[u8])) {
        if self.file.is_none() {
            if let Ok(file) = File::open(before(&self.path)) {
                let _ = drain(&mut BufReader::new(file), &mut Vec::new(), &mut tell);
            }
            self.file = File::open(&self.path).ok().map(BufReader::new);
        }
        let Some(file) = &mut self.file else { return };
        let _ = drain(file, &mut self.part, &mut tell);
        // Another file has its name: the last look at this one was before the rotation, or was just now.
        let is = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
        let now = fs::metadata(&self.path).map(|m| (m.dev(), m.ino())).ok();
        if now.is_some() && now != is(file.get_ref()) {
            let _ = drain(file, &mut self.part, &mut tell);
            self.part.clear();
            self.file = File::open(&self.path).ok().map(BufReader::new);
            if let Some(file) = &mut self.file {
                let _ = drain(file, &mut self.part, &mut tell);
            }
        }
    }
}

/// Tells each whole line. One that is too long for a record is read past.
fn drain(file: &mut BufReader<File>, part: &mut Vec<u8>, tell: &mut impl FnMut(&[u8])) -> io::Result<()> {
    loop {
        let room = limits::AUDIT_LINE.saturating_sub(u64::try_from(part.len()).unwrap_or(u64::MAX));
        let read = file.by_ref().take(room).read_until(b'\n', part)?;
        if part.ends_with(b"\n") {
            tell(part);
            part.clear();
        } else if u64::try_from(part.len()).unwrap_or(u64::MAX) >= limits::AUDIT_LINE {
            part.clear();
            file.skip_until(b'\n')?;
        } else if read == 0 {
            return Ok(());
        }
    }
}

/// A line as a record; `None` if it is none. A shim knows itself by no name, so `vm` is whose log it is in.
fn record(line: &[u8], vm: Option<&str>) -> Option<AuditRecord> {
    let mut fields: Map<String, Value> = serde_json::from_slice(line).ok()?;
    let time = fields.remove("time")?.as_str()?.parse().ok()?;
    let source = match vm {
        Some(vm) => {
            fields.entry("vm").or_insert_with(|| vm.into());
            "shim"
        }
        None => "laird",
    };
    Some(AuditRecord { time, source: source.into(), fields })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn append(path: &Path, lines: &[&str]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        for line in lines {
            writeln!(file, "{line}").unwrap();
        }
    }

    fn at(second: u32, what: &str) -> String {
        format!("{{\"time\":\"2026-01-01T00:00:{second:02}Z\",{what}}}")
    }

    fn told(records: &[AuditRecord]) -> Vec<String> {
        records
            .iter()
            .map(|r| format!("{} {} {}", r.time.as_second() % 60, r.source, Value::from(r.fields.clone())))
            .collect()
    }

    #[test]
    fn all_logs_are_one_by_time_and_are_followed_across_rotations() {
        let directory = tempfile::tempdir().unwrap();
        let dirs = Dirs { state: directory.path().join("state"), run: directory.path().join("run") };
        let shim = dirs.state.join("vms/builder/audit.jsonl");
        append(&before(&dirs.audit_log()), &[&at(1, "\"verb\":\"start\",\"vm\":\"builder\"")]);
        append(&dirs.audit_log(), &["not a record", &at(5, "\"verb\":\"apply\""), "{\"time\":3}"]);
        append(&shim, &[&at(3, "\"kind\":\"link\",\"from\":\"builder\",\"to\":\"cache\"")]);
        append(&shim, &[&format!("\"{}\"", "x".repeat(200 << 10)), &at(7, "\"kind\":\"exec\"")]);
        let mut reader = Reader::new(dirs.clone(), Wanted::default());
        let (records, omitted) = reader.next(3);
        insta::assert_snapshot!(told(&records).join("\n"), @r#"
        3 shim {"from":"builder","kind":"link","to":"cache","vm":"builder"}
        5 laird {"verb":"apply"}
        7 shim {"kind":"exec","vm":"builder"}
        "#);
        assert_eq!(omitted, 1);
        assert!(reader.next(9).0.is_empty());

        // What comes later: behind a rotation, in halves, of a VM that is new.
        append(&dirs.audit_log(), &[&at(8, "\"verb\":\"stop\"")]);
        fs::rename(dirs.audit_log(), before(&dirs.audit_log())).unwrap();
        append(&dirs.audit_log(), &[&at(9, "\"verb\":\"kill\"")]);
        append(&dirs.state.join("vms/cache/audit.jsonl"), &[&at(10, "\"kind\":\"connect\"")]);
        let half = at(11, "\"kind\":\"exec\"");
        fs::OpenOptions::new().append(true).open(&shim).unwrap().write_all(&half.as_bytes()[..20]).unwrap();
        assert_eq!(told(&reader.next(9).0).len(), 3);
        append(&shim, &[&half[20..]]);
        insta::assert_snapshot!(told(&reader.next(9).0).join("\n"), @r#"11 shim {"kind":"exec","vm":"builder"}"#);

        let since = Some("2026-01-01T00:00:07Z".parse().unwrap());
        let count = |wanted| Reader::new(dirs.clone(), wanted).next(99).0.len();
        assert_eq!(count(Wanted { since, vm: None }), 5);
        assert_eq!(count(Wanted { since: None, vm: Some("cache".into()) }), 2);
        assert_eq!(count(Wanted { since, vm: Some("builder".into()) }), 2);
    }
}
