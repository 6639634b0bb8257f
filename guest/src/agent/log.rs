//! The agent's log: lines on standard output, which is the console or systemd's journal.
//!
//! A thread of its own writes them, because a console whose other end does not read blocks. What does not fit into
//! its queue is dropped and counted.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

/// The longest line, in bytes; longer ones are cut.
pub(super) const MAX_LINE: usize = 2048;

/// How many lines may wait to be written.
const QUEUE: usize = 512;

/// A handle to the log.
#[derive(Debug, Clone)]
pub(super) struct Log {
    lines: SyncSender<String>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    pub(super) fn start() -> io::Result<Self> {
        let (log, lines) = Self::queue();
        let dropped = log.dropped.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(&lines, &dropped, &mut io::stdout().lock()))?;
        Ok(log)
    }

    fn queue() -> (Self, Receiver<String>) {
        let (lines, receiver) = sync_channel(QUEUE);
        (Self { lines, dropped: Arc::default() }, receiver)
    }

    /// Logs a line of the agent's own.
    pub(super) fn say(&self, line: &str) {
        self.line("lair-guest", line.as_bytes());
    }

    /// Logs what `source` has said.
    pub(super) fn line(&self, source: &str, said: &[u8]) {
        if self.lines.try_send(clean(source, said)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One line without anything that a terminal would obey.
fn clean(source: &str, said: &[u8]) -> String {
    let said = said.get(..MAX_LINE).unwrap_or(said);
    let text = String::from_utf8_lossy(said);
    let text = text.trim_end().chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c });
    format!("{source}: {}\n", text.collect::<String>())
}

fn write_all(lines: &Receiver<String>, dropped: &AtomicU64, to: &mut impl Write) {
    for line in lines {
        let count = dropped.swap(0, Ordering::Relaxed);
        if count > 0 {
            let _ = writeln!(to, "lair-guest: {count} lines were lost: the console does not keep up");
        }
        // A console that is gone may come back.
        let _ = to.write_all(line.as_bytes()).and_then(|()| to.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs5_a_blocked_console_costs_lines_not_memory() {
        let (log, lines) = Log::queue();
        for _ in 0..QUEUE + 7 {
            log.say("x");
        }
        let dropped = log.dropped.clone();
        drop(log);
        let mut written = Vec::new();
        write_all(&lines, &dropped, &mut written);
        let written = String::from_utf8(written).unwrap();
        assert!(
            written
                .starts_with("lair-guest: 7 lines were lost: the console does not keep up\nlair-guest: x\n")
        );
        assert_eq!(written.lines().count(), QUEUE + 1);
    }

    #[test]
    fn a_line_is_one_line_and_does_not_steer_the_terminal() {
        assert_eq!(clean("nix", b"a\x1b[2Jb\tc\r\n"), "nix: a\u{fffd}[2Jb\tc\n");
        assert_eq!(clean("nix", &[b'x'; MAX_LINE + 1]).len(), "nix: \n".len() + MAX_LINE);
        assert_eq!(clean("nix", b"\xff"), "nix: \u{fffd}\n");
    }
}
