//! What Lair's backend is held to, beside virtiofsd in the same run.

use crate::{
    backends::{BEST, DEFAULT, OURS},
    guest::{Before, Guest, Row},
    operation::Operation,
    results::{LateRow, Results, SequentialRow, wait_key},
    statistics::{median, ratios},
};
use lair_harness::frontend::queue::Wait;
use serde::Serialize;
use std::collections::BTreeMap;

/// Bytes that may be private to one VM.
const PRIVATE_MAX: u64 = 8 << 20;
/// Nanoseconds to the first reply.
const START_MAX: u64 = 10_000_000;
/// Nanoseconds of CPU time in 2 s, for "none": what a clock tick or two may charge.
const IDLE_MAX: u64 = 1_000_000;
/// How much slower than pread a sequential read may be.
const SEQUENTIAL_MIN: f64 = 0.85;

/// A thing that a program of Lair's is held to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Gate {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
    pub(crate) figures: String,
}

/// What a gate came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    Met,
    /// It is not met, and could not be: a device of no use is too slow for it as well. Where that was so in some rounds only, it is met in the others.
    OutOfReach,
    NotMet,
}

impl From<bool> for Verdict {
    fn from(met: bool) -> Self {
        if met { Self::Met } else { Self::NotMet }
    }
}

/// All gates, in the order of the tables.
pub(crate) fn gates(results: &Results) -> Vec<Gate> {
    let mut gates = Vec::new();
    for (operation, polling, sleeping) in [
        (Operation::Lookup, 20.0, 2.0),
        (Operation::Getattr, 20.0, 2.0),
        (Operation::Read4K, 10.0, 1.0),
        (Operation::Read128K, 4.0, 1.0),
        (Operation::Read1M, 2.0, 1.0),
    ] {
        gates.extend(latency(results, operation, Wait::Polling, polling));
        gates.extend(latency(results, operation, Wait::Sleeping, sleeping));
    }
    let polling = |row: &&SequentialRow| (row.backend, row.wait) == (OURS, wait_key(Wait::Polling));
    gates.extend(results.sequential.iter().filter(polling).map(sequential));
    if let Some(row) = results.of(OURS) {
        gates.push(Gate {
            name: "private to one VM after a walk: at most 8 MiB".into(),
            verdict: (row.memory.private_bytes <= PRIVATE_MAX && row.inodes_walked == results.inodes as u64)
                .into(),
            figures: format!(
                "{:.1} MiB, {} of {} inodes",
                row.memory.private_bytes as f64 / f64::from(1 << 20),
                row.inodes_walked,
                results.inodes
            ),
        });
        gates.push(Gate {
            name: format!("start with {} store paths: at most 10 ms", results.store_paths),
            verdict: (row.start_ns <= START_MAX).into(),
            figures: format!("{:.1} ms", row.start_ns as f64 / 1e6),
        });
        gates.push(Gate {
            name: "idle: no CPU".into(),
            verdict: (row.idle_cpu_ns <= IDLE_MAX).into(),
            figures: format!("{:.3} ms in {} s", row.idle_cpu_ns as f64 / 1e6, row.idle_seconds),
        });
    }
    if let Some(guest) = &results.guest {
        gates.push(cold(guest));
        gates.push(caches(guest));
    }
    gates
}

/// A large file from its beginning to its end, beside pread of it.
fn sequential(row: &SequentialRow) -> Gate {
    let (ours, pread) = (row.bytes_per_second as f64, row.pread_bytes_per_second as f64);
    let device = row.device_bytes_per_second as f64;
    let mut verdict = Verdict::from(ours >= pread * SEQUENTIAL_MIN);
    let mut limit = String::new();
    if verdict == Verdict::NotMet {
        // It is no limit if it was slower than ours, or fast enough in any round.
        if row.device_best < SEQUENTIAL_MIN && device >= ours {
            verdict = Verdict::OutOfReach;
        }
        limit = format!(
            "; a device that does nothing but preadv reaches {:.1} GB/s: {:.0} %",
            device / 1e9,
            100.0 * device / pread
        );
    }
    Gate {
        name: "sequential read, polling: 85 % of pread".into(),
        verdict,
        figures: format!(
            "{:.1} GB/s, pread {:.1} GB/s: {:.0} %{limit}",
            ours / 1e9,
            pread / 1e9,
            100.0 * ours / pread
        ),
    }
}

