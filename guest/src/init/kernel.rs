//! What init asks of the kernel: modules, console, host name, loopback interface.

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout, sethostname},
};
use std::{
    fs::{self, File},
    io,
    path::Path,
};

/// Why the kernel could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelError {
    #[error("Could not open the kernel module `{path}`")]
    Open {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("Could not load the kernel module `{path}`")]
    Load {
        path: String,
        #[source]
        source: Errno,
    },
    #[error("Could not set the host name to `{name}`")]
    HostName {
        name: String,
        #[source]
        source: Errno,
    },
    #[error("Could not bring the loopback interface up")]
    Loopback(#[source] io::Error),
}

/// Loads the modules of `list`, one path a line, in that order.
pub(super) fn load_modules(list: &str) -> Result<(), KernelError> {
    for path in list.lines().filter(|line| !line.is_empty()) {
        let file = File::open(path).map_err(|source| KernelError::Open { path: path.into(), source })?;
        match finit_module(&file, c"", flags_for(path)) {
            // The kernel has loaded it by itself; or it is for a processor that this one is not (crc32c_intel).
            Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => {}
            Err(source) => return Err(KernelError::Load { path: path.into(), source }),
        }
    }
    Ok(())
}

/// The kernel unpacks compressed modules if it is told so (Linux 5.17; include/uapi/linux/module.h).
fn flags_for(path: &str) -> ModuleInitFlags {
    const COMPRESSED_FILE: u32 = 4;
    match Path::new(path).extension().and_then(|ending| ending.to_str()) {
        Some("xz" | "zst" | "gz") => ModuleInitFlags::from_bits_retain(COMPRESSED_FILE),
        _ => ModuleInitFlags::empty(),
    }
}

/// Makes the console standard input, output and error: the kernel could not if its driver is a module.
pub(super) fn open_console() -> io::Result<()> {
    let console = File::options().read(true).write(true).open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Host name and loopback interface.
pub(super) fn set_up(hostname: &str) -> Result<(), KernelError> {
    sethostname(hostname).map_err(|source| KernelError::HostName { name: hostname.into(), source })?;
    // IFF_UP and IFF_LOOPBACK, as the ioctl would set them.
    fs::write("/sys/class/net/lo/flags", "0x9").map_err(KernelError::Loopback)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_modules_are_announced_as_such() {
        assert_eq!(flags_for("/lair/ko/vsock.ko.xz").bits(), 4);
        assert_eq!(flags_for("/lair/ko/vsock.ko").bits(), 0);
    }
}
