//! The results as tables, about 100 columns wide.

use crate::{
    backends::{BEST, DEFAULT, OURS},
    gates::{Gate, Verdict},
    guest::{Before, COMMANDS, Guest, WAYS},
    measure::{DEPTH_OF_MANY, DEPTHS, IN_NUMBERS, PACE, QUEUES},
    operation::Operation,
    results::{LatencyRow, Results, SequentialRow, wait_key},
    statistics::ratios,
};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use lair_harness::frontend::queue::Wait;
use std::fmt::Write;

const BACKENDS: [&str; 3] = [DEFAULT, BEST, OURS];

/// A table with these heads, all columns but the first to the right.
pub(crate) fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(heads.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// All tables.
pub(crate) fn tables(results: &Results) -> String {
    let host = &results.host;
    let mut text = format!("{} processors ({}), Linux {}\n", host.processors, host.processor, host.kernel);
    if !results.latency.is_empty() {
        text += &frontend(results);
    }
    if let Some(guest) = &results.guest {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\nIn a guest ({}, Linux {}), {} store paths, {} inodes:\nseconds (requests; for EROFS, reads of the disk)",
            guest.engine, guest.kernel, guest.store_paths, guest.inodes
        );
        let _ = writeln!(text, "{}", commands(guest));
        let differ = guest.rows.iter().filter(|row| !row.counts_agree()).count();
        let _ = match differ {
            0 => writeln!(text, "lair-virtiofs has counted the same requests as the guest's kernel."),
            _ => writeln!(
                text,
                "lair-virtiofs has counted other requests than the guest's kernel in {differ} rows."
            ),
        };
    }
    let _ = write!(text, "\nGates\n{}", gates(&results.gates));
    text
}

fn frontend(results: &Results) -> String {
    let mut text = format!(
        "{} store paths, {} inodes; medians of {} rounds\n\
         A round trip of the frontend alone: {:.2} us polling, {:.2} us sleeping\n\
         A look at the clock, taken off what comes one at a time: {:.3} us\n",
        results.store_paths,
        results.inodes,
        results.effort.rounds,
        us(results.frontend_round_trip_ns),
        us(results.frontend_round_trip_sleeping_ns),
        us(results.clock_ns)
    );
    for backend in &results.backends {
        text += &folded(&format!("{}: {}", backend.name, backend.command));
    }
    let mut add = |title: &str, table: Table| {
        let _ = writeln!(text, "\n{title}\n{table}");
    };
    for wait in [Wait::Polling, Wait::Sleeping] {
        let title = format!("One at a time, frontend {}: us, median (99th percentile)", wait_key(wait));
        add(&title, latency(results, wait));
    }
    add("A device that knows all answers, one at a time: us, median", floors(results));
    add("A device that answers later, frontend sleeping: us, median", late(results));
    add("CPU time of the backend: us for one operation", cpu(results));
    add("Many in flight: thousand requests each second", throughput(results));
    add("A file of 64 MiB from its beginning to its end, 1 MiB at a time: GB/s", sequential(results));
    add("The backend as a whole", whole(results));
    text
}