/// What a guest that has seen nothing yet sends to find and read all files, beside the better of virtiofsd's two results.
fn cold(guest: &Guest) -> Gate {
    let requests = |ways: &[&str]| {
        let is =
            |row: &&Row| (row.command, row.before) == ("read_all", Before::Cold) && ways.contains(&row.way);
        guest.rows.iter().filter(is).map(|row| row.requests).min()
    };
    let (ours, theirs) = (requests(&[OURS]), requests(&[DEFAULT, BEST]));
    let text = |count: Option<u64>| count.map_or("-".into(), |count| count.to_string());
    Gate {
        name: "cold find and cat: a third of the requests".into(),
        verdict: ours.zip(theirs).is_some_and(|(ours, theirs)| ours.saturating_mul(3) <= theirs).into(),
        figures: format!("{}, virtiofsd {}", text(ours), text(theirs)),
    }
}

/// What a guest that has seen it all still sends.
fn caches(guest: &Guest) -> Gate {
    const ALLOWED: [&str; 2] = ["getattr", "statfs"];
    const COMMANDS: [&str; 3] = ["find", "stat_all", "open_read_close"];
    let rows = guest
        .rows
        .iter()
        .filter(|row| row.way == OURS && row.before == Before::Warm && COMMANDS.contains(&row.command));
    let mut sent: BTreeMap<&str, u64> = BTreeMap::new();
    let mut seen = 0;
    for counts in rows.filter_map(|row| row.counted_by_backend.as_ref()) {
        seen += 1;
        counts.iter().for_each(|(operation, count)| *sent.entry(operation).or_default() += count);
    }
    let figures: Vec<_> = sent.iter().map(|(operation, count)| format!("{count} {operation}")).collect();
    Gate {
        name: "a second walk, cached open, read, close: free".into(),
        verdict: (seen == COMMANDS.len() && sent.keys().all(|operation| ALLOWED.contains(operation))).into(),
        figures: if figures.is_empty() {
            "no requests".into()
        } else {
            format!("in all {}", figures.join(", "))
        },
    }
}

/// A device of no use beside a gate that is not met: the rounds in which it was too slow as well say nothing about a backend.
#[derive(Debug, PartialEq)]
struct Limit {
    /// How many times faster than virtiofsd it is.
    ratio: f64,
    rounds: usize,
    /// In how many of them it was too slow.
    too_slow: usize,
    /// How many times faster than virtiofsd ours is in the others; `None` if there are none.
    others: Option<f64>,
}

/// How much slower than ours, and no more, a device of no use may be: by that much, two that sleep equally often differ by chance.
const NO_SLOWER: f64 = 1.1;

impl Limit {
    /// By what each took in each round.
    fn of(theirs: &[u64], ours: &[u64], device: &[u64], factor: f64) -> Self {
        let rounds =
            || theirs.iter().zip(ours).zip(device).map(|((&theirs, &ours), &device)| (theirs, ours, device));
        let is_too_slow = |&(theirs, ours, device): &(u64, u64, u64)| {
            (theirs as f64) < device as f64 * factor && device as f64 <= ours as f64 * NO_SLOWER
        };
        let (other_theirs, other_ours): (Vec<_>, Vec<_>) =
            rounds().filter(|round| !is_too_slow(round)).map(|(theirs, ours, _)| (theirs, ours)).unzip();
        Self {
            ratio: ratios(theirs, device).median,
            rounds: rounds().count(),
            too_slow: rounds().filter(is_too_slow).count(),
            others: (!other_ours.is_empty()).then(|| ratios(&other_theirs, &other_ours).median),
        }
    }

