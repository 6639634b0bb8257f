//! What was measured, as one document with names that stay: medians over the rounds.

use crate::{
    backends::{BEST, Backend, DEFAULT},
    floors::{Floor, LATE},
    gates::Gate,
    guest::Guest,
    measure::{DEPTH_OF_MANY, DEPTHS, Effort, IN_NUMBERS, QUEUES, Rates, Round},
    operation::Operation,
    statistics::median,
    turns::{Contender, Latencies, Latency},
};
use lair_harness::{clock, frontend::queue::Wait, process::MemoryUse};
use serde::Serialize;

/// The document.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) bench: &'static str,
    pub(crate) schema: u32,
    pub(crate) host: HostFacts,
    pub(crate) effort: Effort,
    pub(crate) store_paths: usize,
    pub(crate) inodes: usize,
    /// What a look at the clock takes, which is taken off all that comes one at a time.
    pub(crate) clock_ns: u64,
    /// A round trip to a device that does nothing.
    pub(crate) frontend_round_trip_ns: u64,
    /// The same with a frontend that sleeps until the interrupt.
    pub(crate) frontend_round_trip_sleeping_ns: u64,
    /// What a device takes that knows all answers, and may do no more than a backend's worker.
    pub(crate) floors: Vec<FloorRow>,
    /// How soon a frontend that sleeps is asleep, the earliest answer first.
    pub(crate) late: Vec<LateRow>,
    pub(crate) backends: Vec<BackendFacts>,
    pub(crate) latency: Vec<LatencyRow>,
    pub(crate) throughput: Vec<ThroughputRow>,
    pub(crate) sequential: Vec<SequentialRow>,
    pub(crate) whole: Vec<WholeRow>,
    /// Unless it was left out.
    pub(crate) guest: Option<Guest>,
    pub(crate) gates: Vec<Gate>,
}

#[derive(Debug, Serialize)]
pub(crate) struct HostFacts {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) kernel: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct BackendFacts {
    pub(crate) name: &'static str,
    pub(crate) command: String,
}

/// What no backend can be faster than.
#[derive(Debug, Serialize)]
pub(crate) struct FloorRow {
    pub(crate) operation: &'static str,
    pub(crate) wait: &'static str,
    pub(crate) median_ns: u64,
    /// The medians of the rounds, in the order of the backends'.
    pub(crate) rounds_ns: Vec<u64>,
}

/// A round trip to a device that replies late, to a frontend that sleeps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LateRow {
    /// How much later than a device that replies at once.
    pub(crate) late_ns: u64,
    pub(crate) median_ns: u64,
}

/// One operation at a time.
#[derive(Debug, Serialize)]
pub(crate) struct LatencyRow {
    pub(crate) operation: &'static str,
    pub(crate) wait: &'static str,
    pub(crate) backend: &'static str,
    pub(crate) median_ns: u64,
    /// The medians of the rounds. What was measured in the same round may be compared.
    pub(crate) rounds_ns: Vec<u64>,
    pub(crate) p99_ns: u64,
    /// CPU time of the backend.
    pub(crate) cpu_ns: u64,
    /// Requests for one operation.
    pub(crate) messages: f64,
    /// How many times the frontend has slept for one operation.
    pub(crate) slept: f64,
}

/// Many requests in flight.
#[derive(Debug, Serialize)]
pub(crate) struct ThroughputRow {
    pub(crate) operation: &'static str,
    pub(crate) wait: &'static str,
    /// In each queue.
    pub(crate) depth: u16,
    pub(crate) queues: usize,
    pub(crate) backend: &'static str,
    pub(crate) requests_per_second: u64,
}

/// A large file from its beginning to its end.
#[derive(Debug, Serialize)]
pub(crate) struct SequentialRow {
    pub(crate) wait: &'static str,
    pub(crate) backend: &'static str,
    pub(crate) bytes_per_second: u64,
    /// Measured in between, by a device of no use that has the kernel copy the file and does nothing else.
    pub(crate) device_bytes_per_second: u64,
    /// What the device reached of pread's rate in its best round.
    pub(crate) device_best: f64,
    /// Measured in between, without a device.
    pub(crate) pread_bytes_per_second: u64,
}

/// What was measured of a backend as a whole.
#[derive(Debug, Serialize)]
pub(crate) struct WholeRow {
    pub(crate) backend: &'static str,
    /// Inodes that it has shown before its memory was measured.
    pub(crate) inodes_walked: u64,
    pub(crate) memory: MemoryUse,
    pub(crate) start_ns: u64,
    pub(crate) idle_seconds: f64,
    pub(crate) idle_cpu_ns: u64,
    /// CPU time for a LOOKUP where there are a thousand a second.
    pub(crate) paced_cpu_ns: u64,
}

pub(crate) fn wait_key(wait: Wait) -> &'static str {
    match wait {
        Wait::Polling => "polling",
        Wait::Sleeping => "sleeping",
    }
}

