//! The same shell commands in a real guest, on the same closure by several ways.

mod closure;
mod machine;

use crate::{
    backends::{self, BEST, Backend, DEFAULT, OURS},
    note,
    statistics::median,
};
use anyhow::{Context, Result, bail, ensure};
use closure::Closure;
use lair_harness::{
    process::{Server, Socket},
    testbed::Testbed,
};
use lair_virtiofs::fuse::Opcode;
use machine::Machine;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

/// An EROFS image on a virtio disk: no process serves it, and it cannot grow.
pub(crate) const EROFS: &str = "erofs";

/// The ways, in the order of their turns.
pub(crate) const WAYS: [&str; 4] = [DEFAULT, BEST, OURS, EROFS];

/// What is in the guest's memory before a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Before {
    /// Nothing: the mount is new.
    Cold,
    /// What the command itself left there when it ran before.
    Warm,
}

/// A shell command. It is run cold, then warm.
pub(crate) struct Command {
    pub(crate) key: &'static str,
    script: &'static str,
}

/// What is run. The last one is a program with some seventy libraries.
pub(crate) const COMMANDS: [Command; 6] = [
    Command { key: "find", script: "find /nix/store >/dev/null" },
    Command { key: "stat_all", script: "find /nix/store -exec stat -c %s {} + >/dev/null" },
    Command { key: "read_all", script: "find /nix/store -type f -exec cat {} + >/dev/null" },
    Command {
        key: "grep",
        script: "grep -rF 'nowhere to be found' /nix/store/*-perl-modules /nix/store/*-zoneinfo; [ $? = 1 ]",
    },
    Command { key: "open_read_close", script: "xargs cat </tmp/small >/dev/null" },
    Command { key: "nix_version", script: "/nix/store/*-nix/bin/nix --version >/dev/null" },
];

/// What was measured in the guest.
#[derive(Debug, Serialize)]
pub(crate) struct Guest {
    pub(crate) engine: &'static str,
    pub(crate) kernel: String,
    pub(crate) store_paths: usize,
    pub(crate) inodes: u64,
    pub(crate) rows: Vec<Row>,
}

/// A command by one way: medians over the rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) command: &'static str,
    pub(crate) before: Before,
    pub(crate) way: &'static str,
    pub(crate) microseconds: u64,
    /// CPU time of the backend; 0 without one.
    pub(crate) backend_cpu_us: u64,
    /// Requests to the backend, as the guest's kernel counts them; for a disk, reads of it.
    pub(crate) requests: u64,
    /// The requests of the last round by operation.
    pub(crate) by_operation: BTreeMap<String, u64>,
    /// The same as the backend itself has counted it, if it does.
    pub(crate) counted_by_backend: Option<BTreeMap<String, u64>>,
}

impl Row {
    /// Whether the backend, if it counts, has counted what the guest's kernel has. A FORGET is no request to the kernel.
    pub(crate) fn counts_agree(&self) -> bool {
        self.counted_by_backend.as_ref().is_none_or(|counted| {
            let requests = counted.iter().filter(|(operation, _)| !operation.ends_with("forget"));
            requests.eq(self.by_operation.iter())
        })
    }
}

/// A way to the closure: a mount in the guest, and what serves it.
struct Way {
    name: &'static str,
    mount: String,
    server: Option<Server>,
    control: Option<std::path::PathBuf>,
}

/// One measurement.
struct Sample {
    microseconds: u64,
    backend_cpu_us: u64,
    requests: BTreeMap<String, u64>,
    counted_by_backend: Option<BTreeMap<String, u64>>,
}

