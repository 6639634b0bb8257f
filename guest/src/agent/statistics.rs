//! The guest's figures, from `/proc`.

use crate::handshake::unix_ms;
use lair_guest::wire::message::Statistics;
use std::fs;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(super) enum StatisticsError {
    #[error("Could not read `{path}`")]
    Read {
        path: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("`{0}` is not as this agent knows it")]
    Unknown(&'static str),
}

/// The figures of this moment.
pub(super) fn read() -> Result<Statistics, StatisticsError> {
    let memory = text("/proc/meminfo")?;
    let unknown = StatisticsError::Unknown;
    let field = |name| memory_field(&memory, name).ok_or(unknown("/proc/meminfo"));
    Ok(Statistics {
        memory_total: field("MemTotal:")?,
        memory_available: field("MemAvailable:")?,
        load_thousandths: load(&text("/proc/loadavg")?).ok_or(unknown("/proc/loadavg"))?,
        uptime_ms: uptime_ms()?,
        unix_ms: unix_ms(),
    })
}

/// Milliseconds since the guest's kernel started.
pub(super) fn uptime_ms() -> Result<u64, StatisticsError> {
    let text = text("/proc/uptime")?;
    text.split(' ').next().and_then(thousandths).ok_or(StatisticsError::Unknown("/proc/uptime"))
}

fn text(path: &'static str) -> Result<String, StatisticsError> {
    fs::read_to_string(path).map_err(|source| StatisticsError::Read { path, source })
}

/// A field of `/proc/meminfo`, which is in KiB, in bytes.
fn memory_field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

fn load(text: &str) -> Option<[u64; 3]> {
    let mut words = text.split(' ').map(thousandths);
    Some([words.next()??, words.next()??, words.next()??])
}

/// The kernel's decimals (two digits behind the point) in thousandths.
fn thousandths(decimal: &str) -> Option<u64> {
    let (whole, hundredths) = decimal.split_once('.')?;
    if hundredths.len() != 2 {
        return None;
    }
    let hundredths: u64 = hundredths.parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(hundredths.checked_mul(10)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_as_the_kernel_writes_them() {
        let memory = "MemTotal:       24689764 kB\nMemFree:         1 kB\nMemAvailable:   19 kB\n";
        assert_eq!(memory_field(memory, "MemTotal:"), Some(24_689_764 * 1024));
        assert_eq!(memory_field(memory, "MemAvailable:"), Some(19 * 1024));
        assert_eq!(memory_field(memory, "Swap:"), None);
        assert_eq!(load("0.16 12.08 0.11 1/123 4567\n"), Some([160, 12_080, 110]));
        assert_eq!(load("1.00"), None);
        assert_eq!(thousandths("350735.47"), Some(350_735_470));
        assert_eq!(thousandths("1.234"), None);
        assert!(read().unwrap().memory_total > 0);
    }
}
