//! What the setup of a host means for Lair: users, programs, directories, services. Pure.

use super::{
    facts::{Directory, Facts, Found, Program, Seen, Space},
    judge::{Point, bad, ok, warning},
};
use crate::output::bytes;
use lair_vmm::{
    fleet::schema::{Limits, Users},
    host::ids,
};

/// Descriptors of a full shim: two for each of 1024 links and 64 sessions, and some.
const DESCRIPTORS: u64 = 4096;

/// Less free space than this is little for a directory: logs and recordings of a VM take some MiB, volumes much more.
const LITTLE: u64 = 1 << 30;
const TOO_LITTLE: u64 = 16 << 20;

/// The mode of the run directory need not keep anybody out; the sockets in it do.
pub(super) fn points(facts: &Facts) -> Vec<Point> {
    let mut points = vec![user(facts), users(facts), group(facts), descriptors(facts)];
    points.extend(facts.programs.iter().map(program));
    points.extend([
        directory("run directory", &facts.run, facts, false),
        directory("state directory", &facts.state, facts, true),
        volumes(facts),
        journal(facts),
        unit(facts),
    ]);
    points
}

fn user(facts: &Facts) -> Point {
    if facts.root {
        return ok("user", "root");
    }
    warning(
        "user",
        format!("{}, not root: all processes of VMs share this user, and VMs get no devices", facts.user),
        "run laird as root, which gives each process a user of its own",
    )
}

fn users(facts: &Facts) -> Point {
    const POINT: &str = "users of vms";
    let range = facts.fleet.host.ids.unwrap_or(ids::DEFAULT);
    let last = u64::from(range.first) + u64::from(range.count).saturating_sub(1);
    if !facts.root {
        return ok(POINT, "not looked at: only root's laird gives them");
    }
    if facts.fleet.host.users == Users::Shared {
        return warning(
            POINT,
            "processes of VMs run as root: the fleet file has host.users = \"shared\"",
            "remove host.users from the fleet file",
        );
    }
    let finding = format!("{} to {last}", range.first);
    match facts.clashes.as_slice() {
        [] => ok(POINT, format!("{finding}, which nobody else has")),
        [first, more @ ..] => {
            let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
            bad(
                POINT,
                format!("{finding}, and some belong to {first}{more}"),
                "host.ids = { first = ..., count = ... } in the fleet file, with numbers that nobody has",
            )
        }
    }
}

fn group(facts: &Facts) -> Point {
    const POINT: &str = "group lair";
    match &facts.group {
        None if facts.root => warning(
            POINT,
            "is missing, so only root may use vmctl",
            "groupadd --system lair, usermod -aG lair NAME for each operator, and restart laird",
        ),
        None => ok(POINT, "is missing; a laird of this user's own serves this user"),
        Some(members) if members.is_empty() => warning(
            POINT,
            "has no members, so only root may use vmctl",
            "usermod -aG lair NAME for each operator",
        ),
        Some(members) => {
            let shown: Vec<_> = members.iter().take(5).map(String::as_str).collect();
            let more = members.len().saturating_sub(shown.len());
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            ok(POINT, format!("{}{more} may use vmctl", shown.join(", ")))
        }
    }
}

fn descriptors(facts: &Facts) -> Point {
    if facts.descriptors < DESCRIPTORS {
        return warning(
            "descriptors",
            format!("a process may open {}; a VM with many links needs {DESCRIPTORS}", facts.descriptors),
            "LimitNOFILE=65536 in the unit, or ulimit -Hn 65536 before laird is started",
        );
    }
    let most =
        if facts.descriptors == u64::MAX { "any number".into() } else { facts.descriptors.to_string() };
    ok("descriptors", format!("a process may open {most}"))
}

fn program(program: &Program) -> Point {
    let (name, source) = (program.tool.name, program.tool.source);
    let own = env!("CARGO_PKG_VERSION");
    match &program.found {
        Found::Nowhere => bad(name, "is missing", source),
        Found::Broken(path, reason) => {
            bad(name, format!("{} does not run: {reason}", path.display()), source)
        }
        Found::At(path, version) if name.starts_with("lair-") && version != &format!("{name} {own}") => {
            warning(
                name,
                format!("{} is \"{version}\", and this vmctl is {own}", path.display()),
                "install all of Lair's programs of one release in one directory",
            )
        }
        Found::At(path, version) => ok(name, format!("{version} ({})", path.display())),
    }
}

