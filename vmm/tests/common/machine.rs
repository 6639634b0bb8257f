//! Trees of `/sys`, `/proc` and `/run` as hosts have them, made from one text for each.
//!
//! ```text
//! # a comment; the first ones say where the values are from
//! /proc/swaps = the one line of a file
//! /proc/swaps + another line of it
//! /sys/class/block/sda -> /sys/devices/pci0000:00/0000:00:17.0/ata1/block/sda
//! [0000:01:00.0]                a device; what follows is in its directory
//! parent = 0000:00:01.0         the bridge that leads to it
//! driver = nouveau              links, as the kernel makes them; also iommu_group and physfn
//! bar1 = mem64pref 0xc0000000 0xcfffffff
//! vendor = 0x10de               any other is a file
//! ```
//!
//! What the source of a recorded machine does not tell is absent.

#![allow(dead_code, clippy::expect_used, clippy::panic, clippy::unwrap_used)] // Each suite uses a part of it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// The tree of one host.
pub(crate) struct Machine(TempDir);

impl Machine {
    /// The machine of a file beside this one.
    pub(crate) fn recorded(name: &str) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/machines");
        Self::of(&fs::read_to_string(directory.join(format!("{name}.txt"))).unwrap())
    }

    /// The machine that a text describes.
    pub(crate) fn of(text: &str) -> Self {
        let machine = Self(TempDir::new().unwrap());
        fs::create_dir_all(machine.path("/sys/bus/pci/devices")).unwrap();
        let mut devices: Vec<(&str, Vec<(&str, &str)>)> = Vec::new();
        let mut links = Vec::new();
        for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
            if let Some(address) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                devices.push((address, Vec::new()));
            } else if let Some((from, to)) = line.split_once(" -> ") {
                links.push((from, to));
            } else if let Some((path, value)) =
                line.split_once(" + ").filter(|(path, _)| path.starts_with('/'))
            {
                let before = fs::read_to_string(machine.path(path)).unwrap();
                machine.file(path, &format!("{before}{value}\n"));
            } else {
                let (key, value) =
                    line.split_once(" =").unwrap_or_else(|| panic!("{line:?} is not understood"));
                let value = value.strip_prefix(' ').unwrap_or(value);
                if key.starts_with('/') {
                    machine.file(key, &format!("{value}\n"));
                } else {
                    devices.last_mut().expect("a device comes first").1.push((key, value));
                }
            }
        }
        let parents: BTreeMap<_, _> = devices
            .iter()
            .filter_map(|(address, values)| {
                Some((*address, values.iter().find(|(key, _)| *key == "parent")?.1))
            })
            .collect();
        for (address, values) in &devices {
            machine.device(&directory(address, &parents), address, values);
        }
        for (from, to) in links {
            machine.link(from, to);
        }
        machine
    }

    /// The root of the tree.
    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root().join(path.trim_start_matches('/'))
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, from: &str, to: &str) {
        let from = self.path(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(self.path(to), from).unwrap();
    }

    fn device(&self, directory: &str, address: &str, values: &[(&str, &str)]) {
        fs::create_dir_all(self.path(directory)).unwrap();
        self.link(&format!("/sys/bus/pci/devices/{address}"), directory);
        let mut windows = BTreeMap::new();
        for (key, value) in values {
            match *key {
                "parent" => {}
                "driver" => {
                    fs::create_dir_all(self.path(&format!("/sys/bus/pci/drivers/{value}"))).unwrap();
                    self.link(&format!("{directory}/driver"), &format!("/sys/bus/pci/drivers/{value}"));
                }
                "iommu_group" => {
                    let group = format!("/sys/kernel/iommu_groups/{value}");
                    self.link(&format!("{group}/devices/{address}"), directory);
                    self.link(&format!("{directory}/iommu_group"), &group);
                }
                "physfn" => {
                    self.link(&format!("{directory}/physfn"), &format!("/sys/bus/pci/devices/{value}"))
                }
                key if key.starts_with("bar") => {
                    drop(windows.insert(key[3..].parse::<usize>().unwrap(), window(value)));
                }
                key => self.file(&format!("{directory}/{key}"), &format!("{value}\n")),
            }
        }
        if !windows.is_empty() {
            let none = || String::from("0x0000000000000000 0x0000000000000000 0x0000000000000000\n");
            let text: String =
                (0..13).map(|index| windows.get(&index).cloned().unwrap_or_else(none)).collect();
            self.file(&format!("{directory}/resource"), &text);
        }
    }
}

/// A line of `resource`. The flags are those that the kernel gives such windows.
fn window(value: &str) -> String {
    let mut words = value.split(' ');
    let flags = match words.next().unwrap() {
        "mem" => 0x40200,
        "mempref" => 0x42208,
        "mem64" => 0x140204,
        "mem64pref" => 0x14220c,
        "io" => 0x40101,
        other => panic!("{other:?} is no kind of window"),
    };
    let mut number = || u64::from_str_radix(words.next().unwrap().strip_prefix("0x").unwrap(), 16).unwrap();
    format!("{:#018x} {:#018x} {flags:#018x}\n", number(), number())
}

/// Where the kernel has a device: below the bridges that lead to it.
fn directory(address: &str, parents: &BTreeMap<&str, &str>) -> String {
    match parents.get(address) {
        Some(parent) => format!("{}/{address}", directory(parent, parents)),
        None => format!("/sys/devices/pci{}/{address}", &address[..address.len() - 5]),
    }
}
