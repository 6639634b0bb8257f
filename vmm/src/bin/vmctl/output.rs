//! What is printed: tables, durations, sizes, colours; and never an escape sequence of a guest's.

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table, presets};
use lair_vmm::fleet::Problems;
use std::{
    borrow::Cow,
    io::{IsTerminal, Write},
};

/// A table with a line of headings and no frames, to be read and, where it goes to no terminal, to be cut by `awk`: there each row is one
/// line. On a terminal, cells are broken into lines so that the table is no wider.
pub(crate) fn table(headings: &[&str]) -> Table {
    table_within(headings, width())
}

/// [`table`], no wider than that.
pub(crate) fn table_within(headings: &[&str], width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !headings.is_empty() {
        table.set_header(headings.iter().map(Cell::new));
    }
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table
}

/// Longer cells are broken nevertheless where a table is too wide: they would leave nothing for the others.
const WHOLE: u16 = 24;

/// Keeps the cells of these columns whole where the table is too wide; to be called when all rows are there.
pub(crate) fn keep_whole(table: &mut Table, columns: impl IntoIterator<Item = usize>) {
    let widths = table.column_max_content_widths();
    for column in columns {
        if widths.get(column).is_some_and(|width| *width <= WHOLE)
            && let Some(column) = table.column_mut(column)
        {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
}

/// Prints a paragraph; on a terminal it is broken between words.
pub(crate) fn print_text(text: &str) -> std::io::Result<()> {
    let mut paragraph = table(&[]);
    paragraph.add_row([text]);
    if let Some(column) = paragraph.column_mut(0) {
        column.set_padding((0, 0));
    }
    print_table(&paragraph)
}

/// Prints a table without blanks at the ends of its lines.
pub(crate) fn print_table(table: &Table) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in table.to_string().lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// How wide the terminal of standard output is, in columns; none where it is no terminal, or does not know.
pub(crate) fn width() -> Option<u16> {
    let known = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?.ws_col;
    // Below that nothing can be read, whatever is done.
    (known > 0).then_some(known.max(40))
}

/// Whether standard output may be coloured.
pub(crate) fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A cell with `words`, in the colour of a VM's state.
pub(crate) fn state_cell(state: &str, words: &str) -> Cell {
    let cell = Cell::new(words);
    if !colour() {
        return cell;
    }
    match state {
        "ready" => cell.fg(Color::Green),
        "failed" | "quarantined" => cell.fg(Color::Red),
        "stopped" => cell,
        _ => cell.fg(Color::Yellow),
    }
}

/// Prints what a fleet file is warned of, apart from the results.
pub(crate) fn print_warnings(warnings: &Problems) {
    for text in warnings.texts() {
        eprintln!("warning: {text}");
    }
}

/// A number of things, such as `1 VM` or `2 VMs`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A duration in its two largest units, such as `3h 12m`.
pub(crate) fn duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

/// A number of bytes with three significant digits, such as `1.25 MiB`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            let digits = if unit == "B" || value >= 100.0 {
                0
            } else if value >= 10.0 {
                1
            } else {
                2
            };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.2} TiB")
}

/// Text of a guest's, in which control characters can do nothing: all but line ends and tabs are shown as `\x1b`.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    let wild = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(wild) {
        return Cow::Borrowed(text);
    }
    // A carriage return before a line end is how a console ends a line.
    let text = text.replace("\r\n", "\n");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if wild(c) {
            out.push_str(&format!("\\x{:02x}", u32::from(c)));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// A JSON document in which control characters can do nothing. Those of ASCII are escaped in it already; a terminal obeys those above
/// (U+0080 to U+009F) as well. They can stand in strings only, where the escape means the same.
pub(crate) fn harmless_json(text: &str) -> Cow<'_, str> {
    let wild = |c: char| c.is_control() && !c.is_ascii() || c == '\x7f';
    if !text.contains(wild) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| if wild(c) { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    Cow::Owned(text.chars().map(escape).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_no_wider_than_the_terminal_and_keeps_names_whole() {
        let filled = |width| {
            let mut table = table_within(&["NAME", "LINKS"], width);
            table.add_row(["cuda-ada-builder", "queue-runner> store> >web"]);
            keep_whole(&mut table, [0]);
            table.to_string()
        };
        assert_eq!(filled(None).lines().count(), 2);
        let narrow = filled(Some(40));
        assert!(narrow.contains("cuda-ada-builder") && narrow.lines().count() == 3, "{narrow}");
        assert!(narrow.lines().all(|line| line.len() <= 40), "{narrow}");
    }

    #[test]
    fn durations_and_sizes() {
        assert_eq!([0, 59, 61, 3_720, 90_000].map(duration), ["0s", "59s", "1m 1s", "1h 2m", "1d 1h"]);
        assert_eq!(
            [0, 999, 1000, 1_310_720, 150 << 20, 2 << 40].map(bytes),
            ["0 B", "999 B", "0.98 KiB", "1.25 MiB", "150 MiB", "2.00 TiB"]
        );
    }

    #[test]
    fn cl14_escape_sequences_of_a_guest_are_shown_not_obeyed() {
        assert_eq!(
            harmless("ok\r\n\x1b]0;title\x07\u{9b}31m\tend\n"),
            "ok\n\\x1b]0;title\\x07\\x9b31m\tend\n"
        );
        assert!(matches!(harmless("plain\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn cl14_a_json_document_says_the_same_without_control_characters() {
        let value = "ok\n\x1b]0;title\x07\u{9b}31m\x7fä";
        let text = serde_json::to_string_pretty(&[value]).unwrap();
        let shown = harmless_json(&text);
        assert_eq!(shown, "[\n  \"ok\\n\\u001b]0;title\\u0007\\u009b31m\\u007fä\"\n]");
        assert_eq!(serde_json::from_str::<[String; 1]>(&shown).unwrap(), [value]);
    }
}
