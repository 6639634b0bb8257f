//! What is said of a host with nothing, a good one and a laptop.

use super::{
    facts::{
        Directory, Driver, Facts, FleetContent, FleetFile, Found, Laird, Program, Seen, Space, Swap, Unit,
    },
    judge::{Verdict, points},
    report, shown, summary,
};
use crate::machine::Machine;
use lair_vmm::{
    api::gpus::{GpusQuery, GpusReply},
    cgroup::NoCgroups,
    fleet::{
        limits::HostFacts,
        schema::{self, Accel, Limits, Users},
        units::Size,
    },
    host::{
        facts::NoKvm,
        pci::{Inventory, Sysfs},
        tools,
    },
};
use std::collections::BTreeMap;

const DISK: Space = Space { free: 200 << 30, read_only: false, memory: false };
const TMPFS: Space = Space { free: 3 << 30, read_only: false, memory: true };

fn there(path: &str, space: Space) -> Directory {
    Directory { path: path.into(), seen: Seen::There { uid: 0, mode: 0o750, ours: true, space } }
}

/// A GPU with its audio function, and what else its directory says.
fn gpus(more: &str) -> GpusReply {
    let group = more.lines().find(|line| line.starts_with("iommu_group")).unwrap_or_default();
    let machine = Machine::of(&format!(
        "/proc/self/mountinfo =\n[0000:01:00.0]\nvendor = 0x10de\ndevice = 0x27b0\nclass = 0x030000\n{more}\n\
         [0000:01:00.1]\nvendor = 0x10de\ndevice = 0x22bc\nclass = 0x040300\n{group}\n"
    ));
    GpusReply::new(
        &Inventory::read(&Sysfs::at(machine.root())).unwrap(),
        &BTreeMap::new(),
        &GpusQuery::default(),
    )
}

fn good() -> Facts {
    let program = |tool: tools::Tool| {
        let own = tool.name.starts_with("lair-");
        let version = if own { env!("CARGO_PKG_VERSION") } else { "1.2.3" };
        let found = Found::At(format!("/usr/bin/{}", tool.name).into(), format!("{} {version}", tool.name));
        Program { tool, found }
    };
    Facts {
        root: true,
        user: "root".into(),
        fleet: FleetFile {
            path: "/etc/lair/fleet.json".into(),
            content: FleetContent::Good(3),
            host: schema::Host::default(),
        },
        kvm: Ok(()),
        host: Ok(HostFacts { cpus: 8, memory: Size(32 << 30) }),
        swaps: vec![],
        ksm: false,
        kernel: "6.12.43+deb13-amd64".into(),
        command_line: "root=/dev/sda1 ro quiet intel_iommu=on".into(),
        unsafe_interrupts: false,
        iommu_groups: 14,
        vfio: true,
        no_iommu_mode: false,
        vfio_pci: Driver::Loaded,
        gpus: Ok(gpus("driver = vfio-pci\niommu_group = 14")),
        cgroups: Ok(["cpuset", "cpu", "io", "memory", "pids"].map(Into::into).into()),
        landlock: true,
        seccomp: true,
        clashes: vec![],
        group: Some(vec!["ada".into(), "grace".into()]),
        descriptors: 65536,
        programs: tools::ALL.into_iter().map(program).collect(),
        run: there("/run/lair", TMPFS),
        state: there("/var/lib/lair", DISK),
        elsewhere: vec![],
        journal: true,
        systemd: true,
        unit: Some(Unit {
            active: "active".into(),
            kill_mode: "process".into(),
            delegate: true,
            descriptors: 65536,
        }),
        laird: Laird::Answers(env!("CARGO_PKG_VERSION").into()),
    }
}

/// A container: no modules, no systemd, cgroup v1, nothing installed.
fn bare() -> Facts {
    Facts {
        fleet: FleetFile { content: FleetContent::Missing, ..good().fleet },
        kvm: Err(NoKvm::Missing),
        host: Ok(HostFacts { cpus: 1, memory: Size(512 << 20) }),
        kernel: "4.19.0".into(),
        command_line: "cgroup_disable=memory nokaslr".into(),
        iommu_groups: 0,
        vfio: false,
        vfio_pci: Driver::Missing,
        gpus: Ok(gpus("")),
        cgroups: Err(NoCgroups::Controllers {
            dir: "/sys/fs/cgroup/unified".into(),
            missing: "cpu, memory, pids".into(),
            hybrid: "; this host uses both",
        }),
        landlock: false,
        seccomp: false,
        group: None,
        descriptors: 1024,
        programs: tools::ALL.into_iter().map(|tool| Program { tool, found: Found::Nowhere }).collect(),
        run: Directory { path: "/run/lair".into(), seen: Seen::Missing(TMPFS) },
        state: Directory {
            path: "/var/lib/lair".into(),
            seen: Seen::Missing(Space { read_only: true, ..DISK }),
        },
        journal: false,
        systemd: false,
        unit: None,
        laird: Laird::Down("/run/lair/laird.sock".into()),
        ..good()
    }
}

