//! What the kernel says in the files of a cgroup (pure, bounded).
//!
//! Unknown keys are passed over: newer kernels say more. What is known and damaged is an error, never a guess.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use super::values::Device;
use crate::fleet::{schema::IoLimits, units::Size};
use std::collections::BTreeMap;

/// The longest file of a cgroup that is read, in bytes. `io.max` has a line of about 60 bytes for each device, `cgroup.procs` one of at
/// most 8 for each process.
pub const LENGTH_MAX: u64 = 256 << 10;

/// What is not as the kernel writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// A key that has to be there is not.
    #[error("has no \"{0}\"")]
    Missing(&'static str),
    /// A value is no number.
    #[error("has a \"{0}\" that is not a whole number")]
    NotANumber(&'static str),
    /// A line cannot be understood.
    #[error("has a line that cannot be understood: {0:?}")]
    Line(String),
}

/// The number behind `key` in lines of a key and a number.
fn number(text: &str, key: &'static str) -> Result<Option<u64>, ParseError> {
    for line in text.lines() {
        if let Some((name, value)) = line.split_once(' ')
            && name == key
        {
            return value.trim().parse().map(Some).map_err(|_| ParseError::NotANumber(key));
        }
    }
    Ok(None)
}

fn needed(text: &str, key: &'static str) -> Result<u64, ParseError> {
    number(text, key)?.ok_or(ParseError::Missing(key))
}

/// `memory.events`: how often something has happened since the cgroup was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Memory was wanted beyond `memory.max`, and something was reclaimed or failed.
    pub max: u64,
    /// Reclaiming did not help.
    pub oom: u64,
    /// Processes killed for want of memory.
    pub oom_kill: u64,
    /// The whole cgroup killed for it; 0 where the kernel does not say (before 5.17).
    pub oom_group_kill: u64,
}

/// Reads `memory.events`.
pub fn memory_events(text: &str) -> Result<MemoryEvents, ParseError> {
    Ok(MemoryEvents {
        max: needed(text, "max")?,
        oom: needed(text, "oom")?,
        oom_kill: needed(text, "oom_kill")?,
        oom_group_kill: number(text, "oom_group_kill")?.unwrap_or_default(),
    })
}

/// `cpu.stat`, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuStat {
    /// Time on processors.
    pub usage_us: u64,
    /// Of that, in user mode.
    pub user_us: u64,
    /// Of that, in the kernel.
    pub system_us: u64,
    /// Time that was held back by `cpu.max`.
    pub throttled_us: u64,
}

/// Reads `cpu.stat`.
pub fn cpu_stat(text: &str) -> Result<CpuStat, ParseError> {
    Ok(CpuStat {
        usage_us: needed(text, "usage_usec")?,
        user_us: needed(text, "user_usec")?,
        system_us: needed(text, "system_usec")?,
        // Without the cpu controller there is no such line.
        throttled_us: number(text, "throttled_usec")?.unwrap_or_default(),
    })
}

/// `cgroup.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupEvents {
    /// Whether there is a process in it or below.
    pub populated: bool,
    /// Whether all of it has stopped.
    pub frozen: bool,
}

/// Reads `cgroup.events`.
pub fn cgroup_events(text: &str) -> Result<CgroupEvents, ParseError> {
    Ok(CgroupEvents {
        populated: needed(text, "populated")? != 0,
        frozen: number(text, "frozen")?.unwrap_or_default() != 0,
    })
}

/// A file of one number, such as `pids.current` and `memory.current`. `max` is no number.
pub fn single(text: &str) -> Result<u64, ParseError> {
    text.trim().parse().map_err(|_| ParseError::Line(cut(text)))
}

/// One line of a pressure file: shares of time in which tasks waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stalls {
    /// Over the last 10 s, in hundredths of a percent.
    pub avg10: u32,
    /// Over the last minute, in hundredths of a percent.
    pub avg60: u32,
    /// All of it, in microseconds.
    pub total_us: u64,
}

/// `memory.pressure`, `cpu.pressure` or `io.pressure`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Some of its tasks waited.
    pub some: Stalls,
    /// All of them did; none for processors on old kernels.
    pub full: Stalls,
}

/// Reads a pressure file (PSI).
pub fn pressure(text: &str) -> Result<Pressure, ParseError> {
    let mut pressure = Pressure::default();
    let mut seen = false;
    for line in text.lines() {
        let Some((kind, rest)) = line.split_once(' ') else { return Err(ParseError::Line(cut(line))) };
        let stalls = match kind {
            "some" => &mut pressure.some,
            "full" => &mut pressure.full,
            _ => continue,
        };
        *stalls = stalled(rest).ok_or_else(|| ParseError::Line(cut(line)))?;
        seen |= kind == "some";
    }
    if seen { Ok(pressure) } else { Err(ParseError::Missing("some")) }
}

fn stalled(text: &str) -> Option<Stalls> {
    let fields: BTreeMap<&str, &str> =
        text.split_ascii_whitespace().filter_map(|field| field.split_once('=')).take(16).collect();
    Some(Stalls {
        avg10: hundredths(fields.get("avg10")?)?,
        avg60: hundredths(fields.get("avg60")?)?,
        total_us: fields.get("total")?.parse().ok()?,
    })
}

/// `12.34` as 1234.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, part) = text.split_once('.')?;
    if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

/// `io.max`: the limits of each device that has any.
pub fn io_max(text: &str) -> Result<BTreeMap<Device, IoLimits>, ParseError> {
    text.lines().map(|line| device_limits(line).ok_or_else(|| ParseError::Line(cut(line)))).collect()
}