    fn verdict(&self, factor: f64) -> Verdict {
        if self.others.is_none_or(|ratio| ratio >= factor) { Verdict::OutOfReach } else { Verdict::NotMet }
    }
}

/// Beside what: virtiofsd however it is waited for, or with a sleeping frontend and where being as fast is all that is asked for, with a
/// sleeping frontend as well.
fn compared(wait: Wait, factor: f64) -> &'static [Wait] {
    match wait {
        Wait::Sleeping if factor <= 1.0 => &[Wait::Sleeping],
        _ => &[Wait::Polling, Wait::Sleeping],
    }
}

/// A ratio of round by round.
fn latency(results: &Results, operation: Operation, wait: Wait, factor: f64) -> Option<Gate> {
    let theirs = results.theirs(operation, compared(wait, factor));
    let ours = results.row(operation, wait, OURS)?;
    let ratio = ratios(&theirs, &ours.rounds_ns).median;
    let mut verdict = Verdict::from(ratio >= factor);
    let mut figures = format!(
        "{:.2} us, virtiofsd {:.2} us: {ratio:.2} times",
        ours.median_ns as f64 / 1e3,
        median(theirs.clone()) as f64 / 1e3
    );
    if verdict == Verdict::NotMet {
        if let Some(floor) = results.floor(operation, wait) {
            let limit = Limit::of(&theirs, &ours.rounds_ns, &floor.rounds_ns, factor);
            verdict = limit.verdict(factor);
            figures += &format!(
                "; a device that knows all answers takes {:.2} us: {:.2} times, too slow in {} of {} rounds",
                floor.median_ns as f64 / 1e3,
                limit.ratio,
                limit.too_slow,
                limit.rounds
            );
            if let Some(others) = limit.others.filter(|_| limit.too_slow > 0) {
                figures += &format!("; in the others {others:.2} times");
            }
        }
        if wait == Wait::Sleeping && SMALL.contains(&operation) {
            figures += &asleep(results, median(theirs), factor);
        }
    }
    let asked = if factor > 1.0 { format!("{factor} times faster") } else { "never slower".into() };
    Some(Gate { name: format!("{}, {}: {asked}", operation.title(), wait_key(wait)), verdict, figures })
}

/// What is answered as soon as what devices of no use answer; all else takes its own time.
const SMALL: [Operation; 2] = [Operation::Lookup, Operation::Getattr];

/// How many times longer a round trip must become than the answer is later: else it is late, but nobody was asleep.
const JUMP: u64 = 4;