/// Boots a guest and has it do everything, `rounds` times.
pub(crate) fn measure(cache: &Path, directory: &Path, rounds: usize) -> Result<Guest> {
    let testbed =
        Testbed::find()?.context("The guest needs the test bed; --no-guest leaves the guest out")?;
    note("guest: the closure, and an EROFS image of it");
    let closure = Closure::make(&testbed, cache)?;
    let backends = backends::all(&closure.files)?;
    let mut sockets = Vec::new();
    let mut ways = Vec::new();
    for backend in &backends {
        let socket = Socket::new(&directory.join(format!("{}.sock", backend.name)))?;
        ways.push(serve(backend, &socket, directory)?);
        sockets.push(socket);
    }
    ways.push(Way { name: EROFS, mount: "-t erofs /dev/vda".into(), server: None, control: None });
    let shares: Vec<_> =
        backends.iter().zip(&sockets).map(|(backend, socket)| (backend.name, socket.path())).collect();
    note("guest: boot");
    let mut machine = Machine::boot(&testbed, directory, &shares, &closure.image)?;
    let kernel = machine.run("uname -r")?.output.trim().to_owned();
    let inodes = check(&mut machine, &ways)?;
    let mut samples: BTreeMap<(usize, Before, &'static str), Vec<Sample>> = BTreeMap::new();
    for round in 1..=rounds {
        for way in &mut ways {
            note(&format!("guest: round {round} of {rounds}: {}", way.name));
            for (number, command) in COMMANDS.iter().enumerate() {
                machine.run(&format!("store {}", way.mount))?;
                for before in [Before::Cold, Before::Warm] {
                    let sample = sample(&mut machine, way, command.script)
                        .with_context(|| format!("{} by {}", command.key, way.name))?;
                    samples.entry((number, before, way.name)).or_default().push(sample);
                }
            }
        }
    }
    let engine = match machine.engine {
        lair_vmm::host::facts::Engine::Kvm => "kvm",
        lair_vmm::host::facts::Engine::Tcg => "tcg",
    };
    drop(machine);
    for way in ways {
        way.server.map_or(Ok(()), Server::stop)?;
    }
    let rows = samples.into_iter().map(|((number, before, way), samples)| {
        let over = |field: fn(&Sample) -> u64| median(samples.iter().map(field).collect());
        let (microseconds, backend_cpu_us) =
            (over(|sample| sample.microseconds), over(|sample| sample.backend_cpu_us));
        let requests = over(|sample| sample.requests.values().sum());
        let last = samples.into_iter().next_back();
        let (by_operation, counted_by_backend) =
            last.map(|sample| (sample.requests, sample.counted_by_backend)).unwrap_or_default();
        let command = COMMANDS[number].key;
        Row { command, before, way, microseconds, backend_cpu_us, requests, by_operation, counted_by_backend }
    });
    Ok(Guest { engine, kernel, store_paths: closure.store_paths, inodes, rows: rows.collect() })
}

fn serve(backend: &Backend, socket: &Socket, directory: &Path) -> Result<Way> {
    let mut command = backend.command(socket, 1);
    let control = (backend.name == OURS).then(|| directory.join("control.sock"));
    if let Some(control) = &control {
        command.arg("--control").arg(control);
    }
    let server = socket.serve(&mut command, &directory.join(format!("{}.log", backend.name)))?;
    Ok(Way {
        name: backend.name,
        mount: format!("-t virtiofs {}", backend.name),
        server: Some(server),
        control,
    })
}

/// Makes sure that all ways show the same, and lists some small files for a command. How many inodes there are.
fn check(machine: &mut Machine, ways: &[Way]) -> Result<u64> {
    let mut shown = Vec::new();
    for way in ways {
        machine.run(&format!("store {}", way.mount))?;
        let ran = machine
            .run("find /nix/store | wc -l; find /nix/store -type f -exec cat {} + | wc -c")
            .with_context(|| format!("{} cannot be read", way.name))?;
        shown.push((way.name, ran.output));
    }
    let [(_, first), rest @ ..] = shown.as_slice() else { bail!("There is nothing to compare") };
    ensure!(rest.iter().all(|(_, other)| other == first), "Not all show the same: {shown:?}");
    machine.run(
        "find /nix/store -type f -size -8 | head -n 1000 >/tmp/small; [ $(wc -l </tmp/small) = 1000 ]",
    )?;
    first.split_whitespace().next().context("Nothing was counted")?.parse().context("What find shows")
}

/// Runs a command, and counts what it costs.
fn sample(machine: &mut Machine, way: &mut Way, script: &str) -> Result<Sample> {
    let cpu = |way: &Way| way.server.as_ref().map_or(Ok(Default::default()), Server::cpu);
    requests(machine, way)?;
    let (cpu_before, counted) = (cpu(way)?, counters(way)?);
    let ran = machine.run(script)?;
    let requests = requests(machine, way)?;
    let counted_by_backend = counters(way)?.map(|now| since(counted.unwrap_or_default(), now));
    if let Some(server) = &mut way.server {
        server.check()?;
    }
    Ok(Sample {
        microseconds: (ran.seconds * 1e6) as u64,
        backend_cpu_us: (cpu(way)? - cpu_before).as_micros() as u64,
        requests,
        counted_by_backend,
    })
}

/// What the guest's kernel has sent since it was last asked.
fn requests(machine: &mut Machine, way: &Way) -> Result<BTreeMap<String, u64>> {
    if way.server.is_none() {
        // The first number of a disk's statistics is that of its reads; the guest remembers the last one.
        let ran =
            machine.run("read -r now _ </sys/block/vda/stat; echo $((now - ${reads:-0})); reads=$now")?;
        return Ok([("disk_read".to_owned(), ran.output.trim().parse()?)].into());
    }
    parse_histogram(&machine.run("requests")?.output)
}

/// Counts by operation from lines such as `{ opcode:          1 } hitcount:         12`.
fn parse_histogram(text: &str) -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| line.trim_start().starts_with('{')) {
        let number = |key: &str| {
            let rest = line.split_once(key).map(|(_, rest)| rest.trim_start())?;
            rest.split_whitespace().next()?.parse::<u64>().ok()
        };
        let (Some(opcode), Some(count)) = (number("opcode:"), number("hitcount:")) else {
            bail!("The guest's kernel counts in another way: {line:?}");
        };
        let name =
            u32::try_from(opcode).ok().and_then(Opcode::from_wire).map(|opcode| opcode.name().to_lowercase());
        counts.insert(name.unwrap_or_else(|| format!("opcode_{opcode}")), count);
    }
    Ok(counts)
}

