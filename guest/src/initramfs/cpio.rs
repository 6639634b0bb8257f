//! Archives in cpio's "newc" format, the one that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).

use super::InitramfsError;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that grows entry by entry. A folder has to come before what is in it.
pub(super) struct Archive {
    bytes: Vec<u8>,
    /// The next inode number: entries with equal numbers would be hard links.
    inode: u32,
}

impl Archive {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), inode: 1 }
    }

    pub(super) fn directory(&mut self, name: &str, mode: u32) -> Result<(), InitramfsError> {
        self.entry(name, DIRECTORY | mode, (0, 0), &[])
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), InitramfsError> {
        self.entry(name, REGULAR | mode, (0, 0), content)
    }

    pub(super) fn character_device(
        &mut self,
        name: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), InitramfsError> {
        self.entry(name, CHARACTER_DEVICE | mode, (major, minor), &[])
    }

    /// The finished archive, padded so that another one may follow.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, InitramfsError> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.pad(512);
        Ok(self.bytes)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), InitramfsError> {
        let too_long = |length| InitramfsError::TooLong { name: name.to_string(), length };
        let size = u32::try_from(content.len()).map_err(|_| too_long(content.len()))?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_long(name.len()))?;
        let inode = self.inode;
        self.inode += 1;
        // Magic, inode, mode, uid, gid, links, time, size, device, the node's device, length of the name, checksum.
        // All owned by root, of 1970: the same input gives the same bytes.
        self.bytes.extend_from_slice(b"070701");
        for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
        Ok(())
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_expects() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"hello").unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000000",
            "init\0\0",
            "hello\0\0\0"
        );
        assert_eq!(std::str::from_utf8(&archive.bytes).unwrap(), expected);
        let done = archive.finish().unwrap();
        assert_eq!(done.len(), 512);
        assert!(done.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
