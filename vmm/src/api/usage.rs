//! What a process uses, by `/proc` (proc(5)).

use std::{fs, io};

/// What a process uses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Usage {
    /// Resident memory, in bytes.
    pub(super) resident: u64,
    /// User and system time, in seconds.
    pub(super) cpu_seconds: f64,
}

impl Usage {
    /// That of a process.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let (page, tick) =
            (sysconf(nix::unistd::SysconfVar::PAGE_SIZE), sysconf(nix::unistd::SysconfVar::CLK_TCK));
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        parse(&read("stat")?, &read("statm")?, page, tick).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

fn sysconf(of: nix::unistd::SysconfVar) -> u64 {
    nix::unistd::sysconf(of).ok().flatten().and_then(|value| value.try_into().ok()).unwrap_or(1)
}

/// `stat`: fields 14 and 15 are clock ticks in user and system mode; the second field, in brackets, may hold blanks and brackets. `statm`:
/// field 2 is resident pages.
#[expect(clippy::cast_precision_loss, reason = "a count of ticks has far less than 52 bits")]
fn parse(stat: &str, statm: &str, page: u64, tick: u64) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let [user, system]: [u64; 2] = [fields.next()?.parse().ok()?, fields.next()?.parse().ok()?];
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let cpu_seconds = user.saturating_add(system) as f64 / tick.max(1) as f64;
    Some(Usage { resident: pages.saturating_mul(page), cpu_seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_a_hostile_name() {
        let stat = "7 (a) 1 2 (c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 4242 1 2 3";
        let usage = parse(stat, "900 10 5 1 0 3 0\n", 4096, 100);
        assert_eq!(usage, Some(Usage { resident: 40_960, cpu_seconds: 2.0 }));
        assert_eq!(parse("7 (sh", "1 1", 1, 1), None);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(Usage::of(std::process::id()).unwrap().resident > 1 << 20);
    }
}
