//! `vmctl doctor`.

use crate::{
    Context,
    error::CommandError,
    output::{print_table, state_cell, table},
    status,
};
use comfy_table::Cell;
use lair_vmm::{host::facts, host::tools, state::dirs};
use serde::Serialize;
use std::{path::Path, process::ExitCode};

#[derive(Debug, Serialize)]
struct Point {
    point: String,
    verdict: Verdict,
    finding: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Lair works, with less.
    Note,
    /// Lair does not work.
    Missing,
}

pub(crate) fn run(context: &Context) -> Result<ExitCode, CommandError> {
    let points = points();
    if context.json {
        status::print_json(&points)?;
    } else {
        print(&points)?;
    }
    let works = points.iter().all(|point| point.verdict != Verdict::Missing);
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn points() -> Vec<Point> {
    let mut points: Vec<_> = tools::ALL
        .into_iter()
        .map(|tool| match tools::find(tool) {
            Ok(path) => ok(tool.name, path.display().to_string()),
            Err(missing) => point(tool.name, Verdict::Missing, missing.to_string()),
        })
        .collect();
    points.push(match facts::kvm() {
        Ok(()) => ok("kvm", "guests run on the processor".into()),
        Err(reason) => point("kvm", Verdict::Note, format!("{reason}. Guests run under emulation")),
    });
    points.push(if dirs::is_root() {
        ok("user", "root".into())
    } else {
        point(
            "user",
            Verdict::Note,
            "not root: all processes share this user's uid; no VFIO, no limits".into(),
        )
    });
    points.push(cgroups());
    points
}

fn cgroups() -> Point {
    let controllers =
        std::fs::read_to_string(Path::new("/sys/fs/cgroup/cgroup.controllers")).unwrap_or_default();
    let wanted = ["cpu", "io", "memory", "pids"];
    let missing: Vec<_> = wanted
        .into_iter()
        .filter(|wanted| !controllers.split_ascii_whitespace().any(|c| c == *wanted))
        .collect();
    let finding = if missing.is_empty() {
        "cgroup v2 has all controllers; this release does not use them yet: limits are not enforced".into()
    } else {
        format!("cgroup v2 lacks {}: limits are not enforced", missing.join(", "))
    };
    point("cgroups", Verdict::Note, finding)
}

fn ok(name: &str, finding: String) -> Point {
    point(name, Verdict::Ok, finding)
}

fn point(name: &str, verdict: Verdict, finding: String) -> Point {
    Point { point: name.into(), verdict, finding }
}

fn print(points: &[Point]) -> Result<(), CommandError> {
    let mut rows = table(&["POINT", "VERDICT", "FINDING"]);
    for point in points {
        let (word, colour) = match point.verdict {
            Verdict::Ok => ("ok", "ready"),
            Verdict::Note => ("note", "booting"),
            Verdict::Missing => ("missing", "failed"),
        };
        rows.add_row(vec![Cell::new(&point.point), state_cell(colour, word), Cell::new(&point.finding)]);
    }
    Ok(print_table(&rows)?)
}