/// Words in lines of at most 100 columns, where they are not longer themselves.
fn folded(words: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in words.split_whitespace() {
        let fits = column + word.len() < 100;
        text += if column == 0 {
            ""
        } else if fits {
            " "
        } else {
            "\n    "
        };
        column = if column == 0 {
            0
        } else if fits {
            column + 1
        } else {
            4
        } + word.len();
        text += word;
    }
    text + "\n"
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1e3
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// How many times faster ours is than the faster of virtiofsd's.
fn ratio(results: &Results, operation: Operation, wait: Wait) -> String {
    let theirs = results.theirs(operation, &[wait]);
    match results.row(operation, wait, OURS) {
        Some(ours) if ours.messages > 0.0 && !theirs.is_empty() => {
            format!("{:.1}", ratios(&theirs, &ours.rounds_ns).median)
        }
        _ => "-".into(),
    }
}

fn latency(results: &Results, wait: Wait) -> Table {
    let mut table = table(&["OPERATION", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS", "TIMES FASTER"]);
    for operation in Operation::ALL {
        let mut cells = vec![operation.title().to_owned()];
        cells.extend(BACKENDS.map(|backend| results.row(operation, wait, backend).map_or("-".into(), cell)));
        cells.push(ratio(results, operation, wait));
        table.add_row(cells);
    }
    table
}

fn cell(row: &LatencyRow) -> String {
    if row.messages == 0.0 {
        return "0 messages".into();
    }
    format!("{:.2} ({:.1})", us(row.median_ns), us(row.p99_ns))
}

fn floors(results: &Results) -> Table {
    let mut table = table(&["OPERATION", "POLLING", "SLEEPING"]);
    let cell = |operation, wait| {
        results.floor(operation, wait).map_or("-".into(), |row| format!("{:.2}", us(row.median_ns)))
    };
    for operation in Operation::ALL {
        if results.floor(operation, Wait::Polling).is_some() {
            let waits = [Wait::Polling, Wait::Sleeping].map(|wait| cell(operation, wait));
            table.add_row([operation.title().to_owned()].into_iter().chain(waits));
        }
    }
    table
}

fn late(results: &Results) -> Table {
    let later: Vec<_> = results.late.iter().map(|row| format!("{:.2} LATER", us(row.late_ns))).collect();
    let mut table = table(&later.iter().map(String::as_str).collect::<Vec<_>>());
    table.add_row(results.late.iter().map(|row| format!("{:.2}", us(row.median_ns))));
    table
}

fn cpu(results: &Results) -> Table {
    let mut table = table(&["OPERATION", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS"]);
    for wait in [Wait::Polling, Wait::Sleeping] {
        for operation in [Operation::Lookup, Operation::Read4K, Operation::Read1M] {
            let mut cells = vec![format!("{}, {}", operation.title(), wait_key(wait))];
            cells.extend(BACKENDS.map(|backend| {
                results
                    .row(operation, wait, backend)
                    .map_or("-".into(), |row| format!("{:.2}", us(row.cpu_ns)))
            }));
            table.add_row(cells);
        }
    }
    let mut cells = vec![format!("LOOKUP, {PACE} a second")];
    cells.extend(
        BACKENDS.map(|backend| {
            results.of(backend).map_or("-".into(), |row| format!("{:.2}", us(row.paced_cpu_ns)))
        }),
    );
    table.add_row(cells);
    table
}

fn throughput(results: &Results) -> Table {
    let mut table = table(&["OPERATION", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS"]);
    let mut add = |operation: Operation, wait, depth, queues| {
        let mut cells = vec![format!(
            "{}, {}, {depth} in flight, {queues} {}",
            operation.title(),
            wait_key(wait),
            if queues == 1 { "queue" } else { "queues" }
        )];
        cells.extend(BACKENDS.map(|backend| {
            let row = results.throughput.iter().find(|row| {
                (row.operation, row.wait, row.depth, row.queues, row.backend)
                    == (operation.key(), wait_key(wait), depth, queues, backend)
            });
            row.map_or("-".into(), |row| format!("{:.0}", row.requests_per_second as f64 / 1e3))
        }));
        table.add_row(cells);
    };
    for operation in IN_NUMBERS {
        for wait in [Wait::Polling, Wait::Sleeping] {
            DEPTHS.into_iter().for_each(|depth| add(operation, wait, depth, 1));
        }
        for count in QUEUES.into_iter().filter(|&count| count > 1) {
            add(operation, Wait::Sleeping, DEPTH_OF_MANY, count);
        }
    }
    table
}

fn sequential(results: &Results) -> Table {
    let mut table =
        table(&["FRONTEND", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS", "ONLY PREADV", "PREAD"]);
    for wait in [Wait::Polling, Wait::Sleeping] {
        let row = |backend: &str| {
            results.sequential.iter().find(|row| row.wait == wait_key(wait) && row.backend == backend)
        };
        let gb = |rate: u64| format!("{:.1}", rate as f64 / 1e9);
        let mut cells = vec![wait_key(wait).to_owned()];
        cells.extend(BACKENDS.map(|backend| row(backend).map_or("-".into(), |row| gb(row.bytes_per_second))));
        let ours = |rate: fn(&SequentialRow) -> u64| row(OURS).map_or("-".into(), |row| gb(rate(row)));
        cells.extend([ours(|row| row.device_bytes_per_second), ours(|row| row.pread_bytes_per_second)]);
        table.add_row(cells);
    }
    table
}

fn whole(results: &Results) -> Table {
    let mut table = table(&["", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS"]);
    type Value = fn(&crate::results::WholeRow) -> String;
    let rows: [(&str, Value); 7] = [
        ("inodes walked", |row| row.inodes_walked.to_string()),
        ("then: private to one VM, MiB", |row| mib(row.memory.private_bytes)),
        ("then: anonymous memory, MiB", |row| mib(row.memory.rss_anon_bytes)),
        ("then: pages of files, MiB", |row| mib(row.memory.rss_file_bytes)),
        ("then: open descriptors", |row| row.memory.descriptors.to_string()),
        ("start to first reply, ms", |row| format!("{:.2}", row.start_ns as f64 / 1e6)),
        ("idle for 2 s: CPU, ms", |row| format!("{:.3}", row.idle_cpu_ns as f64 / 1e6)),
    ];
    for (title, value) in rows {
        let mut cells = vec![title.to_owned()];
        cells.extend(BACKENDS.map(|backend| results.of(backend).map_or("-".into(), value)));
        table.add_row(cells);
    }
    table
}

fn commands(guest: &Guest) -> Table {
    let mut table = table(&["COMMAND", "VIRTIOFSD", "VIRTIOFSD-TUNED", "LAIR-VIRTIOFS", "EROFS"]);
    for command in &COMMANDS {
        for (before, word) in [(Before::Cold, "cold"), (Before::Warm, "again")] {
            let mut cells = vec![format!("{}, {word}", command.key.replace('_', " "))];
            cells.extend(WAYS.map(|way| {
                let row = guest
                    .rows
                    .iter()
                    .find(|row| (row.command, row.before, row.way) == (command.key, before, way));
                row.map_or("-".into(), |row| {
                    format!("{:.2} ({})", row.microseconds as f64 / 1e6, row.requests)
                })
            }));
            table.add_row(cells);
        }
    }
    table
}

/// What is held to what.
pub(crate) fn gates(gates: &[Gate]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    for gate in gates {
        let verdict = match gate.verdict {
            Verdict::Met => "met",
            Verdict::OutOfReach => "out of reach",
            Verdict::NotMet => "NOT met",
        };
        table.add_row([verdict, &gate.name, &gate.figures]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gates::gates, results::sample};

    #[test]
    fn tables_of_a_sample() {
        let mut results = sample();
        results.gates = gates(&results);
        let text: Vec<_> = tables(&results).lines().map(|line| line.trim_end().to_owned()).collect();
        assert!(text.iter().all(|line| line.len() <= 100));
        insta::assert_snapshot!(text.join("\n"));
    }

    #[test]
    fn long_lines_are_folded() {
        let text = folded(&"0123456789 ".repeat(20));
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.len() <= 100), "{text}");
    }
}