/// All that a backend counts by operation; `None` if it does not.
fn counters(way: &Way) -> Result<Option<BTreeMap<String, u64>>> {
    let Some(control) = &way.control else { return Ok(None) };
    let mut stream = UnixStream::connect(control)?;
    stream.write_all(b"stats\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let counts = text.lines().filter_map(|line| {
        let (opcode, count) =
            line.strip_prefix("lair_virtiofs_requests_total{opcode=\"")?.split_once("\"} ")?;
        Some((opcode.to_owned(), count.parse().ok()?))
    });
    Ok(Some(counts.collect()))
}

/// What has been added.
fn since(before: BTreeMap<String, u64>, now: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    now.into_iter()
        .map(|(key, count)| {
            let more = count - before.get(&key).copied().unwrap_or_default();
            (key, more)
        })
        .filter(|(_, more)| *more > 0)
        .collect()
}

/// Rows in which Lair's backend is sent nothing that it need not be.
#[cfg(test)]
pub(crate) fn example() -> Guest {
    let counts = |before| match before {
        Before::Cold => BTreeMap::from([("getattr".into(), 1), ("readdirplus".into(), 1233)]),
        Before::Warm => BTreeMap::from([("getattr".to_owned(), 1)]),
    };
    let row = |command, before, way| Row {
        command,
        before,
        way,
        microseconds: 1_234_567,
        backend_cpu_us: 45_678,
        requests: counts(before).values().sum::<u64>() * if [DEFAULT, BEST].contains(&way) { 4 } else { 1 },
        by_operation: counts(before),
        counted_by_backend: (way == OURS).then(|| counts(before)),
    };
    let rows = COMMANDS.iter().flat_map(|command| {
        [Before::Cold, Before::Warm]
            .into_iter()
            .flat_map(move |before| WAYS.map(|way| (command.key, before, way)))
    });
    let rows = rows.map(|(command, before, way)| row(command, before, way)).collect();
    Guest { engine: "tcg", kernel: "6.12.1".into(), store_paths: 80, inodes: 9000, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_read_by_operation() {
        let text = "# event histogram\n#\n# trigger info: hist:keys=opcode\n\n\
            { opcode:          3 } hitcount:          2\n{ opcode:         44 } hitcount:        310\n\n\
            Totals:\n    Hits: 312\n";
        let counts = parse_histogram(text).unwrap();
        assert_eq!(counts, [("getattr".into(), 2), ("readdirplus".into(), 310)].into());
        assert!(parse_histogram("{ opcode: x } hitcount: 1").is_err());
        assert!(parse_histogram("").unwrap().is_empty());
    }

    #[test]
    fn counts_that_differ_are_noticed() {
        let mut row = example().rows.into_iter().find(|row| row.way == OURS).unwrap();
        assert!(row.counts_agree());
        row.counted_by_backend.as_mut().unwrap().insert("forget".into(), 7);
        assert!(row.counts_agree());
        row.counted_by_backend.as_mut().unwrap().insert("read".into(), 1);
        assert!(!row.counts_agree());
    }

    #[test]
    fn only_what_has_moved_is_told() {
        let map = |pairs: &[(&str, u64)]| pairs.iter().map(|(key, n)| ((*key).to_owned(), *n)).collect();
        assert_eq!(
            since(map(&[("a", 1), ("b", 2)]), map(&[("a", 1), ("b", 5), ("c", 1)])),
            map(&[("b", 3), ("c", 1)])
        );
    }
}
