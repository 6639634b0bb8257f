//! What is on the screen. It draws what it is given, and knows no terminal.

use super::{
    rows::{Row, Sort, Totals, rows},
    sample::Sample,
};
use crate::output::{count, duration};
use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as Cells, Table, TableState},
};
use std::collections::BTreeMap;

/// How many rows a page is.
const PAGE: usize = 10;

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct View {
    before: Option<Sample>,
    now: Sample,
    rows: Vec<Row>,
    totals: Totals,
    sort: Sort,
    /// The VM on which the cursor is.
    selected: Option<String>,
    table: TableState,
    /// Why there is no newer reading.
    error: Option<String>,
    colour: bool,
}

impl View {
    pub(super) fn new(first: Sample, colour: bool) -> Self {
        let mut view = Self { now: first, colour, ..Self::default() };
        view.order();
        view
    }

    /// A new reading, or why there is none.
    pub(super) fn take(&mut self, read: Result<Sample, String>) {
        match read {
            Ok(sample) => {
                self.before = Some(std::mem::replace(&mut self.now, sample));
                self.error = None;
                self.order();
            }
            Err(error) => self.error = Some(error),
        }
    }

    fn order(&mut self) {
        (self.rows, self.totals) = rows(self.before.as_ref(), &self.now, self.sort);
        let selected = self.rows.iter().position(|row| Some(&row.name) == self.selected.as_ref());
        self.table.select(selected);
    }

    /// Takes a key; whether it was one to end by.
    pub(super) fn key(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        let last = self.rows.len().saturating_sub(1);
        let at = self.table.selected();
        let down = |by: usize| at.map_or(0, |at| at.saturating_add(by).min(last));
        let up = |by: usize| at.map_or(last, |at| at.saturating_sub(by));
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') => return true,
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.order();
            }
            KeyCode::Down => self.select(down(1)),
            KeyCode::Up => self.select(up(1)),
            KeyCode::PageDown => self.select(down(PAGE)),
            KeyCode::PageUp => self.select(up(PAGE)),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(last),
            KeyCode::Esc => {
                self.selected = None;
                self.table.select(None);
            }
            _ => {}
        }
        false
    }

    fn select(&mut self, at: usize) {
        self.selected = self.rows.get(at).map(|row| row.name.clone());
        self.table.select(self.selected.as_ref().map(|_| at));
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let parts =
            [2, 0, 1, 1].map(|lines| if lines == 0 { Constraint::Min(2) } else { Constraint::Length(lines) });
        let [head, table, note, keys] = Layout::vertical(parts).areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), head);
        self.draw_table(frame, table);
        frame.render_widget(Paragraph::new(self.note()), note);
        let keys_line = "q quit   s sort   Up Down PgUp PgDn select   Esc no selection";
        frame.render_widget(Paragraph::new(keys_line).style(Style::new().add_modifier(Modifier::DIM)), keys);
    }

    fn head(&self) -> Vec<Line<'_>> {
        let mut states: BTreeMap<&str, usize> = BTreeMap::new();
        for row in &self.rows {
            *states.entry(&row.state).or_default() += 1;
        }
        let states: Vec<_> = states.iter().map(|(state, number)| format!("{number} {state}")).collect();
        let mut vms = count(self.rows.len(), "VM");
        if !states.is_empty() {
            vms = format!("{vms}: {}", states.join(", "));
        }
        let time = self.now.time.strftime("%H:%M:%S UTC");
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let first = Line::from(vec![
            Span::styled(format!("Lair {}", self.now.version), bold),
            Span::raw(format!("  {time}  {vms}")),
        ]);
        vec![first, Line::raw(self.sums())]
    }

    fn sums(&self) -> String {
        let totals = &self.totals;
        let cpus = self.now.host.map_or_else(|| "?".into(), |host| host.cpus.saturating_mul(100).to_string());
        let memory = self.now.host.map_or_else(|| "?".into(), |host| short_bytes(whole(host.memory.0)));
        format!(
            "CPU {}%/{cpus}%  memory {}/{memory}  store {}/s  in {}/s  out {}/s",
            number(totals.cpu_percent, |percent| format!("{percent:.0}")),
            short_bytes(totals.memory_used_bytes),
            number(totals.store_requests_per_second, short),
            number(totals.received_bytes_per_second, short_bytes),
            number(totals.sent_bytes_per_second, short_bytes),
        )
    }

    /// More about the VM that is selected; or what is wrong with `laird`, which comes first.
    fn note(&self) -> Line<'_> {
        if let Some(error) = &self.error {
            return Line::styled(error.as_str(), self.style("failed"));
        }
        let row = self.table.selected().and_then(|at| self.rows.get(at));
        match row {
            Some(Row { name, state, detail: Some(detail), .. }) => {
                Line::styled(format!("{name} {state}: {detail}"), self.style(state))
            }
            Some(Row { name, state, .. }) => Line::raw(format!("{name} {state}")),
            None => Line::default(),
        }
    }

    fn draw_table(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let headings = HEADINGS.into_iter().zip(Sort::ALL).map(|(heading, sort)| {
            let style = if sort == self.sort { bold.add_modifier(Modifier::UNDERLINED) } else { bold };
            let line = Line::styled(heading, style);
            Cell::from(if matches!(sort, Sort::Name | Sort::State) { line } else { line.right_aligned() })
        });
        let heading = Cells::new(headings.collect::<Vec<_>>());
        let rows: Vec<_> = self.rows.iter().map(|row| self.cells(row)).collect();
        let widths = [
            Constraint::Min(8),
            Constraint::Length(11),
            Constraint::Length(6),
            Constraint::Length(12),
            Constraint::Length(7),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(7),
        ];
        let table = Table::new(rows, widths)
            .header(heading)
            .column_spacing(1)
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_stateful_widget(table, area, &mut self.table);
    }

    fn cells(&self, row: &Row) -> Cells<'static> {
        let figures = figures(row, self.now.time);
        let named = [
            Cell::from(row.name.clone()),
            Cell::from(Line::styled(row.state.clone(), self.style(&row.state))),
        ];
        let figures = figures.map(|figure| Cell::from(Line::raw(figure).right_aligned()));
        Cells::new(named.into_iter().chain(figures).collect::<Vec<_>>())
    }

    /// The colour of a state, as in `vmctl status`.
    fn style(&self, state: &str) -> Style {
        let style = Style::new();
        match state {
            _ if !self.colour => style,
            "ready" => style.fg(Color::Green),
            "failed" | "quarantined" => style.fg(Color::Red),
            "stopped" => style,
            _ => style.fg(Color::Yellow),
        }
    }
}