/// Until when an answer would do: a frontend that sleeps is soon so fast asleep that waking it takes longer than the whole may.
fn asleep(results: &Results, theirs: u64, factor: f64) -> String {
    let would_do = |row: &&LateRow| row.median_ns as f64 * factor <= theirs as f64;
    let Some(last) = results.late.iter().take_while(would_do).last() else { return String::new() };
    let Some(next) = results.late.iter().find(|row| row.late_ns > last.late_ns) else { return String::new() };
    let later = next.late_ns.saturating_sub(last.late_ns);
    if next.median_ns.saturating_sub(last.median_ns) < later.saturating_mul(JUMP) {
        return String::new();
    }
    format!(
        "; the frontend is asleep after {:.2} us more than a device of no use takes: {:.2} us",
        next.late_ns as f64 / 1e3,
        next.median_ns as f64 / 1e3
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{LatencyRow, sample};

    fn set(results: &mut Results, operation: Operation, wait: Wait, backend: &str, median_ns: u64) {
        let is = |row: &&mut LatencyRow| {
            (row.operation, row.wait, row.backend) == (operation.key(), wait_key(wait), backend)
        };
        let row = results.latency.iter_mut().find(is).unwrap();
        row.median_ns = median_ns;
        row.rounds_ns.fill(median_ns);
    }

    fn met(results: &Results, name: &str) -> bool {
        let gates = gates(results);
        let mut found = gates.iter().filter(|gate| gate.name.starts_with(name));
        let gate = found.next().unwrap_or_else(|| panic!("{name}: {gates:?}"));
        assert!(found.next().is_none(), "{name}");
        gate.verdict == Verdict::Met
    }

    /// The machine was three times slower in the second round, and faster in the last one.
    #[test]
    fn rounds_are_compared_each_by_itself() {
        let mut results = sample();
        let rows = |results: &mut Results, backend: &str, rounds: [u64; 3]| {
            let of =
                |row: &&mut LatencyRow| (row.operation, row.backend) == (Operation::Lookup.key(), backend);
            results.latency.iter_mut().filter(of).for_each(|row| row.rounds_ns = rounds.into());
        };
        rows(&mut results, OURS, [300, 900, 100]);
        rows(&mut results, DEFAULT, [9_000, 19_000, 2_500]);
        // The better one of each round counts.
        rows(&mut results, BEST, [6_300, 27_000, 2_600]);
        let gate = |results: &Results| {
            gates(results).into_iter().find(|gate| gate.name.starts_with("LOOKUP, polling")).unwrap()
        };
        // 21, 21.1 and 25 times.
        assert!(
            gate(&results).verdict == Verdict::Met && gate(&results).figures.ends_with("21.11 times"),
            "{:?}",
            gate(&results)
        );
        // 15.75, 15.83 and 25 times.
        rows(&mut results, OURS, [400, 1_200, 100]);
        let floors = std::mem::take(&mut results.floors);
        assert_eq!(gate(&results).verdict, Verdict::NotMet, "without a device there is no telling");
        results.floors = floors;
        let mut beside = |ours: [u64; 3], device: [u64; 3]| {
            rows(&mut results, OURS, ours);
            results.floors.iter_mut().for_each(|row| row.rounds_ns = device.into());
            let Gate { verdict, figures, .. } = gate(&results);
            (verdict, figures.split_once(" times, ").unwrap().1.to_owned())
        };
        for (ours, device, verdict, end) in [
            // Fast enough in two rounds, and in the third one slower than ours.
            ([400, 1_200, 100], [310, 600, 130], Verdict::NotMet, "0 of 3 rounds"),
            // Too slow where ours is.
            (
                [400, 1_200, 100],
                [350, 1_100, 100],
                Verdict::OutOfReach,
                "2 of 3 rounds; in the others 25.00 times",
            ),
            // Where it was fast enough, ours was not.
            (
                [400, 1_200, 130],
                [350, 1_100, 100],
                Verdict::NotMet,
                "2 of 3 rounds; in the others 19.23 times",
            ),
            ([400, 1_200, 130], [350, 1_100, 140], Verdict::OutOfReach, "3 of 3 rounds"),
        ] {
            assert_eq!(beside(ours, device), (verdict, format!("too slow in {end}")));
        }
    }

    #[test]
    fn each_gate_opens_and_shuts() {
        let mut results = sample();
        assert_eq!(gates(&results).len(), 16);
        assert!(gates(&results).iter().all(|gate| gate.verdict == Verdict::Met), "{:#?}", gates(&results));
        // The least of virtiofsd's four figures counts.
        set(&mut results, Operation::Lookup, Wait::Sleeping, DEFAULT, 3_900);
        assert!(!met(&results, "LOOKUP, polling") && met(&results, "LOOKUP, sleeping"));
        let polling = |results: &Results| {
            gates(results).into_iter().find(|gate| gate.name.starts_with("LOOKUP, polling")).unwrap()
        };
        assert_eq!(polling(&results).verdict, Verdict::NotMet);
        set(&mut results, Operation::Lookup, Wait::Polling, BEST, 2_900);
        // 20 times the 0.15 us of a device that knows all answers is 3 us.
        assert_eq!(polling(&results).verdict, Verdict::OutOfReach);
        assert!(polling(&results).figures.contains("takes 0.15 us: 19.33 times"), "{:?}", polling(&results));
        set(&mut results, Operation::Lookup, Wait::Polling, OURS, 146);
        assert_eq!(polling(&results).verdict, Verdict::OutOfReach);
        // 9.6 percent faster than the device.
        set(&mut results, Operation::Lookup, Wait::Polling, OURS, 136);
        set(&mut results, Operation::Lookup, Wait::Polling, BEST, 2_700);
        assert_eq!(polling(&results).verdict, Verdict::NotMet, "what is slower than ours is no limit");
        set(&mut results, Operation::Lookup, Wait::Polling, BEST, 2_900);
        assert!(!met(&results, "LOOKUP, sleeping"));
        // Of the 2.9 us, an answer 0.2 us later leaves 1.3, and one 0.3 us later none.
        let sleeping =
            gates(&results).into_iter().find(|gate| gate.name.starts_with("LOOKUP, sleeping")).unwrap();
        assert!(
            sleeping.figures.ends_with("asleep after 0.30 us more than a device of no use takes: 6.00 us"),
            "{sleeping:?}"
        );
        // Later by no more than the answer is: nobody was asleep.
        results.late.iter_mut().for_each(|row| row.median_ns = 1_300 + row.late_ns);
        assert!(!gates(&results).iter().any(|gate| gate.figures.contains("asleep")));
        // With a sleeping frontend a READ is compared with those of a sleeping frontend.
        set(&mut results, Operation::Read1M, Wait::Polling, BEST, 300);
        assert!(!met(&results, "READ 1 MiB, polling") && met(&results, "READ 1 MiB, sleeping"));
        set(&mut results, Operation::Read1M, Wait::Sleeping, BEST, 1_000);
        assert!(!met(&results, "READ 1 MiB, sleeping"));
        for row in &mut results.sequential {
            (row.bytes_per_second, row.device_bytes_per_second, row.pread_bytes_per_second) = (84, 84, 100);
        }
        let sequential = |results: &Results| {
            gates(results).into_iter().find(|gate| gate.name.starts_with("sequential")).unwrap()
        };
        assert!(!met(&results, "sequential"));
        // In one round it was fast enough.
        assert_eq!(sequential(&results).verdict, Verdict::NotMet);
        assert!(
            sequential(&results)
                .figures
                .ends_with("; a device that does nothing but preadv reaches 0.0 GB/s: 84 %")
        );
        results.sequential.iter_mut().for_each(|row| row.device_best = 0.84);
        assert_eq!(sequential(&results).verdict, Verdict::OutOfReach);
        results.sequential.iter_mut().for_each(|row| row.bytes_per_second = 83);
        assert_eq!(sequential(&results).verdict, Verdict::OutOfReach);
        results.sequential.iter_mut().for_each(|row| row.device_bytes_per_second = 82);
        assert_eq!(sequential(&results).verdict, Verdict::NotMet);
        for row in &mut results.whole {
            row.inodes_walked -= 1;
            row.start_ns = START_MAX + 1;
            row.idle_cpu_ns = IDLE_MAX + 1;
        }
        // A walk that saw less than all proves nothing.
        assert!(!met(&results, "private"));
        assert!(!met(&results, "start") && !met(&results, "idle"));
        for row in &mut results.guest.as_mut().unwrap().rows {
            row.counted_by_backend.iter_mut().for_each(|counts| counts.extend([("lookup".into(), 1)]));
        }
        assert!(!met(&results, "a second walk"));
        let cold = |results: &mut Results, way: &str, requests: u64| {
            let rows = results.guest.as_mut().unwrap().rows.iter_mut();
            rows.filter(|row| (row.command, row.before, row.way) == ("read_all", Before::Cold, way))
                .for_each(|row| row.requests = requests);
            met(results, "cold find and cat")
        };
        assert!(cold(&mut results, BEST, 3702));
        assert!(!cold(&mut results, BEST, 3701));
        results.guest.as_mut().unwrap().rows.retain(|row| row.command != "find");
        results
            .guest
            .as_mut()
            .unwrap()
            .rows
            .iter_mut()
            .for_each(|row| row.counted_by_backend = Some([].into()));
        assert!(!met(&results, "a second walk"), "what was not measured proves nothing");
        results.guest.as_mut().unwrap().rows.clear();
        assert!(!met(&results, "cold find and cat"), "what was not measured proves nothing");
    }
}