fn over<'a>(rounds: &'a [Round], value: impl Fn(&'a Round) -> Option<u64>) -> Option<u64> {
    let values: Vec<_> = rounds.iter().filter_map(value).collect();
    if values.is_empty() { None } else { Some(median(values)) }
}

pub(crate) fn throughput(backend: &Backend, rounds: &[Round]) -> Vec<ThroughputRow> {
    let mut rows = Vec::new();
    for operation in IN_NUMBERS {
        let mut add = |wait, depth, queues, rate: Option<u64>| {
            rows.extend(rate.map(|requests_per_second| ThroughputRow {
                operation: operation.key(),
                wait: wait_key(wait),
                depth,
                queues,
                backend: backend.name,
                requests_per_second,
            }));
        };
        for wait in [Wait::Polling, Wait::Sleeping] {
            for depth in DEPTHS {
                let rate = over(rounds, |round| round.depth.get(&(operation, wait, depth)).copied());
                add(wait, depth, 1, rate);
            }
        }
        // With one queue that row is there already.
        for count in QUEUES.into_iter().filter(|&count| count > 1) {
            let rate = over(rounds, |round| round.queues.get(&(operation, count)).copied());
            add(Wait::Sleeping, DEPTH_OF_MANY, count, rate);
        }
    }
    rows
}

pub(crate) fn sequential(backend: &Backend, rounds: &[Round]) -> Vec<SequentialRow> {
    let row = |wait: Wait| {
        let of = |field: fn(&Rates) -> u64| {
            over(rounds, |round| round.sequential.get(&wait).map(field)).unwrap_or_default()
        };
        SequentialRow {
            wait: wait_key(wait),
            backend: backend.name,
            bytes_per_second: of(|rates| rates.backend),
            device_bytes_per_second: of(|rates| rates.device),
            device_best: rounds
                .iter()
                .filter_map(|round| round.sequential.get(&wait))
                .map(|rates| rates.device as f64 / rates.pread as f64)
                .fold(0.0, f64::max),
            pread_bytes_per_second: of(|rates| rates.pread),
        }
    };
    [Wait::Polling, Wait::Sleeping].map(row).into()
}

impl HostFacts {
    pub(crate) fn here() -> Self {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let processor = read("/proc/cpuinfo").lines().find_map(|line| {
            line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned())
        });
        Self {
            processor: processor.unwrap_or_else(|| "unknown".into()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
        }
    }
}

impl Results {
    /// Nothing yet.
    pub(crate) fn new(host: HostFacts, effort: Effort) -> Self {
        Self {
            bench: "virtiofs",
            schema: 2,
            host,
            effort,
            store_paths: 0,
            inodes: 0,
            clock_ns: 0,
            frontend_round_trip_ns: 0,
            frontend_round_trip_sleeping_ns: 0,
            floors: vec![],
            late: vec![],
            backends: vec![],
            latency: vec![],
            throughput: vec![],
            sequential: vec![],
            whole: vec![],
            guest: None,
            gates: vec![],
        }
    }

    /// What came one at a time, in rounds of turns.
    pub(crate) fn put_turns(&mut self, backends: &[Backend], turns: &[Latencies]) {
        let of = |contender, operation, wait, field: fn(&Latency) -> u64| -> Vec<u64> {
            turns.iter().filter_map(|round| round.get(&(contender, operation, wait)).map(field)).collect()
        };
        let medians =
            |floor, operation, wait| of(Contender::Floor(floor), operation, wait, |latency| latency.median);
        let own = |wait| median(medians(Floor::Empty, Operation::Lookup, wait));
        self.clock_ns = clock::cost().as_nanos() as u64;
        self.frontend_round_trip_ns = own(Wait::Polling);
        self.frontend_round_trip_sleeping_ns = own(Wait::Sleeping);
        for wait in [Wait::Polling, Wait::Sleeping] {
            for operation in Operation::ALL {
                let rounds_ns = medians(Floor::Knowing, operation, wait);
                if !rounds_ns.is_empty() {
                    let (operation, wait) = (operation.key(), wait_key(wait));
                    self.floors.push(FloorRow {
                        operation,
                        wait,
                        median_ns: median(rounds_ns.clone()),
                        rounds_ns,
                    });
                }
                self.latency.extend(backends.iter().map(|backend| {
                    let of = |field| of(Contender::Backend(backend.name), operation, wait, field);
                    let rounds_ns = of(|latency| latency.median);
                    LatencyRow {
                        operation: operation.key(),
                        wait: wait_key(wait),
                        backend: backend.name,
                        median_ns: median(rounds_ns.clone()),
                        rounds_ns,
                        p99_ns: median(of(|latency| latency.p99)),
                        cpu_ns: median(of(|latency| latency.cpu)),
                        messages: median(of(|latency| latency.messages)) as f64 / 100.0,
                        slept: median(of(|latency| latency.slept)) as f64 / 100.0,
                    }
                }));
            }
        }
        self.late.extend(LATE.map(|late_ns| LateRow {
            late_ns,
            median_ns: median(medians(Floor::Late(late_ns), Operation::Lookup, Wait::Sleeping)),
        }));
    }

