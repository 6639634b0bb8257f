//! `vmctl doctor`.

use crate::{
    Context,
    error::CommandError,
    output::{print_table, state_cell, table},
    status,
};
use comfy_table::{Cell, Table};
use lair_vmm::{
    cgroup,
    fleet::limits::HostFacts,
    host::{
        facts::{self, NoKvm},
        tools::{self, Tools},
    },
    state::dirs,
};
use serde::Serialize;
use std::{io, process::ExitCode};

/// What is looked at.
struct Seen {
    tools: Tools,
    kvm: Result<(), NoKvm>,
    facts: io::Result<HostFacts>,
    root: bool,
    /// Whether there are cgroups for limits, or why not.
    limits: Result<(), String>,
}

#[derive(Debug, Serialize)]
struct Point {
    point: &'static str,
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
    let points = points(&Seen {
        tools: Tools::of_this_process(),
        kvm: facts::kvm(),
        facts: HostFacts::read(),
        root: dirs::is_root(),
        limits: cgroup::available().map_err(|error| lair_vmm::error::chain(&error)),
    });
    if context.json {
        status::print_json(&points)?;
    } else {
        print_table(&shown(&points))?;
    }
    let works = points.iter().all(|point| point.verdict != Verdict::Missing);
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn points(seen: &Seen) -> Vec<Point> {
    let point = |point, verdict, finding| Point { point, verdict, finding };
    let tool = |tool: tools::Tool| match seen.tools.find(tool) {
        Ok(path) => point(tool.name, Verdict::Ok, path.display().to_string()),
        Err(_) => point(tool.name, Verdict::Missing, tool.source.into()),
    };
    let mut points: Vec<_> = tools::ALL.into_iter().map(tool).collect();
    points.push(match &seen.kvm {
        Ok(()) => point("kvm", Verdict::Ok, "guests run on the processor".into()),
        Err(reason) => {
            let less = "Until then guests run under emulation, many times slower";
            point("kvm", Verdict::Note, format!("{reason}. {less}"))
        }
    });
    points.push(match &seen.facts {
        Ok(facts) => {
            let (budget, reserve) = (facts.budget(), facts.reserve());
            point(
                "memory",
                Verdict::Ok,
                format!("{budget} for VMs; the host keeps {reserve} of {}", facts.memory),
            )
        }
        Err(error) => point("memory", Verdict::Missing, format!("cannot be read: {error}")),
    });
    points.push(if seen.root {
        point("user", Verdict::Ok, "root: each process of a VM has a uid of its own".into())
    } else {
        let finding = "not root: all processes share this user's uid; no VFIO";
        point("user", Verdict::Note, finding.into())
    });
    points.push(match &seen.limits {
        Ok(()) => point("cgroups", Verdict::Ok, "cgroup v2 has all controllers: laird can limit VMs".into()),
        Err(reason) => point("cgroups", Verdict::Note, reason.clone()),
    });
    points
}

fn shown(points: &[Point]) -> Table {
    let mut rows = table(&["POINT", "VERDICT", "FINDING"]);
    for point in points {
        let (word, colour) = match point.verdict {
            Verdict::Ok => ("ok", "ready"),
            Verdict::Note => ("note", "booting"),
            Verdict::Missing => ("missing", "failed"),
        };
        rows.add_row(vec![Cell::new(point.point), state_cell(colour, word), Cell::new(&point.finding)]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use lair_vmm::fleet::units::Size;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn hv1_a_bare_host_and_an_equipped_one() {
        let facts = || Ok(HostFacts { cpus: 8, memory: Size(32 << 30) });
        let bare = Seen {
            tools: Tools { directories: vec![] },
            kvm: Err(NoKvm::Missing),
            facts: facts(),
            root: false,
            limits: Err("The cgroup /sys/fs/cgroup has no controller cpu. What to do about it".into()),
        };
        insta::assert_snapshot!(shown(&points(&bare)).trim_fmt());
        let directory = tempfile::tempdir().unwrap();
        for tool in tools::ALL {
            let file = directory.path().join(tool.name);
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let equipped = Seen {
            tools: Tools { directories: vec![directory.path().into()] },
            kvm: Ok(()),
            facts: facts(),
            root: true,
            limits: Ok(()),
        };
        let points = points(&equipped);
        insta::assert_json_snapshot!(points.last().unwrap());
        assert!(points.iter().all(|point| point.verdict != Verdict::Missing));
    }
}
