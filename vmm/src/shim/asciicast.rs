//! Terminal recordings as text: asciicast v2, a line with a header, then a line for each event
//! (<https://docs.asciinema.org/manual/asciicast/v2/>).

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use lair_guest::wire::message::{Terminal, TerminalSize};
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};

/// The size of a terminal that has not told it.
const USUAL: TerminalSize = TerminalSize { rows: 24, columns: 80 };

#[derive(Serialize)]
struct Header<'a> {
    version: u8,
    width: u16,
    height: u16,
    /// Seconds since 1970.
    timestamp: i64,
    title: &'a str,
    env: BTreeMap<&'a str, &'a str>,
}

/// The longest type of a terminal that is recorded: none is longer, and a recording must not fail for one.
const LONGEST_TERM: usize = 64;

/// What happens in a recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// The terminal shows this.
    Output(String),
    /// It has another size.
    Resize(TerminalSize),
    /// A marker, with a word about the recording itself.
    Note(String),
}

/// The first line.
pub(super) fn header(title: &str, terminal: Option<&Terminal>, unix_seconds: i64) -> String {
    let size = terminal.map_or(USUAL, |terminal| known(terminal.size));
    let header = Header {
        version: 2,
        width: size.columns,
        height: size.rows,
        timestamp: unix_seconds,
        title,
        env: terminal.map(|terminal| ("TERM", cut(&terminal.term))).into_iter().collect(),
    };
    // Numbers and strings always have a JSON form.
    format!("{}\n", serde_json::to_string(&header).unwrap_or_default())
}

fn cut(term: &str) -> &str {
    term.char_indices().nth(LONGEST_TERM).and_then(|(at, _)| term.get(..at)).unwrap_or(term)
}

/// A player cannot show a terminal without room.
fn known(size: TerminalSize) -> TerminalSize {
    let or = |given, usual| if given == 0 { usual } else { given };
    TerminalSize { rows: or(size.rows, USUAL.rows), columns: or(size.columns, USUAL.columns) }
}

/// The line of an event `at` a time after the start.
pub(super) fn line(at: Duration, event: &Event) -> String {
    let (code, data) = match event {
        Event::Output(text) => ('o', quoted(text)),
        Event::Resize(size) => {
            let size = known(*size);
            ('r', format!("\"{}x{}\"", size.columns, size.rows))
        }
        Event::Note(text) => ('m', quoted(text)),
    };
    format!("[{}.{:06},\"{code}\",{data}]\n", at.as_secs(), at.subsec_micros())
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

/// Makes text of bytes that come in pieces: a character may be cut between two of them.
#[derive(Debug, Default)]
pub(super) struct Text {
    /// The beginning of a character.
    begun: Vec<u8>,
}

impl Text {
    /// The text up to the last whole character. Bytes that are none become U+FFFD.
    pub(super) fn push(&mut self, piece: &[u8]) -> String {
        let mut bytes = std::mem::take(&mut self.begun);
        bytes.extend_from_slice(piece);
        let mut text = String::with_capacity(bytes.len());
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let cut = || std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && cut() {
                self.begun = invalid.to_vec();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text
    }

    /// What is left of a character that never came to its end.
    pub(super) fn end(&mut self) -> String {
        if std::mem::take(&mut self.begun).is_empty() {
            String::new()
        } else {
            char::REPLACEMENT_CHARACTER.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_recording_is_a_line_of_json_for_each_event() {
        let terminal =
            Terminal { term: "xterm-256color".into(), size: TerminalSize { rows: 50, columns: 120 } };
        let at = Duration::from_micros(61_000_042);
        let size = TerminalSize { rows: 0, columns: 90 };
        insta::assert_snapshot!(
            [
                header("shell on builder by uid 1000", Some(&terminal), 1_700_000_000),
                header("a \"title\"\n", None, 0),
                line(Duration::ZERO, &Event::Output("$ ls\r\n\x1b[31mä\"\\\u{9b}\n".into())),
                line(at, &Event::Resize(size)),
                line(at, &Event::Note("exited with status 0".into())),
            ]
            .concat()
        );
    }

    #[test]
    fn a_long_terminal_type_is_cut() {
        let size = TerminalSize { rows: 1, columns: 1 };
        let header = header("x", Some(&Terminal { term: "ä".repeat(1 << 21), size }), 0);
        assert!(header.contains(&format!("{:?}", "ä".repeat(64))) && header.len() < 300);
    }

    #[test]
    fn a_character_that_is_cut_waits_for_its_rest() {
        let mut text = Text::default();
        assert_eq!(text.push(b"a\xe2\x82"), "a");
        assert_eq!(text.push(b"\xac\xffb\xe2"), "€\u{fffd}b");
        assert_eq!(text.push(b"c\xc3"), "\u{fffd}c");
        assert_eq!((text.end(), text.end()), ("\u{fffd}".into(), String::new()));
    }

    proptest! {
        #[test]
        fn pieces_make_the_same_text_as_the_whole(bytes: Vec<u8>, cuts in proptest::collection::vec(0_usize..64, 0..8)) {
            let mut text = Text::default();
            let mut joined = String::new();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (piece, later) = rest.split_at(cut.min(rest.len()));
                joined.push_str(&text.push(piece));
                rest = later;
            }
            joined.push_str(&text.push(rest));
            joined.push_str(&text.end());
            prop_assert_eq!(joined, String::from_utf8_lossy(&bytes));
        }
    }
}