    /// A latency row.
    pub(crate) fn row(&self, operation: Operation, wait: Wait, backend: &str) -> Option<&LatencyRow> {
        self.latency
            .iter()
            .find(|row| (row.operation, row.wait, row.backend) == (operation.key(), wait_key(wait), backend))
    }

    /// What no backend can be faster than.
    pub(crate) fn floor(&self, operation: Operation, wait: Wait) -> Option<&FloorRow> {
        self.floors.iter().find(|row| (row.operation, row.wait) == (operation.key(), wait_key(wait)))
    }

    /// The least that virtiofsd takes, however it is set up, with a frontend that waits in one of these ways: in each round, nanoseconds. Empty
    /// where it has nothing to do.
    pub(crate) fn theirs(&self, operation: Operation, waits: &[Wait]) -> Vec<u64> {
        let rows: Vec<_> = waits
            .iter()
            .flat_map(|&wait| [DEFAULT, BEST].map(|backend| self.row(operation, wait, backend)))
            .flatten()
            .filter(|row| row.messages > 0.0)
            .collect();
        let rounds = rows.iter().map(|row| row.rounds_ns.len()).min().unwrap_or_default();
        (0..rounds).filter_map(|round| rows.iter().map(|row| row.rounds_ns[round]).min()).collect()
    }

    /// The whole row of a backend.
    pub(crate) fn of(&self, backend: &str) -> Option<&WholeRow> {
        self.whole.iter().find(|row| row.backend == backend)
    }
}

/// Results in which all gates are met: virtiofsd takes 20 us for everything, Lair's backend 0.2 us, asleep 1.5 us.
#[cfg(test)]
pub(crate) fn sample() -> Results {
    use crate::backends::OURS;
    let backends = [DEFAULT, BEST, OURS];
    let both = || [Wait::Polling, Wait::Sleeping].into_iter();
    let latency = |backend, wait: Wait, operation: Operation| {
        let median_ns = match (backend, wait) {
            (OURS, Wait::Polling) => 200,
            (OURS, Wait::Sleeping) => 1_500,
            _ => 20_000,
        };
        LatencyRow {
            operation: operation.key(),
            wait: wait_key(wait),
            backend,
            median_ns,
            rounds_ns: vec![median_ns; 3],
            p99_ns: 40_000,
            cpu_ns: 1_000,
            messages: if (backend, operation) == (OURS, Operation::OpenCycle) { 0.0 } else { 1.0 },
            slept: if wait == Wait::Sleeping { 0.5 } else { 0.0 },
        }
    };
    let sequential = |backend, wait| SequentialRow {
        wait: wait_key(wait),
        backend,
        bytes_per_second: 9_000_000_000,
        device_bytes_per_second: 9_500_000_000,
        device_best: 0.96,
        pread_bytes_per_second: 10_000_000_000,
    };
    let whole = |backend| WholeRow {
        backend,
        inodes_walked: 1000,
        memory: MemoryUse { private_bytes: 4 << 20, ..MemoryUse::default() },
        start_ns: 5_000_000,
        idle_seconds: 2.0,
        idle_cpu_ns: 0,
        paced_cpu_ns: 10_000,
    };
    let effort = Effort { rounds: 5, seconds: 0.25, starts: 15 };
    let host = HostFacts { processor: "a processor".into(), processors: 2, kernel: "6.12".into() };
    let mut results = Results::new(host, effort);
    (results.store_paths, results.inodes) = (10, 1000);
    (results.frontend_round_trip_ns, results.frontend_round_trip_sleeping_ns) = (120, 1_200);
    results.clock_ns = 30;
    results.floors = both()
        .map(|wait| FloorRow {
            operation: Operation::Lookup.key(),
            wait: wait_key(wait),
            median_ns: 150,
            rounds_ns: vec![150; 3],
        })
        .collect();
    results.late = [(0, 1_000), (100, 1_100), (200, 1_300), (300, 6_000)]
        .map(|(late_ns, median_ns)| LateRow { late_ns, median_ns })
        .into();
    results.backends = backends.map(|name| BackendFacts { name, command: format!("{name} --option") }).into();
    results.whole = backends.map(whole).into();
    results.guest = Some(crate::guest::example());
    for backend in backends {
        results.sequential.extend(both().map(|wait| sequential(backend, wait)));
        for operation in Operation::ALL {
            results.latency.extend(both().map(|wait| latency(backend, wait, operation)));
        }
    }
    results
}
