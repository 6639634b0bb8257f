//! The guest's figures, from `/proc` and its file systems.
//!
//! The host asks for them with each sign of life, so they are cheap: a few small files and a system call for each file system. The
//! store is not among those: its backend would have to answer.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::{clock, paths};
use lair_guest::{
    boot::{BootConfig, Overlay},
    wire::message::{DiskUse, Pressure, Statistics},
};
use nix::sys::statvfs::statvfs;
use std::{fs, path::PathBuf};

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

/// A file system to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// What it is called.
    mount: String,
    /// Where it is looked at.
    path: PathBuf,
}

/// The file systems of a guest that can fill: the root, memory that the overlay writes to, the volumes.
pub(super) fn disks(config: &BootConfig) -> Vec<Disk> {
    let disk = |mount: &str, path: &str| Disk { mount: mount.into(), path: path.into() };
    let overlay = match config.overlay {
        Some(Overlay::Tmpfs { .. }) => Some(disk("/nix/store", paths::STORE_WRITES)),
        // Its volume is among the volumes.
        Some(Overlay::Volume { .. }) | None => None,
    };
    let volumes = config.volumes.iter().map(|volume| disk(&volume.mount, &volume.mount));
    [disk("/", "/")].into_iter().chain(overlay).chain(volumes).collect()
}

/// The figures of this moment.
pub(super) fn read(disks: &[Disk]) -> Result<Statistics, StatisticsError> {
    let memory = text("/proc/meminfo")?;
    let unknown = StatisticsError::Unknown;
    let field = |name| memory_field(&memory, name).ok_or(unknown("/proc/meminfo"));
    let loadavg = text("/proc/loadavg")?;
    Ok(Statistics {
        memory_total: field("MemTotal:")?,
        memory_available: field("MemAvailable:")?,
        // A kernel without swap does not name it.
        swap_total: field("SwapTotal:").unwrap_or_default(),
        swap_free: field("SwapFree:").unwrap_or_default(),
        // One that cannot be looked at any more is left out.
        disks: disks.iter().filter_map(disk_use).collect(),
        load_thousandths: load(&loadavg).ok_or(unknown("/proc/loadavg"))?,
        tasks: tasks(&loadavg).unwrap_or_default(),
        pressure: pressure(),
        uptime_ms: clock::uptime_ms(),
        unix_ms: clock::unix_ms(),
    })
}

fn text(path: &'static str) -> Result<String, StatisticsError> {
    fs::read_to_string(path).map_err(|source| StatisticsError::Read { path, source })
}

fn disk_use(disk: &Disk) -> Option<DiskUse> {
    let stat = statvfs(&disk.path).ok()?;
    let block = stat.fragment_size();
    let bytes = |blocks: u64| blocks.saturating_mul(block);
    Some(DiskUse {
        mount: disk.mount.clone(),
        total: bytes(stat.blocks()),
        available: bytes(stat.blocks_available()),
    })
}

/// `None` where the kernel does not measure it (CONFIG_PSI) or was told not to.
fn pressure() -> Option<Pressure> {
    let of = |path| some_avg10(&fs::read_to_string(path).ok()?);
    Some(Pressure {
        cpu: of("/proc/pressure/cpu")?,
        memory: of("/proc/pressure/memory")?,
        io: of("/proc/pressure/io")?,
    })
}

/// The percentage behind `some avg10=`, in hundredths.
fn some_avg10(text: &str) -> Option<u32> {
    let value = text.strip_prefix("some avg10=")?.split(' ').next()?;
    u32::try_from(thousandths(value)?.checked_div(10)?).ok()
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

/// The number behind the slash in `/proc/loadavg`: counting the folders of `/proc` would cost more the more there are.
fn tasks(text: &str) -> Option<u64> {
    text.split(' ').nth(3)?.split_once('/')?.1.parse().ok()
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
        let loadavg = "0.16 12.08 0.11 1/123 4567\n";
        assert_eq!(load(loadavg), Some([160, 12_080, 110]));
        assert_eq!(load("1.00"), None);
        assert_eq!((tasks(loadavg), tasks("0.16 12.08 0.11")), (Some(123), None));
        assert_eq!(thousandths("350735.47"), Some(350_735_470));
        assert_eq!(thousandths("1.234"), None);
        let pressure = "some avg10=12.34 avg60=0.00 avg300=0.00 total=7\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!((some_avg10(pressure), some_avg10("full avg10=1.00")), (Some(1234), None));
    }

    #[test]
    fn the_figures_of_this_machine() {
        let missing = Disk { mount: "/gone".into(), path: "/nonexistent".into() };
        let root = Disk { mount: "/".into(), path: "/".into() };
        let figures = read(&[root, missing]).unwrap();
        assert!(figures.memory_total > 0 && figures.tasks > 0 && figures.uptime_ms > 0);
        assert_eq!(figures.disks.len(), 1);
        assert!(figures.disks[0].total >= figures.disks[0].available && figures.disks[0].mount == "/");
    }

    #[test]
    fn the_file_systems_that_can_fill_are_looked_at() {
        let config = |overlay: &str| -> BootConfig {
            serde_json::from_str(&format!(
                r#"{{"hostname":"vm","overlay":{overlay},"volumes":[{{"name":"state","mount":"/var"}}]}}"#
            ))
            .unwrap()
        };
        let shown =
            |overlay| -> Vec<String> { disks(&config(overlay)).into_iter().map(|disk| disk.mount).collect() };
        assert_eq!(shown("null"), ["/", "/var"]);
        assert_eq!(shown(r#"{"tmpfs":{"bytes":1}}"#), ["/", "/nix/store", "/var"]);
        assert_eq!(shown(r#"{"volume":{"name":"state"}}"#), ["/", "/var"]);
    }
}
