//! A kernel that has devices: a [`Machine`]'s files, and a program that does to them what Linux does when one is written to.
//!
//! What is out of order is said by files at the root of the tree: `hang-NAME` (a write to a file of that name does not return while it is
//! there), `refuse-NAME` (it is refused with these words), `dies-ADDRESS` (the device does not answer after its next reset).

#![allow(dead_code, clippy::expect_used, clippy::panic, clippy::unwrap_used)] // Each suite uses a part of it.

use crate::machine::Machine;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// What is started in place of what writes. `$1` is a word, `$2` the file, `$3` what is written.
const PROGRAM: &str = r#"#!/bin/sh
root=ROOT
name=${2##*/} value=$(printf %s "$3")
echo "$value > ${2#"$root/sys/bus/pci/"}" >>"$root/writes"
while [ -e "$root/hang-$name" ]; do sleep 0.02; done
refuse() { echo "$1" >&2; exit 1; }
[ ! -e "$root/refuse-$name" ] || refuse "$(cat "$root/refuse-$name")"
of() { echo "$root/sys/bus/pci/devices/$1"; }
driver() { basename "$(readlink "$(of "$1")/driver")" 2>/dev/null; }
node() { echo "$root/dev/vfio/$(basename "$(readlink "$(of "$1")/iommu_group")")"; }
bind() {
  ln -s "$root/sys/bus/pci/drivers/$2" "$(of "$1")/driver" || exit 1
  [ "$2" != vfio-pci ] || { mkdir -p "$root/dev/vfio"; touch "$(node "$1")"; }
}
dies() {
  [ ! -e "$root/dies-$1" ] || printf '\377\377\377\377' >"$(of "$1")/config"
}
case $2 in
  */drivers/*/unbind)
    from=${2%/unbind} from=${from##*/}
    [ "$(driver "$value")" = "$from" ] || refuse 'No such device (os error 19)'
    rm "$(of "$value")/driver"
    rm -f "$(node "$value")" ;;
  */drivers/*/bind)
    to=${2%/bind} to=${to##*/}
    only=$(cat "$(of "$value")/driver_override")
    [ "$only" = '(null)' ] || [ "$only" = "$to" ] || refuse 'No such device (os error 19)'
    [ -z "$(driver "$value")" ] || refuse 'Device or resource busy (os error 16)'
    bind "$value" "$to" ;;
  */drivers_probe)
    [ -z "$(driver "$value")" ] || exit 0
    only=$(cat "$(of "$value")/driver_override")
    [ "$only" != '(null)' ] || only=$(cat "$(of "$value")/natural" 2>/dev/null)
    [ -z "$only" ] || bind "$value" "$only" ;;
  */driver_override) echo "${value:-(null)}" >"$2" ;;
  */d3cold_allowed) echo "$value" >"$2" ;;
  */reset) dies "$(basename "$(dirname "$2")")" ;;
  */reset_subordinate) for below in "$(dirname "$2")"/????:*; do dies "${below##*/}"; done ;;
  *) refuse 'No such file or directory (os error 2)' ;;
esac
"#;

/// A disk that can be reset, behind a bridge; a card of two functions that its bridge can reset; a device that nothing can reset; and two
/// devices in one group.
pub(crate) const DEVICES: &str = "\
/proc/self/mountinfo =
/sys/bus/pci/drivers/vfio-pci/bind =
[0000:00:01.0]
vendor = 0x1b36
device = 0x000c
class = 0x060400
secondary_bus_number = 1
reset_subordinate =
[0000:01:00.0]
parent = 0000:00:01.0
vendor = 0x1b36
device = 0x0010
class = 0x010802
driver = nvme
natural = nvme
iommu_group = 1
driver_override = (null)
d3cold_allowed = 1
current_link_width = 4
max_link_width = 4
reset =
reset_method = flr bus
[0000:00:02.0]
vendor = 0x1b36
device = 0x000c
class = 0x060400
secondary_bus_number = 2
reset_subordinate =
[0000:02:00.0]
parent = 0000:00:02.0
vendor = 0x10de
device = 0x2684
class = 0x030000
iommu_group = 2
driver_override = (null)
d3cold_allowed = 0
reset =
reset_method = bus
[0000:02:00.1]
parent = 0000:00:02.0
vendor = 0x10de
device = 0x22ba
class = 0x040300
driver = snd_hda_intel
natural = snd_hda_intel
iommu_group = 2
driver_override = (null)
d3cold_allowed = 1
[0000:00:07.0]
vendor = 0x1234
device = 0x11e8
class = 0x00ff00
iommu_group = 7
driver_override = (null)
[0000:00:08.0]
vendor = 0x8086
device = 0x100e
class = 0x020000
driver = e1000
natural = e1000
iommu_group = 8
driver_override = (null)
reset =
reset_method = pm
[0000:00:09.0]
vendor = 0x8086
device = 0x10d3
class = 0x020000
driver = e1000e
natural = e1000e
iommu_group = 8
driver_override = (null)
reset =
reset_method = pm
";

/// A kernel with devices.
pub(crate) struct Kernel(Machine);

impl Kernel {
    /// One with [`DEVICES`].
    pub(crate) fn new() -> Self {
        let kernel = Self(Machine::of(DEVICES));
        let program = kernel.program();
        fs::write(&program, PROGRAM.replace("ROOT", kernel.root().to_str().unwrap())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for address in
            ["0000:01:00.0", "0000:02:00.0", "0000:02:00.1", "0000:00:07.0", "0000:00:08.0", "0000:00:09.0"]
        {
            kernel.answers(address);
        }
        kernel
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.root()
    }

    /// What writes to its files.
    pub(crate) fn program(&self) -> PathBuf {
        self.root().join("kernel")
    }

    /// A file of a device.
    pub(crate) fn file(&self, address: &str, name: &str) -> PathBuf {
        self.root().join("sys/bus/pci/devices").join(address).join(name)
    }

    /// Has something out of order, or no longer.
    pub(crate) fn order(&self, what: &str, words: Option<&str>) {
        match words {
            Some(words) => fs::write(self.root().join(what), words).unwrap(),
            None => fs::remove_file(self.root().join(what)).unwrap(),
        }
    }

    /// Has a device answer with its numbers.
    pub(crate) fn answers(&self, address: &str) {
        let number = |name: &str| {
            let text = fs::read_to_string(self.file(address, name)).unwrap();
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap().to_le_bytes()
        };
        fs::write(self.file(address, "config"), [number("vendor"), number("device")].concat()).unwrap();
    }

    /// All writes since this was asked last.
    pub(crate) fn writes(&self) -> Vec<String> {
        let text = fs::read_to_string(self.root().join("writes")).unwrap_or_default();
        let _ = fs::remove_file(self.root().join("writes"));
        text.lines().map(Into::into).collect()
    }

    /// How a device is: its driver, its override, whether its power may be cut.
    pub(crate) fn device(&self, address: &str) -> String {
        let driver = fs::read_link(self.file(address, "driver")).ok();
        let driver = driver.and_then(|driver| Some(driver.file_name()?.to_str()?.to_owned()));
        let text =
            |name: &str| fs::read_to_string(self.file(address, name)).unwrap_or_default().trim().to_owned();
        format!(
            "{} {} {}",
            driver.unwrap_or_else(|| "-".into()),
            text("driver_override"),
            text("d3cold_allowed")
        )
    }
}
