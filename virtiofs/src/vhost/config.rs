//! The device's configuration space: the tag by which the guest mounts it, and its number of request queues.

use thiserror::Error;

/// The length of the tag's field in bytes. A tag may fill it.
const TAG_MAX: usize = 36;

/// What the guest is told about the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    tag: String,
    request_queues: u16,
}

/// Why there is no such device.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The tag is unfit.
    #[error("The tag {0:?} has {1} bytes; 1 to {TAG_MAX} bytes without NUL are allowed")]
    Tag(String, usize),
    /// The number of queues is unfit.
    #[error("{0} request queues are not possible; 1 to {max} are", max = Config::REQUEST_QUEUES_MAX)]
    RequestQueues(u16),
}

impl Config {
    /// The most request queues: one worker's mask has 32 bits, one of which is for the high-priority queue.
    pub const REQUEST_QUEUES_MAX: u16 = 31;

    /// Checks what the operator asked for.
    pub fn new(tag: &str, request_queues: u16) -> Result<Self, ConfigError> {
        if tag.is_empty() || tag.len() > TAG_MAX || tag.contains('\0') {
            return Err(ConfigError::Tag(tag.chars().take(100).collect(), tag.len()));
        }
        if request_queues == 0 || request_queues > Self::REQUEST_QUEUES_MAX {
            return Err(ConfigError::RequestQueues(request_queues));
        }
        Ok(Self { tag: tag.to_owned(), request_queues })
    }

    /// All queues: the high-priority queue and the request queues.
    pub(super) fn queues(&self) -> usize {
        usize::from(self.request_queues).saturating_add(1)
    }

    /// Part of the configuration space; nothing for a range that is not inside it.
    pub(super) fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = self.tag.as_bytes().to_vec();
        space.resize(TAG_MAX, 0);
        space.extend(u32::from(self.request_queues).to_le_bytes());
        let range = || {
            let start = usize::try_from(offset).ok()?;
            let end = start.checked_add(usize::try_from(size).ok()?)?;
            space.get(start..end)
        };
        range().unwrap_or_default().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_and_bounds() {
        let config = Config::new("store", 2).unwrap();
        let whole = config.read(0, 40);
        assert_eq!((&whole[..6], &whole[36..]), (&b"store\0"[..], &[2, 0, 0, 0][..]));
        assert_eq!(config.read(36, 4), [2, 0, 0, 0]);
        for (offset, size) in [(0, 41), (37, 4), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(config.read(offset, size).is_empty(), "{offset} {size}");
        }
        assert_eq!(config.queues(), 3);
    }

    #[test]
    fn refuses_unfit_values() {
        assert!(Config::new(&"t".repeat(36), 31).is_ok());
        for (tag, queues) in [("", 1), ("a\0b", 1), (&"t".repeat(37), 1), ("t", 0), ("t", 32)] {
            assert!(Config::new(tag, queues).is_err(), "{tag:?} {queues}");
        }
    }
}