/// What each VM has one of.
pub(super) const HEADINGS: [&str; 8] =
    ["NAME", "STATE", "CPU%", "MEMORY", "STORE/S", "IN/S", "OUT/S", "SINCE"];

/// What stands below the headings after name and state.
pub(super) fn figures(row: &Row, now: jiff::Timestamp) -> [String; 6] {
    let used = number(row.memory_used_bytes, short_bytes);
    [
        number(row.cpu_percent, |percent| format!("{percent:.1}")),
        format!("{used}/{}", short_bytes(whole(row.memory_bytes))),
        number(row.store_requests_per_second, short),
        number(row.received_bytes_per_second, short_bytes),
        number(row.sent_bytes_per_second, short_bytes),
        duration(now.as_second().saturating_sub(row.since.as_second())),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn whole(number: u64) -> f64 {
    number as f64
}

/// A number, or a dash for what is not known.
fn number(value: Option<f64>, shown: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "-".into(), shown)
}

/// A number in at most five characters, such as `999`, `1.2k`, `45M`.
pub(super) fn short(number: f64) -> String {
    scaled(number, 1000.0, ["", "k", "M", "G", "T", "P"])
}

/// A number of bytes in at most five characters: the units are powers of 1024.
pub(super) fn short_bytes(number: f64) -> String {
    scaled(number, 1024.0, ["", "K", "M", "G", "T", "P"])
}

fn scaled(number: f64, step: f64, units: [&str; 6]) -> String {
    let mut value = number;
    for unit in units {
        // What would be rounded up to four digits belongs to the next unit.
        if value < 999.5 {
            return if unit.is_empty() || value >= 99.95 {
                format!("{value:.0}{unit}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= step;
    }
    "much".into()
}
