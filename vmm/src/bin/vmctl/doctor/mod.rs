//! `vmctl doctor`: [`gather`] looks at the host, [`judge`] says what that means for Lair.

mod facts;
mod gather;
mod judge;
mod judge_gpus;
mod judge_setup;
mod parse;
#[cfg(test)]
mod tests;

use crate::{
    Context,
    error::CommandError,
    output::{count, print_table, print_text, state_cell, table_within, width},
    status,
};
use comfy_table::{Cell, Table};
use judge::{Point, Verdict};
use lair_vmm::state::dirs::Dirs;
use serde::Serialize;
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The fleet file that laird is started with, if it is another than the usual one
    #[arg(long, value_name = "FILE")]
    fleet: Option<PathBuf>,
    /// The state directory that laird is started with, if it is another than the usual one
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// The examination as JSON.
#[derive(Debug, Serialize)]
struct Report {
    ok: usize,
    warnings: usize,
    bad: usize,
    points: Vec<Point>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CommandError> {
    // The socket says which run directory it is.
    let run = context.socket.parent().map_or_else(Dirs::default_run, Into::into);
    let places = gather::Places {
        dirs: Dirs { state: arguments.state_dir.unwrap_or_else(Dirs::default_state), run },
        fleet: arguments.fleet.unwrap_or_else(Dirs::default_fleet),
    };
    let report = report(judge::points(&gather::facts(places, &context.client).await));
    if context.json {
        status::print_json(&report)?;
    } else {
        // Longer lines are hard to read.
        print_table(&shown(&report.points, width().map(|width| width.min(120))))?;
        println!();
        print_text(&summary(&report))?;
    }
    Ok(if report.bad == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn report(points: Vec<Point>) -> Report {
    let number = |verdict| points.iter().filter(|point| point.verdict == verdict).count();
    let (ok, warnings, bad) = (number(Verdict::Ok), number(Verdict::Warning), number(Verdict::Bad));
    Report { ok, warnings, bad, points }
}

/// As wide as that, if there is a width; otherwise one line for each finding and one for what to do.
fn shown(points: &[Point], width: Option<u16>) -> Table {
    let mut rows = table_within(&["VERDICT", "POINT", "FINDING"], width);
    for point in points {
        let (word, colour) = match point.verdict {
            Verdict::Ok => ("ok", "ready"),
            Verdict::Warning => ("warning", "booting"),
            Verdict::Bad => ("bad", "failed"),
        };
        let mend = point.mend.as_ref().map(|mend| format!("\nTo mend it: {mend}")).unwrap_or_default();
        // File names and versions are in it.
        let finding = format!("{}{mend}", point.finding);
        let finding = crate::output::harmless(&finding);
        rows.add_row(vec![state_cell(colour, word), Cell::new(point.point), Cell::new(finding)]);
    }
    rows
}

fn summary(report: &Report) -> String {
    let numbers = format!(
        "{}: {} ok, {}, {} bad",
        count(report.points.len(), "point"),
        report.ok,
        count(report.warnings, "warning"),
        report.bad
    );
    let meaning = match (report.bad, report.warnings) {
        (0, 0) => "This host is fit for Lair.",
        (0, _) => "This host runs VMs, with what is warned of.",
        _ => "This host does not run VMs as it is set up.",
    };
    format!("{numbers}. {meaning}")
}