fn directory(point: &'static str, directory: &Directory, facts: &Facts, lasting: bool) -> Point {
    let path = directory.path.display();
    let space = match &directory.seen {
        Seen::Missing(space) | Seen::There { space, .. } => *space,
        Seen::NoDirectory => {
            return bad(
                point,
                format!("{path} is no directory"),
                format!("move it away: mv {path} {path}.old"),
            );
        }
        Seen::Unknown(error) => {
            return bad(point, format!("{path} cannot be looked at: {error}"), "look into what is above it");
        }
    };
    if let Seen::There { uid, mode, ours, .. } = &directory.seen {
        if !ours {
            let user = if facts.root { "root" } else { facts.user.as_str() };
            let finding = format!("{path} belongs to user {uid}, not to {user}, so laird does not use it");
            return bad(point, finding, format!("chown {user} {path}, after a look at what is in it"));
        }
        if mode & 0o002 != 0 {
            let finding =
                format!("{path} can be written to by everybody (mode {mode:04o}), so laird does not use it");
            return bad(point, finding, format!("chmod o-w {path}, after a look at what is in it"));
        }
    }
    judged(point, &path.to_string(), &directory.seen, space, lasting)
}

fn judged(point: &'static str, path: &str, seen: &Seen, space: Space, lasting: bool) -> Point {
    let free = format!("{} free", bytes(space.free));
    if space.read_only {
        return bad(point, format!("{path} is on a file system that is read-only"), "mount it for writing");
    }
    if space.free < TOO_LITTLE {
        return bad(point, format!("{path} is full: {free}"), "make room on its file system");
    }
    let finding = match seen {
        Seen::There { mode, .. } => format!("{path}, mode {mode:04o}, {free}"),
        _ => format!("{path} is made when laird starts, {free}"),
    };
    if lasting && space.memory {
        return warning(
            point,
            format!("{finding}; it is in memory (tmpfs), so volumes and logs are lost with this boot"),
            "--state-dir on a disk",
        );
    }
    if lasting && space.free < LITTLE {
        return warning(
            point,
            format!("{finding}, which is little for volumes"),
            "make room on its file system",
        );
    }
    ok(point, finding)
}

fn volumes(facts: &Facts) -> Point {
    match facts.elsewhere.as_slice() {
        [] => ok("volumes", "are on the state directory's file system"),
        [first, more @ ..] => {
            let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
            warning(
                "volumes",
                format!(
                    "{}{more}: on another file system, for which the free space above does not hold",
                    first.display()
                ),
                "one file system for all of the state directory, or watch both",
            )
        }
    }
}

fn journal(facts: &Facts) -> Point {
    if facts.journal {
        return ok("journal", "journald listens: guests' journals go there (journalctl LAIR_VM=NAME)");
    }
    warning(
        "journal",
        "journald does not listen: guests' journals are kept in files of the state directory",
        "run systemd-journald, or read journal.log of each VM",
    )
}

fn unit(facts: &Facts) -> Point {
    const POINT: &str = "unit";
    if !facts.systemd {
        return warning(
            POINT,
            "systemd does not run this host: nobody starts laird after a boot or a crash",
            "start laird from this host's own service manager, which must end laird alone and never its children",
        );
    }
    let Some(unit) = &facts.unit else {
        let mend = "write lair.service with Type=notify, Restart=always, KillMode=process, Delegate=yes and \
                    DelegateSubgroup=supervisor; on NixOS services.lair.enable does";
        return warning(POINT, "there is no lair.service: nobody starts laird after a boot or a crash", mend);
    };
    if unit.kill_mode != "process" {
        return bad(
            POINT,
            format!("lair.service has KillMode={}: a restart of laird would kill all VMs", unit.kill_mode),
            "KillMode=process in the unit, then systemctl daemon-reload",
        );
    }
    if !unit.delegate {
        let (finding, mend) = (
            "lair.service has no Delegate=yes: systemd may move VMs' cgroups, and laird cannot limit VMs",
            "Delegate=yes and DelegateSubgroup=supervisor in the unit, then systemctl daemon-reload and restart lair",
        );
        let none = facts.fleet.host.limits == Limits::None;
        return if none { warning(POINT, finding, mend) } else { bad(POINT, finding, mend) };
    }
    ok(POINT, format!("lair.service is {}, with KillMode=process and Delegate=yes", unit.active))
}
