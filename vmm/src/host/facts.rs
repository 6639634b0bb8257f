//! Facts about the host that decide how VMs run.

use crate::fleet::schema::Accel;
use nix::errno::Errno;
use std::{fs::OpenOptions, io, path::Path};

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The processor.
    Kvm,
    /// QEMU's translator: works everywhere, many times slower.
    Tcg,
}

/// Why the processor cannot run guests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKvm {
    /// There is no device.
    #[error(
        "/dev/kvm is missing: load the module kvm-intel or kvm-amd, which comes with the kernel; where that fails, enable \
         virtualization in the firmware"
    )]
    Missing,
    /// The device is not for this user.
    #[error("/dev/kvm does not open for this user: join the group kvm, or be root")]
    Denied,
    /// The device does not open.
    #[error("/dev/kvm does not open: {0}")]
    Device(String),
    /// The device opens, but the processor has no virtualization. Seen on nested hosts, where every guest hangs.
    #[error(
        "/dev/kvm opens, but the CPU shows neither vmx nor svm, so guests would hang; enable (nested) virtualization"
    )]
    Processor,
}

/// Whether guests can run on the processor.
pub fn kvm() -> Result<(), NoKvm> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| closed(&error))?;
    let cpuinfo = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    if has_virtualization(&cpuinfo) { Ok(()) } else { Err(NoKvm::Processor) }
}

/// Why the device does not open. Without its driver the file may be there all the same, and says ENODEV or ENXIO.
fn closed(error: &io::Error) -> NoKvm {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => NoKvm::Missing,
        Some(Errno::EACCES | Errno::EPERM) => NoKvm::Denied,
        _ => NoKvm::Device(error.to_string()),
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// How many bits an address of this host's memory has, if its processor tells.
pub fn address_bits() -> Option<u32> {
    bits_told(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

/// From a line such as `address sizes : 46 bits physical, 48 bits virtual`.
fn bits_told(cpuinfo: &str) -> Option<u32> {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("address sizes"))?;
    line.trim_start_matches([' ', '\t', ':']).split_once(" bits physical")?.0.parse().ok()
}

/// Chooses the engine that the fleet file asks for.
pub fn engine(wanted: Accel) -> Result<Engine, NoKvm> {
    match wanted {
        Accel::Tcg => Ok(Engine::Tcg),
        Accel::Kvm => kvm().map(|()| Engine::Kvm),
        Accel::Auto => Ok(if kvm().is_ok() { Engine::Kvm } else { Engine::Tcg }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hv8_a_device_that_does_not_open_is_told_with_what_to_do() {
        let said = |errno: Errno| closed(&errno.into()).to_string();
        insta::assert_snapshot!(said(Errno::ENOENT), @"/dev/kvm is missing: load the module kvm-intel or kvm-amd, which comes with the kernel; where that fails, enable virtualization in the firmware");
        assert_eq!(said(Errno::ENODEV), said(Errno::ENOENT));
        insta::assert_snapshot!(said(Errno::EACCES), @"/dev/kvm does not open for this user: join the group kvm, or be root");
        insta::assert_snapshot!(said(Errno::EMFILE), @"/dev/kvm does not open: Too many open files (os error 24)");
    }

    #[test]
    fn hv8_virtualization_is_a_flag_of_its_own() {
        assert!(has_virtualization("processor: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock vmxon\nvmx flags : x\n"));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn vf13_the_processor_tells_how_long_its_addresses_are() {
        let told = "processor\t: 0\naddress sizes\t: 46 bits physical, 57 bits virtual\npower management:\n";
        assert_eq!(bits_told(told), Some(46));
        for odd in
            ["", "address sizes", "address sizes\t: many bits physical", "address sizes : -1 bits physical"]
        {
            assert_eq!(bits_told(odd), None, "{odd:?}");
        }
    }
}
