//! INIT: what the server asks of the guest's kernel.

use super::wire::{InitIn, InitOut, MAJOR, MINOR, MINOR_MIN, flag};
use nix::errno::Errno;
use zerocopy::IntoBytes;

/// Asked for where the guest offers them. What is left out would cost round trips or caching: AUTO_INVAL_DATA (makes reads
/// refresh attributes), SUBMOUNTS (makes RELEASE synchronous), and all that is about writing.
const WANTED: u64 = flag::ASYNC_READ
    | flag::PARALLEL_DIROPS
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO
    | flag::MAX_PAGES
    | flag::CACHE_SYMLINKS
    | flag::EXPLICIT_INVAL_DATA
    | flag::EXPORT_SUPPORT
    | flag::INIT_EXT
    | flag::ALLOW_IDMAP;

/// Pages per request. The guest's own limit and its queue size may make it fewer.
const MAX_PAGES: u16 = 1024;

/// What the guest offers, from the body of its INIT, and the answer.
pub(super) fn answer(body: &[u8]) -> Result<(Option<u64>, InitOut), Errno> {
    // Older kernels send a shorter body; what they do not send they do not offer.
    let mut init = InitIn::default();
    if body.len() < 16 {
        return Err(Errno::EINVAL);
    }
    for (to, from) in init.as_mut_bytes().iter_mut().zip(body) {
        *to = *from;
    }
    let version = InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() };
    if init.major > MAJOR {
        // The guest tries again with our version.
        return Ok((None, version));
    }
    if init.major < MAJOR || init.minor < MINOR_MIN {
        return Err(Errno::EPROTO);
    }
    let mut offered = u64::from(init.flags);
    if offered & flag::INIT_EXT != 0 {
        offered |= u64::from(init.flags2) << 32;
    }
    let flags = offered & WANTED;
    let low = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
    let out = InitOut {
        minor: MINOR.min(init.minor),
        max_readahead: init.max_readahead,
        flags: low(flags),
        flags2: low(flags >> 32),
        max_background: u16::MAX,
        congestion_threshold: u16::MAX,
        // The least that the kernel accepts. Nothing is ever written.
        max_write: 4096,
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..version
    };
    Ok((Some(offered), out))
}