fn device_limits(line: &str) -> Option<(Device, IoLimits)> {
    let mut fields = line.split_ascii_whitespace();
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let mut limits = IoLimits::default();
    for (key, value) in fields.map(|field| field.split_once('=')).collect::<Option<Vec<_>>>()? {
        if value == "max" {
            continue;
        }
        let value: u64 = value.parse().ok()?;
        match key {
            "rbps" => limits.read = Some(Size(value)),
            "wbps" => limits.write = Some(Size(value)),
            "riops" => limits.read_ops = Some(u32::try_from(value).ok()?),
            "wiops" => limits.write_ops = Some(u32::try_from(value).ok()?),
            _ => {}
        }
    }
    Some((device, limits))
}

/// Process ids of `cgroup.procs`. A 0 is a process of another namespace: it can be neither named nor signalled, and is left out.
pub fn processes(text: &str) -> Result<Vec<i32>, ParseError> {
    let ids = text.lines().map(|line| line.parse::<i32>().map_err(|_| ParseError::Line(cut(line))));
    Ok(ids.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|pid| *pid > 0).collect())
}

fn cut(line: &str) -> String {
    line.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cg2_memory_events_of_old_and_new_kernels() {
        let old = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n";
        assert_eq!(memory_events(old), Ok(MemoryEvents { max: 12, oom: 3, oom_kill: 2, oom_group_kill: 0 }));
        let new = format!("{old}oom_group_kill 1\nsock_throttled 0\n");
        assert_eq!(memory_events(&new).unwrap().oom_group_kill, 1);
        assert_eq!(memory_events("low 0\n"), Err(ParseError::Missing("max")));
        assert_eq!(memory_events("max x\noom 1\noom_kill 1"), Err(ParseError::NotANumber("max")));
        assert_eq!(memory_events("max -1\n"), Err(ParseError::NotANumber("max")));
    }

    #[test]
    fn pressure_in_hundredths() {
        let text = "some avg10=1.23 avg60=100.00 avg300=0.05 total=123456\nfull avg10=0.07 avg60=0.00 avg300=0.00 total=7\n";
        let read = pressure(text).unwrap();
        assert_eq!((read.some.avg10, read.some.avg60, read.some.total_us), (123, 10000, 123_456));
        assert_eq!((read.full.avg10, read.full.total_us), (7, 7));
        for damaged in [
            "",
            "some",
            "some avg10=1 avg60=1.00 total=1",
            "full avg10=0.00 avg60=0.00 total=0",
            "some avg10=99999999999.00 avg60=0.00 total=0",
        ] {
            assert!(pressure(damaged).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn cpu_time_with_and_without_the_controller() {
        let text = "usage_usec 30\nuser_usec 20\nsystem_usec 10\n";
        assert_eq!(cpu_stat(text), Ok(CpuStat { usage_us: 30, user_us: 20, system_us: 10, throttled_us: 0 }));
        assert_eq!(cpu_stat(&format!("{text}nr_periods 1\nthrottled_usec 5\n")).unwrap().throttled_us, 5);
    }

    #[test]
    fn events_and_single_numbers() {
        assert_eq!(
            cgroup_events("populated 1\nfrozen 0\n"),
            Ok(CgroupEvents { populated: true, frozen: false })
        );
        assert_eq!(cgroup_events("frozen 0\n"), Err(ParseError::Missing("populated")));
        assert_eq!(single("42\n"), Ok(42));
        assert!(single("max\n").is_err() && single("").is_err());
        assert_eq!(processes("12\n0\n7\n"), Ok(vec![12, 7]));
        assert!(processes("12\nx\n").is_err());
        assert_eq!(processes(""), Ok(vec![]));
    }

    #[test]
    fn cg5_io_limits_come_back_as_they_were_written() {
        let limits = IoLimits { read: Some(Size(1 << 20)), write_ops: Some(7), ..IoLimits::default() };
        let device = Device { major: 8, minor: 16 };
        let text = format!(
            "{}\n259:1 rbps=max wbps=5 riops=max wiops=max\n",
            super::super::values::io_max(device, &limits)
        );
        let read = io_max(&text).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read[&device], limits);
        assert_eq!(io_max(""), Ok(BTreeMap::new()));
        for damaged in ["8:16 rbps", "8 rbps=1", "8:x rbps=1", "8:16 rbps=-1", "\n"] {
            assert!(io_max(damaged).is_err(), "{damaged:?}");
        }
    }

    proptest! {
        /// No content makes a parser panic, and an error repeats no more than a line's beginning.
        #[test]
        fn cg9_any_text_is_read_or_refused(text in "[a-z_0-9 .:=\\n-]{0,400}|\\PC{0,200}") {
            let errors = [
                memory_events(&text).err(), cpu_stat(&text).err(), cgroup_events(&text).err(), single(&text).err(),
                pressure(&text).err(), io_max(&text).err(), processes(&text).err(),
            ];
            for error in errors.into_iter().flatten() {
                prop_assert!(error.to_string().chars().count() < 1000);
            }
        }

        #[test]
        fn cg5_any_io_limits_come_back(read in proptest::option::of(0_u64..=i64::MAX as u64), ops in proptest::option::of(any::<u32>()), major in any::<u32>(), minor in any::<u32>()) {
            let limits = IoLimits { read: read.map(Size), read_ops: ops, ..IoLimits::default() };
            let device = Device { major, minor };
            let text = super::super::values::io_max(device, &limits);
            prop_assert_eq!(io_max(&text).unwrap(), BTreeMap::from([(device, limits)]));
        }
    }
}