/// Not root, with swap on a disk, and a fleet file that does without limits.
fn laptop() -> Facts {
    let good = good();
    let host = schema::Host { limits: Limits::None, ..schema::Host::default() };
    Facts {
        root: false,
        user: "ada".into(),
        fleet: FleetFile {
            path: "/home/ada/.config/lair/fleet.json".into(),
            content: FleetContent::Good(1),
            host,
        },
        kvm: Err(NoKvm::Denied),
        swaps: vec![Swap { path: "/dev/nvme0n1p3".into(), size: 8 << 30 }],
        ksm: true,
        cgroups: Err(NoCgroups::NoV2),
        vfio: false,
        vfio_pci: Driver::Loadable,
        gpus: Ok(gpus("driver = nouveau\niommu_group = 1\nboot_vga = 1")),
        group: None,
        run: Directory { path: "/run/user/1000/lair".into(), seen: Seen::Missing(TMPFS) },
        state: Directory {
            path: "/home/ada/.local/state/lair".into(),
            seen: Seen::There {
                uid: 1000,
                mode: 0o750,
                ours: true,
                space: Space { free: 500 << 20, ..DISK },
            },
        },
        unit: None,
        laird: Laird::Denied("/run/lair/laird.sock".into()),
        ..good
    }
}

fn told(facts: &Facts) -> String {
    let report = report(points(facts));
    let table = shown(&report.points, Some(80)).to_string();
    let lines: Vec<_> = table.lines().map(str::trim_end).collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{table}");
    format!("{}\n\n{}", lines.join("\n"), summary(&report)).replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

#[test]
fn a_good_host_has_no_warning() {
    let report = report(points(&good()));
    assert_eq!((report.warnings, report.bad), (0, 0), "{report:?}");
    insta::assert_snapshot!(told(&good()));
}

#[test]
fn hv1_a_bare_host_is_told_all_that_it_needs() {
    insta::assert_snapshot!(told(&bare()));
}

#[test]
fn a_laptop_without_root_runs_vms_with_warnings() {
    assert_eq!(report(points(&laptop())).bad, 0);
    insta::assert_snapshot!(told(&laptop()));
}

#[test]
fn the_json_document_has_stable_fields() {
    let mut facts = good();
    facts.ksm = true;
    facts.seccomp = false;
    let report = report(points(&facts));
    let counts = (report.ok, report.warnings, report.bad);
    assert_eq!(counts.0, report.points.len() - 2);
    assert_eq!((counts.1, counts.2), (1, 1));
    let points: Vec<_> =
        report.points.iter().filter(|point| ["memory", "ksm", "seccomp"].contains(&point.point)).collect();
    insta::assert_json_snapshot!(points);
    let names: Vec<_> = report.points.iter().map(|point| point.point).collect();
    insta::assert_json_snapshot!(names);
}

#[test]
fn each_point_says_how_to_mend_what_is_not_ok() {
    for facts in [bare(), laptop(), good()] {
        for point in points(&facts) {
            assert_eq!(point.mend.is_none(), point.verdict == Verdict::Ok, "{point:?}");
        }
    }
}

#[test]
fn what_the_fleet_file_says_decides_what_is_bad() {
    let verdict = |facts: &Facts, name: &str| {
        points(facts).into_iter().find(|point| point.point == name).map(|point| point.verdict).unwrap()
    };
    let mut facts = Facts { kvm: Err(NoKvm::Missing), cgroups: Err(NoCgroups::NoV2), ..good() };
    for (accel, expected) in
        [(Accel::Auto, Verdict::Warning), (Accel::Kvm, Verdict::Bad), (Accel::Tcg, Verdict::Ok)]
    {
        facts.fleet.host.accel = accel;
        assert_eq!(verdict(&facts, "kvm"), expected);
    }
    for (limits, expected) in [(Limits::Cgroup, Verdict::Bad), (Limits::None, Verdict::Warning)] {
        facts.fleet.host.limits = limits;
        facts.unit = good().unit.map(|unit| Unit { delegate: false, ..unit });
        assert_eq!(verdict(&facts, "cgroups"), expected);
        assert_eq!(verdict(&facts, "unit"), expected);
    }
    facts.clashes = vec!["a in /etc/passwd (1)".into()];
    for (users, expected) in [(Users::Own, Verdict::Bad), (Users::Shared, Verdict::Warning)] {
        facts.fleet.host.users = users;
        assert_eq!(verdict(&facts, "users of vms"), expected);
    }
}

/// What is rarely seen.
#[test]
fn odd_hosts() {
    let space = |space| Seen::There { uid: 0, mode: 0o750, ours: true, space };
    let mut said = Vec::new();
    let mut say = |name: &str, facts: Facts| {
        let point = points(&facts).into_iter().find(|point| point.point == name).unwrap();
        said.push(format!(
            "{:?} {name}: {}\n  {}",
            point.verdict,
            point.finding,
            point.mend.unwrap_or_default()
        ));
    };
    let state = |seen| Facts { state: Directory { path: "/s".into(), seen }, ..good() };
    say("state directory", state(Seen::NoDirectory));
    say("state directory", state(Seen::Unknown("Permission denied".into())));
    say("state directory", state(Seen::There { uid: 33, mode: 0o755, ours: false, space: DISK }));
    say("state directory", state(Seen::There { uid: 0, mode: 0o1777, ours: true, space: DISK }));
    say("state directory", state(space(TMPFS)));
    say("state directory", state(space(Space { free: 4096, ..DISK })));
    say("volumes", Facts { elsewhere: vec!["/s/vms/a".into(), "/s/vms/b".into()], ..good() });
    say("unit", Facts { unit: None, ..good() });
    say(
        "unit",
        Facts { unit: good().unit.map(|unit| Unit { kill_mode: "control-group".into(), ..unit }), ..good() },
    );
    say(
        "users of vms",
        Facts { clashes: vec!["a in /etc/passwd (1)".into(), "b in /etc/subuid (2)".into()], ..good() },
    );
    say("laird", Facts { laird: Laird::Answers("0.0.1".into()), ..good() });
    say("laird", Facts { laird: Laird::Odd("does not answer in 5 s".into()), ..good() });
    say("vfio", Facts { unsafe_interrupts: true, ..good() });
    say("vfio", Facts { unsafe_interrupts: true, no_iommu_mode: true, vfio: false, ..good() });
    say("vfio-pci", Facts { vfio_pci: Driver::Missing, ..good() });
    say("gpu", Facts { gpus: Ok(gpus("driver = nvidia\niommu_group = 14")), ..good() });
    say("gpu", Facts { gpus: Ok(gpus("driver = nouveau\niommu_group = 14\nboot_vga = 0")), ..good() });
    say("gpu", Facts { gpus: Ok(GpusReply { devices: vec![], unreadable: vec![] }), ..good() });
    say("gpu", Facts { gpus: Err("The PCI devices cannot be listed".into()), ..good() });
    say("kernel", Facts { kernel: "5.10.0".into(), ..good() });
    say("swap", Facts { swaps: vec![Swap { path: "/dev/zram0".into(), size: 1 << 30 }], ..good() });
    say("kvm", Facts { kvm: Err(NoKvm::Processor), ..good() });
    say("group lair", Facts { group: Some(vec![]), ..good() });
    say("group lair", Facts { group: Some((0..7).map(|n| format!("u{n}")).collect()), ..good() });
    let problem = || String::from("f.json:1:2: vms.a: there is no key \"x\"");
    for content in [FleetContent::Wrong(problem(), 2), FleetContent::Lacking(problem(), 0)] {
        say("fleet file", Facts { fleet: FleetFile { content, ..good().fleet }, ..good() });
    }
    let mut facts = good();
    facts.programs[3].found = Found::At("/x/lair-virtiofs".into(), "lair-virtiofs 9.9.9".into());
    facts.programs[0].found = Found::Broken("/x/qemu".into(), "exit status: 127: no libpixman".into());
    say("lair-virtiofs", facts);
    let mut facts = good();
    facts.programs[0].found = Found::Broken("/x/qemu".into(), "exit status: 127: no libpixman".into());
    say("qemu-system-x86_64", facts);
    insta::assert_snapshot!(said.join("\n").replace(env!("CARGO_PKG_VERSION"), "VERSION"));
}
